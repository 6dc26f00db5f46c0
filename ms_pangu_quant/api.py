"""What a program or a notebook calls: paths and names go in, results come out.

The same work as the commands of the same names, without their printing. A recipe is the name of a shipped one, a file, or
its content as a mapping. MindSpore is started where it is needed, on the CPU in graph mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_pangu_quant.calibration.data import TokenData, read_data
from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.chats import job as chats
from ms_pangu_quant.chats.facts import calibration_data
from ms_pangu_quant.chats.job import CalibrationRequest, Chats, calibrate
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.files import write_atomically
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.checkpoint.writer import check_room
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.job import EvaluationRequest, Judging, answer, evaluate, score
from ms_pangu_quant.formats.consumers import WRONG, Facts, Row, check_served, facts_of, rows_for
from ms_pangu_quant.formats.export import export as run_export
from ms_pangu_quant.formats.finished import is_exported, stored_bytes
from ms_pangu_quant.formats.reader import FORMATS, Format, QuantizedReader, open_checkpoint
from ms_pangu_quant.inference.endpoint import Endpoint, Server
from ms_pangu_quant.inference.sampling import GenerationSettings
from ms_pangu_quant.mixed.sensitivity import DEFAULT_TOKENS, Sensitivity, assigned, schemes_to_measure
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.block import transform_block
from ms_pangu_quant.pipeline.estimate import Estimate, SensitivityCost, measuring_cost, shortfall
from ms_pangu_quant.pipeline.estimate import estimate as estimate_run
from ms_pangu_quant.pipeline.loop import quantize as run_pipeline
from ms_pangu_quant.pipeline.prepare import check_data
from ms_pangu_quant.pipeline.report import SILENT, Progress, QuantizeResult
from ms_pangu_quant.pipeline.trial import with_transforms
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe, parse_recipe
from ms_pangu_quant.recipe.recipe import Recipe
from ms_pangu_quant.report.job import ReportRequest, report
from ms_pangu_quant.report.sensitivity_plot import sensitivity_plot
from ms_pangu_quant.suggestion import did_you_mean
from ms_pangu_quant.tune import job as tuning
from ms_pangu_quant.tune.job import TuneRequest, TuneResult
from ms_pangu_quant.tune.measurements import SILENT as SILENT_SEARCH
from ms_pangu_quant.tune.measurements import TuneProgress

if TYPE_CHECKING:
    from ms_pangu_quant.inference.compare import Comparison, ServedComparison

__all__ = [
    "AnyRecipe",
    "CalibrationRequest",
    "Chats",
    "Endpoint",
    "EvaluationRequest",
    "GenerationSettings",
    "Judging",
    "Progress",
    "ReportRequest",
    "TuneProgress",
    "TuneRequest",
    "TuneResult",
    "answer",
    "as_recipe",
    "calibrate",
    "compare",
    "compare_served",
    "estimate",
    "evaluate",
    "export",
    "observe",
    "quantize",
    "read_data",
    "report",
    "score",
    "sensitivity",
    "sensitivity_cost",
    "tune",
]

AnyRecipe = str | Path | Mapping[str, Any] | Recipe
AUTO = "auto"  # calibration data: the model's own answers


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
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize a float checkpoint into the new directory `output`, one block in memory at a time.

    calibration  .jsonl, .parquet or dataset directory; the recipe says how much of it is used. "auto": the model's own
                 answers to the shipped prompts, generated first (calibrate()), as many rows as the recipe wants. They stay
                 beside `output` as calibration-HASH.jsonl, where other runs of this checkpoint find them.
    sensitivity  for a recipe with a budget: what sensitivity() wrote. Else OUTPUT.sensitivity.json, which is measured first
                 if it is not there.
    stored_as    "mindformers", "ascend" or "compressed-tensors"; docs/formats.md says who reads which.
    Raises       PanguQuantError, as the command does, before anything is written where that is possible.
    """
    if str(calibration) == AUTO:
        find_layout(stored_as)
        check_room(Path(output), resume=resume)
        calibration = _own_answers(checkpoint, as_recipe(recipe), Path(output), progress)
    request = _request(checkpoint, recipe, calibration, stored_as, allow_benchmark_overlap, progress)
    runtime.job().from_first(lambda: check_room(Path(output), resume=resume))  # it is rank 0 that writes there
    request = _budget_spent(request, sensitivity, Path(output), resume, progress)
    _check_request(request, allow_unserved)
    return run_pipeline(
        request.reader,
        request.recipe,
        Path(output),
        data=request.data,
        resume=resume,
        stored_as=request.stored_as,
        progress=progress,
    )


