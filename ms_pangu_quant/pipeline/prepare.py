"""What is decided before the first block is touched: that all fits together, the plan, and what makes a run this run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.formats.reader import Format, Reader
from ms_pangu_quant.job.ranks import Ranks
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.estimate import amount
from ms_pangu_quant.pipeline.report import SILENT, Progress, report
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """reader       the checkpoint as the recipe's rewrites leave it.

    files        of the output directory, by name: what the format says of the plan.
    fingerprint  what the result depends on; a run with another is not resumed.
    report       quantization_report.json without what only the blocks tell.
    """

    reader: CheckpointReader
    plan: Plan
    stored_as: Format
    ranks: Ranks
    files: Mapping[str, Any]
    fingerprint: Mapping[str, str]
    report: Mapping[str, Any]


def prepare(
    reader: CheckpointReader, recipe: Recipe, data: TokenData | None, stored_as: Format, progress: Progress = SILENT
) -> Run:
    """Reads the whole checkpoint once, for its hash. Raises PanguQuantError for what does not fit together."""
    check_data(reader.config, recipe, data)
    if data is not None:
        runtime.ensure_started()
    reader = recipe.rewritten(reader)
    plan, ranks = recipe.plan(reader.config), runtime.job()
    files = stored_as.metadata(reader.config, plan)
    fingerprint = {
        "checkpoint": checkpoint_hash(reader, progress.on_bytes),
        "recipe": recipe.digest,
        "calibration data": data.sha256 if data else "none",
        "version of ms_pangu_quant": version("ms_pangu_quant"),
        **({"transforms": recipe.decision} if recipe.decision else {}),
        **({"number of ranks": str(ranks.size)} if ranks.size > 1 else {}),  # on which the order of sums depends
    }
    if recipe.assignment and recipe.assignment.checkpoint != fingerprint["checkpoint"]:
        raise RecipeError(
            f"{recipe.where}: the sensitivities are of another checkpoint; measure those of {reader.directory}"
        )
    for what, value in fingerprint.items():
        ranks.agree(what, value)
    said = report(fingerprint, recipe, plan, data, reader.bytes)
    return Run(reader, plan, stored_as, ranks, files, fingerprint, said)


def check_data(config: ModelConfig, recipe: Recipe, data: TokenData | None) -> None:
    if data is None and recipe.needs_calibration:
        raise RecipeError(
            f"{recipe.where}: needs calibration data for its transforms, rounding or static activations; pass "
            "--calibration FILE, or take a recipe that rounds without data (w8a8_rtn, w4a8_rtn)"
        )
    if data is not None and recipe.quantizer.needs.held_out and not data.held_out:
        least = recipe.calibration.least
        todo = (
            f"give {least} rows or more" if least and not data.left else "raise calibration's held_out, samples or tokens"
        )
        raise DataError(
            f"{data.where}: {amount(data)}; {recipe.where} chooses on held-out rows how strongly to correct, and wants "
            f"{recipe.calibration.said}: {todo}, or name numbers in the place of auto"
        )
    longest = max((len(sequence) for sequence in data.sequences), default=0) if data else 0
    if longest > config.max_position_embeddings:
        raise DataError(
            f"calibration sequences of {longest} tokens are longer than the model's "
            f"max_position_embeddings {config.max_position_embeddings}; lower calibration.max_length"
        )


def checkpoint_hash(reader: Reader, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Of tensors and config.json."""
    config = json.dumps(dict(reader.config.raw), sort_keys=True)
    return hashlib.sha256((reader.files.sha256(on_bytes) + config).encode()).hexdigest()
