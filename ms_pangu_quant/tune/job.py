"""A search from end to end: a checkpoint and a target in, the best recipe that meets it out, quantized."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ms_pangu_quant.calibration.data import TokenData, read_data
from ms_pangu_quant.chats.facts import calibration_data
from ms_pangu_quant.checkpoint.files import write_atomically
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import absent_folders, hash_file, lock, remove_empty
from ms_pangu_quant.errors import DataError, OutputError, RecipeError, RequestError
from ms_pangu_quant.evaluation.job import SANDBOXED, EvaluationRequest, Judging
from ms_pangu_quant.job import ranks
from ms_pangu_quant.pipeline.prepare import check_data, checkpoint_hash
from ms_pangu_quant.report.tuning import write_tuning
from ms_pangu_quant.tune.budget import Clock
from ms_pangu_quant.tune.candidates import CPU, DEARER, served_on, shipped
from ms_pangu_quant.tune.history import FILE, History
from ms_pangu_quant.tune.measurements import (
    SENSITIVITY_TOKENS,
    SILENT,
    Measurements,
    Opened,
    Questions,
    Texts,
    TuneProgress,
)
from ms_pangu_quant.tune.page import page_of
from ms_pangu_quant.tune.search import Option, Outcome, search_kl, search_retention
from ms_pangu_quant.tune.target import Divergence, Target, parse_duration, parse_target

RECIPE, CLOSEST, PAGE = "recipe.yaml", "closest.yaml", "tune.html"
VALIDATION_ROWS, VALIDATION_LENGTH, VALIDATION_TOKENS = 192, 512, 24576
FEW = 0.25  # of the texts for choosing
_LEAST = 6  # validation rows
_RUN = 16  # tokens
_SHARED = 0.5  # of a text's runs that are in another text: the two are the same


@dataclass(frozen=True)
class TuneRequest:
    """What is wanted of which checkpoint. Raises RequestError for what does not fit together.

    target       "kl<=0.01", nats a token, or "retention>=0.99", of the float model's pass@1 on `evaluation`'s tasks.
    calibration  as in quantize(); "auto" too.
    validation   rows that are none of the calibration data: two thirds for choosing, the last third for one measurement of
                 what was chosen.
    output       directory: recipe.yaml, quantized/, history.jsonl, tune.html.
    prefer       the smallest on disk, or the fastest decode step on `device`, by the roofline.
    device       what the result is served on: a name or file as in configs/devices, or "cpu". Only what it multiplies in
                 integers is tried.
    budget       such as "4h": no step is begun that would go beyond it; of a resumed run, anew.
    kv_cache     whether keys and values are cached in int8.
    evaluation   for a retention: what to ask; its checkpoint, output and limit are not used.
    """

    checkpoint: str | Path
    target: str
    calibration: str | Path
    validation: str | Path
    output: str | Path
    prefer: Literal["smallest", "fastest"] = "smallest"
    device: str = "atlas_a2"
    budget: str | None = None
    kv_cache: bool = False
    evaluation: EvaluationRequest | None = None
    judging: Judging = SANDBOXED
    resume: bool = False
    allow_benchmark_overlap: bool = False

    def __post_init__(self) -> None:
        wanted = parse_target(self.target)
        if self.budget is not None:
            parse_duration(self.budget)
        if self.prefer == "fastest" and self.device == CPU:
            raise RequestError(f"--fastest: {CPU} has no roofline; name a device of configs/devices")
        if (wanted.metric == "retention") != (self.evaluation is not None):
            raise RequestError(
                "--target: a retention takes --tasks, whose problems it is measured on; a KL takes none"
                if wanted.metric == "retention"
                else "--tasks goes with a retention as the target"
            )


@dataclass(frozen=True)
class TuneResult:
    """met: the target is shown to be met on the texts or problems for choosing and, for a KL, the final texts' mean agrees.

    winner    what was chosen; None where nothing meets the target.
    final     its KL on texts that chose nothing.
    recipe    file of the winner, or of what came closest; None where nothing was measured.
    """

    output: Path
    target: Target
    prefer: str
    met: bool
    winner: Option | None
    final: Divergence | None
    recipe: Path | None
    outcome: Outcome
    said: tuple[str, ...] = ()


def tune(request: TuneRequest, progress: TuneProgress = SILENT) -> TuneResult:
    """See TuneRequest. A search killed at any point goes on with resume, and ends as an undisturbed one."""
    if ranks.in_job():
        raise RequestError("tune: one process searches; start it without msrun")
    check_room(request)
    about, notes, about_search = _opened(request)
    progress.on_open(about.reader)
    for name, why in notes.items():
        progress.on_note(f"{name}: {why}")
    output = Path(request.output)
    made = absent_folders(output)
    descriptor = lock(output)
    try:
        return _searched(request, about, History(output, about_search), progress)
    finally:
        remove_empty(made)
        os.close(descriptor)


def check(request: TuneRequest) -> None:
    """What can be told of a request before its calibration data is there. Raises PanguQuantError."""
    check_room(request)
    reader = CheckpointReader(Path(request.checkpoint))
    shipped(reader.config, served_on(request.device), kv_cache=request.kv_cache)
    _validation(request, reader)


def check_room(request: TuneRequest) -> None:
    """Raises OutputError where the output is not empty, or is to be gone on with and is no search's."""
    output = Path(request.output)
    begun = (output / FILE).exists()
    if begun and not request.resume:
        raise OutputError(f"{output}: holds a search; go on with --resume, or choose another --output")
    if output.exists() and not begun and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: is not empty and holds no search; choose another --output")


