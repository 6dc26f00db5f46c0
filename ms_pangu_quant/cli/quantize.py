"""pangu-quant quantize"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ms_pangu_quant import api
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli.console import (
    AllowBenchmarkOverlap,
    AllowUnserved,
    Bars,
    Checkpoint,
    Format,
    Verbose,
    duration,
    err,
    figure,
    out,
    peak_memory,
    progress_bars,
    size,
    tell_unserved_tokenizer,
    tell_unusable_tokenizer,
)
from ms_pangu_quant.cli.inspect import print_layers
from ms_pangu_quant.job import ranks
from ms_pangu_quant.mixed.budget import Assignment
from ms_pangu_quant.mixed.sensitivity import total_steps
from ms_pangu_quant.pipeline.estimate import TRIED_BLOCKS, Estimate
from ms_pangu_quant.pipeline.report import BlockReport, Progress, QuantizeResult
from ms_pangu_quant.report.inspection import inspection


def quantize_command(
    checkpoint: Checkpoint,
    recipe: Annotated[
        str, typer.Option(help="Recipe file, or the name of a shipped one: w8a8, w4a8_g128, ...", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option(help="Directory to write; must be empty or absent, or --resume.", show_default=False)
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration data: .jsonl, .parquet or a dataset directory whose rows have text, messages or token_ids; "
            "or auto: the model's own answers, generated first and kept beside --output (pangu-quant calibrate)."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in --output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: schemes, size, memory, time. Writes nothing.")
    ] = False,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            help="For a recipe with a budget: what `pangu-quant sensitivity` wrote. Else OUTPUT.sensitivity.json, which is "
            "measured first if it is not there."
        ),
    ] = None,
    allow_benchmark_overlap: AllowBenchmarkOverlap = False,
    stored_as: Format = "mindformers",
    allow_unserved: AllowUnserved = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a float checkpoint, one block in memory at a time.

    Example:
        pangu-quant quantize openPangu-Embedded-7B --recipe w8a8 \\
            --calibration chats.jsonl --output pangu-7b-w8a8
    """
    asked: dict[str, Any] = {
        "calibration": calibration,
        "sensitivity": sensitivity,
        "stored_as": stored_as,
        "allow_benchmark_overlap": allow_benchmark_overlap,
        "allow_unserved": allow_unserved,
    }
    if dry_run:
        if api.as_recipe(recipe).budget and sensitivity is None and api.sensitivities_of(output).exists():
            asked["sensitivity"] = api.sensitivities_of(output)  # of an earlier run
        found = api.estimate(checkpoint, recipe, **asked)
        tell_unusable_tokenizer(checkpoint)
        _print_estimate(found)
        return
    started = time.monotonic()
    with progress_bars() as bars:
        result = api.quantize(checkpoint, recipe, output, resume=resume, progress=Shown(bars).progress, **asked)
    if ranks.current().is_first:
        _print_result(result, time.monotonic() - started)


