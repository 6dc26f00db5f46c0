"""pangu-quant tune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress as Bars
from rich.table import Table

from ms_pangu_quant import api
from ms_pangu_quant.api import EvaluationRequest, GenerationSettings, Judging, TuneProgress, TuneRequest, TuneResult
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli.console import (
    AllowBenchmarkOverlap,
    Checkpoint,
    Verbose,
    duration,
    err,
    figure,
    out,
    progress_bars,
    size,
    tell_unusable_tokenizer,
)
from ms_pangu_quant.cli.evaluate import OwnProblems, SandboxName, own_problems, words
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP
from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.tune.job import PAGE
from ms_pangu_quant.tune.measurements import QUANTIZED


def tune_command(
    checkpoint: Checkpoint,
    *,
    target: Annotated[
        str,
        typer.Option(
            help='"kl<=0.01", nats a token, or "retention>=0.99", of the float model\'s pass@1.', show_default=False
        ),
    ],
    calibration: Annotated[Path, typer.Option(help="Calibration data, or auto, as for quantize.", show_default=False)],
    validation: Annotated[
        Path,
        typer.Option(
            help="Other rows of the same kind: two thirds to choose on, a third for one measurement of what was chosen.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory to write: recipe, checkpoint, history, page.", show_default=False),
    ],
    smallest: Annotated[
        bool, typer.Option("--smallest", help="The smallest on disk that meets the target (default).")
    ] = False,
    fastest: Annotated[
        bool, typer.Option("--fastest", help="The one whose decode step is the shortest on --device, by the roofline.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="What it is for: a name or file as in configs/devices, or cpu. Schemes not multiplied in integers there "
            "are not tried."
        ),
    ] = "atlas_a2",
    kv_cache: Annotated[bool, typer.Option("--kv-cache", help="Keys and values cached in int8.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="Begin no step that would go beyond so much time: 4h, 90m, 30s.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help=f"For a retention: benchmarks, separated by commas: {', '.join(TASKS)}.")
    ] = None,
    modes: Annotated[str | None, typer.Option(help="Thinking modes, separated by commas. Default: all it has.")] = None,
    data: OwnProblems = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have, thought included.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers under way at a time; does not change them.")] = 16,
    sandbox: SandboxName = BUBBLEWRAP,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --output.")] = False,
    allow_benchmark_overlap: AllowBenchmarkOverlap = False,
    verbose: Verbose = False,
) -> None:
    """Find the smallest or fastest recipe that meets a target, and quantize with it.

    Cheap evidence comes before dear: errors of a few blocks, KL on few texts, on many, pass@1. Every step is kept in
    OUTPUT/history.jsonl; a killed search goes on with --resume. Exit code 1: the target was not met.

    Example:
        pangu-quant tune openPangu-Embedded-7B --target "kl<=0.01" \\
            --calibration chats.jsonl --validation others.jsonl --output tuned
    """
    if smallest and fastest:
        raise RequestError("tune: give one of --smallest and --fastest")
    evaluation = None
    if tasks is not None:
        evaluation = EvaluationRequest(
            checkpoint, output, words(tasks), None if modes is None else words(modes), data=own_problems(data or []),
            generation=GenerationSettings(max_new_tokens), batch_size=batch_size,
        )  # fmt: skip
    request = TuneRequest(
        checkpoint, target, calibration, validation, output, "fastest" if fastest else "smallest", device, budget, kv_cache,
        evaluation, Judging(sandbox), resume, allow_benchmark_overlap,
    )  # fmt: skip
    with progress_bars() as bars:
        result = api.tune(request, _Shown(bars).progress)
    _print(result)
    raise typer.Exit(0 if result.met else 1)


class _Shown:
    """A line for each step, a bar for the one under way."""

    def __init__(self, bars: Bars) -> None:
        self._bars, self._number, self._task = bars, 0, bars.add_task("", total=None, kind="count")
        self.progress = TuneProgress(self._open, self._note, self._step, self._part, self._done)

    def _open(self, reader: CheckpointReader) -> None:
        tell_unusable_tokenizer(reader.directory)

    def _note(self, said: str) -> None:
        err.print(said, soft_wrap=True, markup=False)

    def _step(self, said: str) -> None:
        self._bars.reset(self._task, description=said, total=None, completed=0)

    def _part(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)

    def _done(self, said: str, seconds: float) -> None:
        self._number += 1
        self._bars.console.print(f"{self._number:>3}  {said}  ({duration(seconds)})", soft_wrap=True, markup=False)


def _print(result: TuneResult) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headings = ["", "bits", "size", "step, ms"] if result.prefer == "fastest" else ["", "bits", "size"]
    for heading in (*headings, "block error", "KL", "at most", "texts", "target"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for trial in result.outcome.trials:
        option, found = trial.option, trial.divergence
        steps = [figure(option.decode_seconds and 1e3 * option.decode_seconds, ".2f")] if "step, ms" in headings else []
        table.add_row(
            option.name,
            f"{option.bits:.3f}",
            size(option.nbytes),
            *steps,
            figure(option.block_error, ".4f"),
            figure(found.mean if found else None, ".3g"),
            figure(found.upper if found else None, ".3g"),
            f"{len(found.sums)}" if found else "-",
            trial.verdict,
        )
    out.print(table)
    for line in result.said:
        out.print(line, soft_wrap=True, markup=False)
    files = [result.recipe] if result.recipe else []
    files += [result.output / QUANTIZED] if result.winner else []
    out.print(", ".join(str(path) for path in (*files, result.output / PAGE)), soft_wrap=True, markup=False)