def _opened(request: TuneRequest) -> tuple[Opened, Mapping[str, str], dict[str, Any]]:
    """(what the search is about, what is left out and why, what its answers depend on)."""
    reader, served = CheckpointReader(Path(request.checkpoint)), served_on(request.device)
    recipes, notes = shipped(reader.config, served, kv_cache=request.kv_cache)
    if DEARER not in recipes:
        raise RecipeError(f"{reader.directory}: {DEARER}: {notes[DEARER]}")
    overlap = request.allow_benchmark_overlap
    data = calibration_data(Path(request.calibration), reader, recipes[DEARER], allow_benchmark_overlap=overlap)
    for recipe in recipes.values():
        check_data(reader.config, recipe, data)
    rows = _validation(request, reader)
    texts = unseen(rows, data)
    if len(texts) < len(rows.sequences):
        notes[rows.where] = f"{len(rows.sequences) - len(texts)} rows are in the calibration data too, and left out"
    choosing = len(texts) * 2 // 3
    few = max(2, round(FEW * choosing))
    wanted = parse_target(request.target)
    questions = None if request.evaluation is None else Questions(request.evaluation, request.judging)
    about = Opened(
        reader, recipes, data, texts[:few], texts[few:choosing], texts[choosing:], served, str(wanted), questions
    )
    depends = {
        "target": str(wanted),
        "prefer": request.prefer,
        "device": request.device,
        "limits of the device": None if served.limits is None else vars(served.limits),
        "kv_cache": request.kv_cache,
        "checkpoint": checkpoint_hash(reader),
        "calibration data": data.sha256,
        "validation data": rows.sha256,
        "recipes": {name: recipe.digest for name, recipe in recipes.items()},
        "sensitivity tokens": SENSITIVITY_TOKENS,
        "evaluation": request.evaluation and _asked(request.evaluation),
        "version of ms_pangu_quant": version("ms_pangu_quant"),
    }
    return about, notes, depends


def _validation(request: TuneRequest, reader: CheckpointReader) -> TokenData:
    longest = min(VALIDATION_LENGTH, reader.config.max_position_embeddings)
    return read_data(
        request.validation, reader.directory, reader.config, VALIDATION_ROWS, longest, 0,
        tokens=VALIDATION_TOKENS, allow_benchmark_overlap=True,
    )  # fmt: skip


def _asked(request: EvaluationRequest) -> dict[str, Any]:
    """What answers depend on."""
    beside = ("checkpoint", "output", "limit", "batch_size")
    said = {name: value for name, value in asdict(request).items() if name not in beside}
    said["data"] = {name: hash_file(Path(file)) for name, file in request.data.items()}
    return dict(json.loads(json.dumps(said, default=str)))