def _own_answers(checkpoint: str | Path, recipe: Recipe, output: Path, progress: Progress) -> Path:
    """Generated unless they are there."""
    wanted = recipe.calibration.texts
    prepared = chats.prepare(CalibrationRequest(checkpoint, samples=wanted), progress.on_bytes)
    path = output.absolute().with_name(f"calibration-{prepared.digest[:16]}.jsonl")
    if chats.finished(prepared, path) is None:
        progress.on_answering(path)
        chats.answer(prepared, path, resume=True, on_row=lambda: progress.on_answered(1, wanted))
    return path


def estimate(
    checkpoint: str | Path,
    recipe: AnyRecipe,
    *,
    calibration: str | Path | None = None,
    sensitivity: str | Path | None = None,
    stored_as: str = "mindformers",
    allow_benchmark_overlap: bool = False,
    allow_unserved: bool = False,
) -> Estimate:
    """What quantize() would make of the same arguments, and what it would take; nothing is written."""
    request = _request(checkpoint, recipe, calibration, stored_as, allow_benchmark_overlap)
    request = _budget_spent(request, sensitivity, None, False, SILENT)
    _check_request(request, allow_unserved)
    return estimate_run(request.reader, request.recipe, request.data, request.stored_as)


@dataclass(frozen=True)
class _Request:
    """What the arguments of a run name, opened."""

    reader: CheckpointReader
    recipe: Recipe
    data: TokenData | None
    stored_as: Format


def _request(
    checkpoint: str | Path,
    recipe: AnyRecipe,
    calibration: str | Path | None,
    stored_as: str,
    allow_benchmark_overlap: bool,
    progress: Progress = SILENT,
) -> _Request:
    reader, chosen = CheckpointReader(Path(checkpoint)), as_recipe(recipe)
    known = find_layout(stored_as)
    data = None
    if str(calibration) == AUTO:
        raise RequestError(
            "--calibration auto: only a run of quantize makes it, and no --dry-run; make it with pangu-quant calibrate "
            "and give the file"
        )
    if calibration is not None:
        data = calibration_data(Path(calibration), reader, chosen, allow_benchmark_overlap=allow_benchmark_overlap)
    progress.on_open(reader)
    return _Request(reader, chosen, data, known)


def _check_request(request: _Request, allow_unserved: bool) -> None:
    if not allow_unserved:
        config = request.reader.config
        check_served(request.stored_as.NAME, facts_of(config, request.recipe.plan(config)))
    check_data(request.reader.config, request.recipe, request.data)


def _budget_spent(
    request: _Request, given: str | Path | None, output: Path | None, resume: bool, progress: Progress
) -> _Request:
    """The recipe with the schemes that its budget buys, from the sensitivities in `given`, or in OUTPUT.sensitivity.json,
    which is measured and written first if it is not there; without an output nothing is measured."""
    recipe = request.recipe
    if request.data is not None:
        check_data(request.reader.config, recipe, request.data)  # before anything is measured
        _say_shortfall(request, progress)
    if recipe.budget is None:
        if given is not None:
            raise RequestError(f"--sensitivity: {recipe.where} has no budget to spend on it")
        return request
    path = Path(given) if given else output and sensitivities_of(output)
    if path is None:
        raise RequestError(
            f"--dry-run: {recipe.where} has a budget, and what it buys follows from sensitivities: pass --sensitivity FILE "
            "(pangu-quant sensitivity makes one, and its --dry-run tells what that takes)"
        )
    if path.exists() or given:
        found = Sensitivity.load(path)
    elif request.data is None:
        raise RequestError(f"{recipe.where}: a budget needs --calibration FILE, or --sensitivity FILE besides")
    else:
        chosen = with_transforms(request.reader, recipe, request.data, progress, output if resume else None)
        progress.on_measuring(path)
        found = _measured(replace(request, recipe=chosen), path, DEFAULT_TOKENS, resume, progress)
    spent = assigned(recipe, request.reader.config, found, request.stored_as)
    assert spent.assignment is not None
    progress.on_budget(spent.assignment)
    return replace(request, recipe=spent)


