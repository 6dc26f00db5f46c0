"""pangu-quant quantize"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli.console import (
    AllowUnserved,
    Checkpoint,
    Format,
    Verbose,
    calibration_data,
    chosen_format,
    err,
    out,
    peak_memory,
    progress_bars,
    size,
)
from ms_pangu_quant.cli.inspect import inspection, print_layers
from ms_pangu_quant.cli.sensitivity import with_budget_spent
from ms_pangu_quant.formats.consumers import check_served, facts_of
from ms_pangu_quant.job import ranks
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.estimate import Estimate, estimate
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.prepare import check_data
from ms_pangu_quant.pipeline.report import BlockReport
from ms_pangu_quant.pipeline.report import Progress as RunProgress
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.recipe.recipe import Recipe


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
            help="Calibration data: .jsonl, .parquet or a dataset directory whose rows have text, messages or token_ids."
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
    allow_benchmark_overlap: Annotated[
        bool,
        typer.Option("--allow-benchmark-overlap", help="Accept calibration data that contains HumanEval or MBPP problems."),
    ] = False,
    stored_as: Format = "mindformers",
    allow_unserved: AllowUnserved = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a float checkpoint, one block in memory at a time.

    Example:
        pangu-quant quantize openPangu-Embedded-7B --recipe w8a8 \\
            --calibration chats.jsonl --output pangu-7b-w8a8
    """
    reader = CheckpointReader(checkpoint)
    if reader.rows is not None:
        err.print(f"{checkpoint}: MindFormers' training form, taken as: {reader.rows}", soft_wrap=True, markup=False)
    chosen = load_recipe(find_recipe(recipe))
    layout_on_disk = chosen_format(stored_as)
    data = None
    if calibration is not None:
        data = calibration_data(calibration, checkpoint, reader.config, chosen, allow_benchmark_overlap)
    chosen = with_budget_spent(
        reader,
        chosen,
        layout_on_disk,
        output,
        given=sensitivity,
        data=data,
        resume=resume,
        dry_run=dry_run,
        verbose=verbose,
    )
    if not allow_unserved:
        plan = chosen.plan(reader.config)
        check_served(layout_on_disk.NAME, facts_of(reader.config, plan))
    if dry_run:
        check_data(reader.config, chosen, data)
        _print_plan(estimate(reader, chosen, data, layout_on_disk), chosen, data)
        return
    if data is not None:
        runtime.start("cpu", "graph", verbose=verbose)
    started = time.monotonic()
    with progress_bars() as progress:
        hashing = progress.add_task("hashing", total=reader.bytes, kind="bytes")
        blocks = progress.add_task("blocks", total=reader.config.num_hidden_layers, kind="count", start=False)
        on_block = _block_printer(progress, blocks, reader.config.num_hidden_layers)
        result = quantize(
            reader,
            chosen,
            output,
            data=data,
            resume=resume,
            stored_as=layout_on_disk,
            progress=RunProgress(lambda count: progress.advance(hashing, count), on_block),
        )
    if not ranks.current().is_first:
        return
    if result.was_complete:
        out.print(f"{result.output}: already complete", soft_wrap=True, markup=False)
        return
    ratio = result.bytes_after / result.bytes_before
    out.print(
        f"{result.output}: {size(result.bytes_before)} -> {size(result.bytes_after)} ({ratio:.0%}), "
        f"{time.monotonic() - started:.0f} s, peak memory {peak_memory()}"
    )
    print_layers(inspection(output))


def _block_printer(progress: Progress, task: Any, total: int) -> Callable[[BlockReport], None]:
    """Prints one line for each finished block and moves the bar."""
    previous = time.monotonic()

    def on_block(report: BlockReport) -> None:
        nonlocal previous
        progress.start_task(task)
        seconds, previous = time.monotonic() - previous, time.monotonic()
        parts = [f"block {report.index + 1:>{len(str(total))}}/{total}"]
        if report.output_error is not None:
            parts.append(f"output error {report.output_error:.4f}")
        if report.weight_error:
            parts.append(f"weight error {max(report.weight_error.values()):.4f}")
        progress.console.print("  ".join([*parts, f"{seconds:.1f} s", peak_memory()]))
        for site, note in report.notes.items():
            progress.console.print(f"  {site}: {note}")
        progress.advance(task)

    return on_block


def _print_plan(plan: Estimate, recipe: Recipe, data: TokenData | None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("layers", "blocks", "scheme", "bits per weight"):
        table.add_column(heading)
    for names, blocks, kind, bits in plan.groups:
        table.add_row(names, blocks, kind, f"{bits:.2f}")
    if recipe.kv_cache is not None:
        table.add_row("keys, values", "all", "int8 cache", "")
    out.print(table)
    if data is not None:
        out.print(
            f"calibration: {len(data.sequences)} texts, {data.tokens} tokens ({data.truncated} cut to "
            f"{recipe.calibration.max_length})",
            soft_wrap=True,
        )
    out.print(
        f"size: {size(plan.bytes_before)} -> {size(plan.bytes_after)}; peak memory about {size(plan.peak_bytes)}; "
        f"about {plan.seconds / 60:.1f} minutes on this machine",
        soft_wrap=True,
    )
