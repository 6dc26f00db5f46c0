"""What a run says of itself: a line for each block, and quantization_report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.mixed.budget import Assignment
from ms_pangu_quant.pipeline.estimate import calibration_facts
from ms_pangu_quant.recipe.parse import text_of
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.recipe import Recipe


@dataclass(frozen=True)
class BlockReport:
    """What rounding one block cost.

    output_error  ||quantized - float|| / ||float|| of the block's output on calibration data; None without data. float is
                  what the float block makes of the quantized block's input, or, where the quantizer aims at the float
                  model (Needs.drift), the float model's own hidden states, so that the error is that of all blocks so far.
    held_out_error  the same on the texts that nothing was fitted to; None where there are none.
    weight_error  the same of each layer's weight, by site name.
    notes         what a quantizer had to do that was not asked for (damping raised), by site name.
    """

    index: int
    output_error: float | None
    held_out_error: float | None
    weight_error: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizeResult:
    output: Path
    blocks: tuple[BlockReport, ...]
    bytes_before: int
    bytes_after: int
    resumed_at: int
    was_complete: bool = False  # an earlier run had written all of it


def unheard(*values: object) -> None:
    pass


@dataclass(frozen=True)
class Progress:
    """What is called while a run is under way.

    on_open       with the reader of the checkpoint, once recipe and data are read too.
    on_answering  with the file that the model's own answers go into, where they are the calibration data.
    on_answered   with how many more of so many rows it has.
    on_shortfall  with what is said of calibration data that is less than the recipe wants.
    on_tried      with how many of so many steps are done of trying transforms.
    on_decided    with what that came to.
    on_measuring  with the file that sensitivities are measured into, where a budget needs them.
    on_streams    with how many more of mixed.sensitivity.total_steps() are done of that.
    on_budget     with what a budget came to.
    on_bytes      with how many bytes of the checkpoint were just read for its hash.
    on_block      with each block's report once it is on disk; with resume, for the finished ones too.
    """

    on_open: Callable[[CheckpointReader], None] = unheard
    on_answering: Callable[[Path], None] = unheard
    on_answered: Callable[[int, int], None] = unheard
    on_shortfall: Callable[[str], None] = unheard
    on_tried: Callable[[int, int], None] = unheard
    on_decided: Callable[[str], None] = unheard
    on_measuring: Callable[[Path], None] = unheard
    on_bytes: Callable[[int], None] = unheard
    on_streams: Callable[[int], None] = unheard
    on_budget: Callable[[Assignment], None] = unheard
    on_block: Callable[[BlockReport], None] = unheard


SILENT = Progress()


def report(
    fingerprint: Mapping[str, str], recipe: Recipe, plan: Plan, data: TokenData | None, bytes_before: int
) -> dict[str, Any]:
    """What produces the checkpoint, before "blocks" and "files" are known; holds no times, so that the same run gives the
    same bytes."""
    return {
        "fingerprint": dict(fingerprint),
        "recipe": {"why": recipe.why, "text": text_of(recipe)},
        **({"budget": recipe.assignment.summary()} if recipe.assignment else {}),
        "calibration": None if data is None else calibration_facts(recipe, data),
        "bytes_before": bytes_before,
        "blocks": [],
        "schemes": {name: word_of(scheme) for name, _, scheme in plan},
        "files": {},
        "versions": {package: version(package) for package in ("ms_pangu_quant", "mindspore", "mindformers", "numpy")},
    }
