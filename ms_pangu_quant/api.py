"""What a program or a notebook calls: paths and names go in, results come out.

The same work as the commands of the same names, without their printing. A recipe is the name of a shipped one, a file, or
its content as a mapping. MindSpore is started where it is needed, on the CPU in graph mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_pangu_quant.calibration.data import TokenData, load_token_data
from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import Block, CheckpointReader, embedding_rows
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.job import EvaluationRequest, Judging, answer, evaluate, score
from ms_pangu_quant.formats.reader import FORMATS, open_checkpoint
from ms_pangu_quant.formats.serving import check_served, facts_of
from ms_pangu_quant.inference.sampling import GenerationSettings
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline import BlockReport, QuantizeResult, check_data, planned_kinds
from ms_pangu_quant.pipeline import quantize as run_pipeline
from ms_pangu_quant.recipe import Recipe, find_recipe, load_recipe, parse_recipe
from ms_pangu_quant.report.job import ReportRequest, report
from ms_pangu_quant.sensitivity import Sensitivity, assigned

if TYPE_CHECKING:
    from ms_pangu_quant.inference.compare import Comparison

__all__ = [
    "AnyRecipe",
    "EvaluationRequest",
    "GenerationSettings",
    "Judging",
    "ReportRequest",
    "answer",
    "as_recipe",
    "compare",
    "evaluate",
    "observe",
    "quantize",
    "read_data",
    "report",
    "score",
]

AnyRecipe = str | Path | Mapping[str, Any] | Recipe


def quantize(
    checkpoint: str | Path,
    recipe: AnyRecipe,
    output: str | Path,
    *,
    calibration: str | Path | None = None,
    sensitivity: str | Path | None = None,
    stored_as: str = "mindformers",
    resume: bool = False,
    allow_benchmark_overlap: bool = False,
    allow_unserved: bool = False,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> QuantizeResult:
    """Quantize a float checkpoint into the new directory `output`, one block in memory at a time.

    calibration  .jsonl, .parquet or dataset directory; the recipe says how much of it is used.
    sensitivity  what `pangu-quant sensitivity` wrote, for a recipe with a budget.
    stored_as    "mindformers", "ascend" or "compressed-tensors"; docs/formats.md says who reads which.
    on_block     called with each block's errors once it is on disk; with resume, for the finished ones too.
    Raises       PanguQuantError, as the command does, before anything is written where that is possible.
    """
    reader, chosen = CheckpointReader(Path(checkpoint)), as_recipe(recipe)
    if stored_as not in FORMATS:
        raise RequestError(f"stored_as: got {stored_as!r}, wanted one of {', '.join(FORMATS)}")
    amount, data = chosen.calibration, None
    if calibration is not None:
        data = read_data(
            calibration, reader.directory, reader.config, amount.samples, amount.max_length, amount.seed,
            allow_benchmark_overlap=allow_benchmark_overlap,
        )  # fmt: skip
    check_data(reader.config, chosen, data)
    if sensitivity is not None:
        chosen = assigned(chosen, reader.config, Sensitivity.load(Path(sensitivity)), FORMATS[stored_as])
    plan = chosen.plan(reader.config)
    if not allow_unserved:
        check_served(stored_as, facts_of(reader.config, planned_kinds(plan), plan.group_size))
    return run_pipeline(
        reader, chosen, Path(output), data=data, resume=resume, stored_as=FORMATS[stored_as], on_block=on_block
    )


def compare(
    reference: str | Path, quantized: str | Path, data: str | Path, *, limit: int | None = None, max_length: int = 2048
) -> Comparison:
    """How far the next-token distributions of one directory are from another's, on text that calibration has not seen.

    data  rows of text, messages or token_ids; the first `limit` of them, each cut to max_length tokens.
    """
    from ms_pangu_quant.inference.compare import compare as run

    directory = Path(reference)
    config = open_checkpoint(directory).config
    longest = min(max_length, config.max_position_embeddings)
    rows = read_data(data, directory, config, limit, longest, None, allow_benchmark_overlap=True)
    return run(directory, Path(quantized), rows.sequences)


def observe(
    checkpoint: str | Path,
    index: int,
    data: str | Path,
    *,
    recipe: AnyRecipe | None = None,
    samples: int = 16,
    rows: int = 2048,
) -> tuple[Block, dict[str, InputStats]]:
    """Block `index` of a float checkpoint and what enters its linear layers, before rounding.

    recipe   its rewrites and transforms are done first; none: the checkpoint as it is.
    samples  texts of `data`, drawn as the recipe's seed says, each cut to the recipe's max_length.
    rows     activations kept of each input: stats[name].sample.rows is [at most rows, in]; name as in layout.INPUT_NAMES.
    Returns  (block, stats): block["mlp.up_proj.weight"] is float32 [out, in], as rounding would see it.

    The blocks before it are the float ones; in a run of quantize() they are quantized, which moves the figures little.
    """
    reader = CheckpointReader(Path(checkpoint))
    if not 0 <= index < reader.config.num_hidden_layers:
        raise RequestError(f"index: got {index}, wanted a block from 0 to {reader.config.num_hidden_layers - 1}")
    chosen = as_recipe({"scheme": "w8a8"} if recipe is None else recipe)
    amount = chosen.calibration
    longest = min(amount.max_length, reader.config.max_position_embeddings)
    sequences = read_data(data, reader.directory, reader.config, samples, longest, amount.seed).sequences
    reader = chosen.rewritten(reader)
    plan = chosen.plan(reader.config)
    runtime.ensure_started()
    from ms_pangu_quant.calibration.stream import BlockRunner, Hidden

    hidden = Hidden(embedding_rows(reader.files, np.concatenate(sequences)), [len(each) for each in sequences])
    runner = BlockRunner(reader.config, hidden.lengths)
    for earlier in range(index):
        hidden = runner.advance(reader.block(earlier), {}, hidden)
    block, kept = reader.block(index), max(rows, chosen.needs_rows)
    stats, _ = runner.observe(block, hidden, gram=chosen.needs_gram, rows=kept, where=f"block {index}")
    for transform in chosen.transforms:
        block, stats = transform(block, stats, plan.of_block(index))
    return block, stats


def as_recipe(recipe: AnyRecipe) -> Recipe:
    """A shipped recipe's name, a file, a recipe's content as a mapping, or a Recipe. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_recipe(json.dumps(dict(recipe)), "recipe")  # JSON is YAML
    return load_recipe(find_recipe(str(recipe)))


def read_data(
    path: str | Path,
    checkpoint: Path,
    config: ModelConfig,
    samples: int | None,
    max_length: int,
    seed: int | None,
    *,
    allow_benchmark_overlap: bool = False,
) -> TokenData:
    """Token sequences of a file, encoded with the checkpoint's tokenizer if it has one."""
    return load_token_data(
        Path(path),
        tokenizer=Tokenizer.from_directory(checkpoint) if (checkpoint / "tokenizer.model").exists() else None,
        vocab_size=config.vocab_size,
        max_length=max_length,
        samples=samples,
        seed=seed,
        allow_benchmark_overlap=allow_benchmark_overlap,
    )