def _say_shortfall(request: _Request, progress: Progress) -> None:
    said = request.data and shortfall(request.recipe, request.data)
    if said:
        progress.on_shortfall(said)


def sensitivities_of(output: str | Path) -> Path:
    """Where quantize() measures them for a recipe with a budget."""
    return Path(output).with_name(f"{Path(output).name}.sensitivity.json")


def sensitivity(
    checkpoint: str | Path,
    recipe: AnyRecipe,
    calibration: str | Path,
    output: str | Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    resume: bool = False,
    allow_benchmark_overlap: bool = False,
    progress: Progress = SILENT,
) -> Sensitivity:
    """What each group of layers costs when it alone is quantized: measured, written to the JSON file `output`, and drawn
    into an .svg beside it.

    tokens  of the calibration data that KL is measured on; statistics are taken from the others.
    resume  go on with an unfinished run.
    """
    request = _request(checkpoint, recipe, calibration, "mindformers", allow_benchmark_overlap, progress)
    path = Path(output)
    schemes_to_measure(request.recipe)
    if path.is_dir() or not path.parent.is_dir():
        raise RequestError(f"--output: {path} is not a file in a directory that exists")
    _say_shortfall(request, progress)
    chosen = with_transforms(request.reader, request.recipe, request.data, progress)
    return _measured(replace(request, recipe=chosen), path, tokens, resume, progress)


def sensitivity_cost(
    checkpoint: str | Path,
    recipe: AnyRecipe,
    calibration: str | Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    allow_benchmark_overlap: bool = False,
) -> SensitivityCost:
    """What sensitivity() would take for the same arguments."""
    request = _request(checkpoint, recipe, calibration, "mindformers", allow_benchmark_overlap)
    schemes_to_measure(request.recipe)
    assert request.data is not None
    return measuring_cost(request.reader.config, request.recipe, request.data, tokens)


def _measured(request: _Request, path: Path, tokens: int, resume: bool, progress: Progress) -> Sensitivity:
    assert request.data is not None
    runtime.ensure_started()
    from ms_pangu_quant.mixed.measure import measure

    found = measure(
        request.reader,
        request.recipe,
        path.with_name(f"{path.name}.partial"),
        data=request.data,
        tokens=tokens,
        resume=resume,
        on_step=progress.on_streams,
    )
    write_atomically(path.with_suffix(".svg"), [sensitivity_plot(found).encode()])
    found.save(path)
    return found


def tune(request: TuneRequest, progress: TuneProgress = SILENT_SEARCH) -> TuneResult:
    """Find the smallest or fastest recipe that meets a target; docs/tune.md.

    A target that no candidate meets is a result, with met=False. Raises PanguQuantError for what does not fit together,
    before anything is written.
    """
    if str(request.calibration) == AUTO:
        tuning.check(request)
        made = _own_answers(request.checkpoint, as_recipe("w8a8"), Path(request.output), SILENT)
        request = replace(request, calibration=made)
    return tuning.tune(request, progress)