class Shown:
    """A run on the terminal: a bar for what takes long, and a line for each finished block."""

    def __init__(self, bars: Bars) -> None:
        self._bars, self._blocks, self._bytes = bars, 0, 0
        self._previous = time.monotonic()
        self.progress = Progress(
            on_open=self._open,
            on_answering=self._answering,
            on_answered=self._answered,
            on_shortfall=print_shortfall,
            on_tried=self._tried,
            on_decided=self._decided,
            on_measuring=self._measuring,
            on_streams=self._streams,
            on_budget=self._budget,
            on_bytes=self._read,
            on_block=self._block,
        )

    def _open(self, reader: CheckpointReader) -> None:
        if reader.rows is not None:
            where = reader.directory
            err.print(f"{where}: MindFormers' training form, taken as: {reader.rows}", soft_wrap=True, markup=False)
        if ranks.current().is_first:
            tell_unusable_tokenizer(reader.directory)
        self._blocks, self._bytes = reader.config.num_hidden_layers, reader.bytes

    def _answering(self, path: Path) -> None:
        err.print(f"calibration: the model's own answers -> {path}", soft_wrap=True, markup=False)

    def _answered(self, count: int, total: int) -> None:
        self._advance("answers", count, total)

    def _tried(self, done: int, total: int) -> None:
        self._advance("trying transforms", 1, total)

    def _decided(self, said: str) -> None:
        err.print(f"transforms: {said}", soft_wrap=True, markup=False)

    def _measuring(self, path: Path) -> None:
        err.print(f"measuring sensitivities for the budget -> {path}", soft_wrap=True)

    def _streams(self, count: int) -> None:
        self._advance("measuring", count, total_steps(self._blocks))

    def _budget(self, found: Assignment) -> None:
        counts = Counter(found.schemes.values())
        err.print(
            f"budget: {found.bits_per_weight:.3f} bits per weight, predicted KL {found.predicted_kl:.3g} "
            f"({', '.join(f'{count} layers {name}' for name, count in sorted(counts.items()))})",
            soft_wrap=True,
        )

    def _read(self, count: int) -> None:
        self._advance("hashing", count, self._bytes, kind="bytes")

    def _block(self, report: BlockReport) -> None:
        seconds, self._previous = time.monotonic() - self._previous, time.monotonic()
        parts = [f"block {report.index + 1:>{len(str(self._blocks))}}/{self._blocks}"]
        if report.output_error is not None:
            held_out = "" if report.held_out_error is None else f", held out {figure(report.held_out_error, '.4f')}"
            parts.append(f"error {figure(report.output_error, '.4f')}{held_out}")
        if report.weight_error:
            parts.append(f"weights {max(report.weight_error.values()):.4f}")
        left = self._blocks - report.index - 1
        ahead = [f"{duration(left * seconds)} left"] if left * seconds >= 1 else []  # not of what an earlier run has done
        parts += [f"{seconds:.1f} s", peak_memory(), *ahead]
        self._bars.console.print("  ".join(parts), soft_wrap=True)
        for site, note in report.notes.items():
            self._bars.console.print(f"  {site}: {note}")
        self._advance("blocks", 1, self._blocks)

    def _advance(self, name: str, count: int, total: int, kind: str = "count") -> None:
        """Moves the bar of this name; it takes the place of the one before."""
        task = next((task.id for task in self._bars.tasks if task.description == name), None)
        if task is None:
            for other in self._bars.task_ids:
                self._bars.remove_task(other)
            task = self._bars.add_task(name, total=total, kind=kind, lines=name == "blocks")
            self._previous = time.monotonic()
        self._bars.advance(task, count)


def print_shortfall(said: str) -> None:
    err.print(f"calibration: {said}", soft_wrap=True, markup=False)


def _print_result(result: QuantizeResult, seconds: float) -> None:
    if result.was_complete:
        out.print(f"{result.output}: already complete", soft_wrap=True, markup=False)
        return
    ratio = result.bytes_after / result.bytes_before
    out.print(
        f"{result.output}: {size(result.bytes_before)} -> {size(result.bytes_after)} ({ratio:.0%}), "
        f"{seconds:.0f} s, peak memory {peak_memory()}"
    )
    print_layers(inspection(result.output))
    tell_unserved_tokenizer(result.output)


def _print_estimate(found: Estimate) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("layers", "blocks", "scheme", "bits per weight"):
        table.add_column(heading)
    for names, blocks, word, bits in found.groups:
        table.add_row(names, blocks, word, f"{bits:.2f}")
    if found.cache is not None:
        table.add_row("keys, values", "all", "int8 cache", "")
    out.print(table)
    if found.calibration is not None:
        used = found.calibration
        out.print(
            f"calibration: {used['sequences']} texts, {used['tokens']} tokens ({used['truncated']} cut to "
            f"{used['max_length']})",
            soft_wrap=True,
        )
        if used["shortfall"] is not None:
            print_shortfall(used["shortfall"])
    if found.tried:
        names = " or ".join(f"[{name}]" for name in found.tried)
        said = f"transforms: {names}, tried on {TRIED_BLOCKS} blocks first; the size is the last one's"
        out.print(said, soft_wrap=True, markup=False)
    out.print(
        f"size: {size(found.bytes_before)} -> {size(found.bytes_after)}; peak memory about {size(found.peak_bytes)}; "
        f"about {duration(found.seconds)} on this machine",
        soft_wrap=True,
    )