def unseen(rows: TokenData, data: TokenData) -> Texts:
    """The rows that are not in the calibration data too. Raises DataError where most are, or too few are left."""
    known = {run for text in data.sequences for run in _runs(text.tobytes(), text.itemsize)}
    others = []
    for text in rows.sequences:
        runs = _runs(text.tobytes(), text.itemsize)
        if len(runs & known) <= _SHARED * len(runs):
            others.append(text)
    same = len(rows.sequences) - len(others)
    if same > len(others):
        raise DataError(
            f"{rows.where}: {same} of {len(rows.sequences)} rows are in the calibration data too ({data.where}); wanted "
            "texts that nothing is fitted to"
        )
    if len(others) < _LEAST:
        beside = f" that are not in {data.where}" if same else ""
        raise DataError(
            f"{rows.where}: has {len(others)} rows{beside}, wanted {_LEAST} or more to choose and to confirm on"
        )
    return others


def _runs(text: bytes, width: int) -> set[bytes]:
    """Its runs of _RUN tokens; of a shorter text itself."""
    size = _RUN * width
    return {text[start : start + size] for start in range(0, max(1, len(text) - size + 1), width)}


def _searched(request: TuneRequest, about: Opened, history: History, progress: TuneProgress) -> TuneResult:
    ended, output = history.known("end"), Path(request.output)
    # One that has ended is only read again: its final texts have been looked at.
    limit = 0.0 if ended else None if request.budget is None else parse_duration(request.budget)
    clock = Clock(limit)
    measurements = Measurements(about, output, history, clock, progress)
    target = parse_target(request.target)

    def cost(option: Option) -> tuple[float, ...]:
        if request.prefer == "fastest":
            assert option.decode_seconds is not None
            return option.decode_seconds, option.nbytes
        return (float(option.nbytes),)

    search = search_kl if target.metric == "kl" else search_retention
    outcome = search(measurements, target.limit, cost)
    if ended:
        outcome = replace(outcome, stopped=ended["stopped"])
    clock.release()
    final = measurements.final(outcome.winner) if outcome.winner else None
    if outcome.winner or outcome.stopped is None:
        history.ask("end", lambda: {"winner": outcome.winner and outcome.winner.name, "stopped": outcome.stopped})
        measurements.finish(outcome.winner)
    chosen = outcome.winner or (outcome.closest.option if outcome.closest else None)
    recipe = None
    if chosen is not None:
        recipe = output / (RECIPE if outcome.winner else CLOSEST)
        write_atomically(recipe, [measurements.recipes[chosen.name].text.encode()])
    met = outcome.winner is not None and (final is None or target.metric != "kl" or final.mean <= target.limit)
    result = TuneResult(output, target, request.prefer, met, outcome.winner, final, recipe, outcome)
    result = replace(result, said=tuple(conclusions(result)))
    write_tuning(page_of(result, request.device), output / PAGE)
    return result


def conclusions(result: TuneResult) -> list[str]:
    """What the search came to, in a few plain lines."""
    said, outcome, target = [], result.outcome, result.target
    if result.winner is not None:
        found = next(each for each in outcome.trials if each.option is result.winner)
        said.append(f"{result.winner.name}, {result.winner.bits:.3f} bits per weight, meets {target}: {found.why}")
    else:
        said.append(f"nothing was shown to meet {target}")
        if outcome.closest is not None:
            said.append(f"closest: {outcome.closest.option.name}: {outcome.closest.why}{_lacking(result)}")
    if outcome.stopped is not None:
        said.append(f"stopped early: {outcome.stopped}")
    if result.final is not None:
        said.append(_final(result))
    return said


def _lacking(result: TuneResult) -> str:
    closest = result.outcome.closest
    if closest is None or closest.divergence is None or result.target.metric != "kl":
        return ""
    found, limit = closest.divergence, result.target.limit
    if found.mean <= limit:
        return f"; its mean meets the target and {len(found.sums)} texts are too few to be sure: give more validation rows"
    return f"; it lacks {found.mean - limit:.3g} nats"


def _final(result: TuneResult) -> str:
    final = result.final
    assert final is not None
    text = f"final, on {len(final.sums)} texts that chose nothing: KL {final.mean:.3g}, at most {final.upper:.3g} (95 %)"
    if result.target.metric != "kl":
        return text
    limit = result.target.limit
    if final.upper <= limit:
        return f"{text}; the target is met there too"
    if final.mean <= limit:
        return f"{text}; the mean meets the target, these texts alone are too few to be sure"
    return f"{text}; there the target is missed"