def export(
    directory: str | Path,
    output: str | Path,
    *,
    stored_as: str,
    resume: bool = False,
    allow_unserved: bool = False,
    on_block: Callable[[int], None] = lambda index: None,
) -> Exported:
    """Write a quantized directory in another format; the float checkpoint is not needed."""
    target, reader = find_layout(stored_as), open_checkpoint(Path(directory))
    if not isinstance(reader, QuantizedReader):
        raise RequestError(f"{directory}: is a float checkpoint; wanted a quantized one (pangu-quant quantize makes it)")
    facts = facts_of(reader.config, reader.plan)
    if not allow_unserved:
        check_served(target.NAME, facts)
    if resume and is_exported(reader, target, Path(output)):
        return Exported(Path(output), reader.format.NAME, target.NAME, stored_bytes(Path(output)), (), was_complete=True)
    size = run_export(reader, target, Path(output), resume=resume, on_block=on_block)
    wrong = tuple((each, row) for each in facts for row in rows_for(target.NAME, each) if row.verdict == WRONG)
    return Exported(Path(output), reader.format.NAME, target.NAME, size, wrong)


@dataclass(frozen=True)
class Exported:
    """wrong: the programs that would compute this export wrongly, each with the layers that it is about."""

    output: Path
    stored_as_before: str
    stored_as: str
    bytes: int
    wrong: tuple[tuple[Facts, Row], ...]
    was_complete: bool = False  # an earlier export had written all of it


def compare(
    reference: str | Path,
    quantized: str | Path,
    data: str | Path,
    *,
    limit: int | None = None,
    max_length: int = 2048,
    on_block: Callable[[], None] = lambda: None,
) -> Comparison:
    """How far the next-token distributions of one directory are from another's, on text that calibration has not seen.

    data      rows of text, messages or token_ids; the first `limit` of them, each cut to max_length tokens.
    on_block  called after each block of either.
    """
    from ms_pangu_quant.inference.compare import compare as run

    directory = Path(reference)
    config = open_checkpoint(directory).config
    longest = min(max_length, config.max_position_embeddings)
    rows = read_data(data, directory, config, limit, longest, None, allow_benchmark_overlap=True)
    return run(directory, Path(quantized), rows.sequences, on_block)


def compare_served(
    reference: str | Path,
    endpoint: Endpoint,
    data: str | Path,
    *,
    top: int = 20,
    limit: int | None = None,
    max_length: int = 2048,
    on_text: Callable[[], None] = lambda: None,
    on_block: Callable[[], None] = lambda: None,
) -> ServedComparison:
    """How far what a server computes is from a directory, float or quantized: compare() on what the server gives.

    top      tokens of each of its distributions that it is asked for.
    on_text  called for each row that it has answered.
    data, limit, max_length and on_block are those of compare().
    """
    from ms_pangu_quant.inference.compare import compare_served as run

    directory = Path(reference)
    config = open_checkpoint(directory).config
    server = Server(endpoint)
    context = min(config.max_position_embeddings, server.description.max_model_len or config.max_position_embeddings)
    longest = min(max_length, context - 1)  # a server generates a token besides
    rows = read_data(data, directory, config, limit, longest, None, allow_benchmark_overlap=True)
    return run(directory, server, rows.sequences, top, on_text, on_block)


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
    Returns  (block, stats): block.weight(site), for a site of checkpoint.layout.SITES, is float32 [out, in], as rounding
             would see it.

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
    from ms_pangu_quant.calibration.runner import BlockRunner, Hidden

    hidden = Hidden(embedding_rows(reader.files, np.concatenate(sequences)), [len(each) for each in sequences])
    block = reader.block(index)
    with BlockRunner(reader.config, hidden.lengths) as runner:
        for earlier in range(index):
            hidden = runner.advance(reader.rounded_block(earlier), hidden)
        stats, _ = runner.observe(block, hidden, chosen.observed | Needs(rows=rows), f"block {index}")
    return transform_block(block, stats, chosen, plan.blocks[index])


def as_recipe(recipe: AnyRecipe) -> Recipe:
    """A shipped recipe's name, a file, a recipe's content as a mapping, or a Recipe. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_recipe(json.dumps(dict(recipe)), "recipe")  # JSON is YAML
    return load_recipe(find_recipe(str(recipe)))


def find_layout(name: str) -> Format:
    """The on-disk layout of this name. Raises RequestError."""
    if name not in FORMATS:
        raise RequestError(f"--format: got {name!r}{did_you_mean(name, FORMATS)}, wanted one of {', '.join(FORMATS)}")
    return FORMATS[name]
