"""pangu-quant sensitivity"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ms_pangu_quant import api
from ms_pangu_quant.cli.console import AllowBenchmarkOverlap, AsJson, Checkpoint, Verbose, out, progress_bars, size
from ms_pangu_quant.cli.quantize import Shown
from ms_pangu_quant.mixed.sensitivity import DEFAULT_TOKENS, Sensitivity
from ms_pangu_quant.pipeline.estimate import SensitivityCost
from ms_pangu_quant.report.sensitivity_plot import group_name


def sensitivity_command(
    checkpoint: Checkpoint,
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe whose transforms and rounding are used: with a budget, or with a scheme to compare to w8a8.",
            show_default=False,
        ),
    ],
    calibration: Annotated[Path, typer.Option(help="Calibration data, as for quantize.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file to write; a plot (.svg) beside it.", show_default=False)
    ],
    tokens: Annotated[
        int, typer.Option(help="Measure KL on so many tokens of the calibration data.", min=2)
    ] = DEFAULT_TOKENS,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it takes: time and disk. Writes nothing.")] = False,
    allow_benchmark_overlap: AllowBenchmarkOverlap = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Rank groups of layers by the output error and the KL that each causes when it alone is quantized.

    Each block is rounded in both schemes, and run with each of its 4 groups alone rounded; gradients of the model turn
    what that changes into a KL. It takes about as long as quantizing twice (--dry-run tells). Statistics are taken from the
    texts of the calibration data that KL is not measured on. A killed run goes on with --resume.

    Example:
        pangu-quant sensitivity openPangu-Embedded-7B --recipe w4a8_mixed \\
            --calibration chats.jsonl --output sensitivity.json
    """
    asked: dict[str, Any] = {"tokens": tokens, "allow_benchmark_overlap": allow_benchmark_overlap}
    if dry_run:
        _print_cost(api.sensitivity_cost(checkpoint, recipe, calibration, **asked))
        return
    with progress_bars() as bars:
        found = api.sensitivity(
            checkpoint, recipe, calibration, output, resume=resume, progress=Shown(bars).progress, **asked
        )
    if as_json:
        print(output.read_text(encoding="utf-8"))
        return
    print_ranking(found)
    out.print(f"{output}, {output.with_suffix('.svg')}", soft_wrap=True)


def print_ranking(found: Sensitivity, shown: int = 12) -> None:
    cheap, dear = found.schemes
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "block", "layers", "KL alone", "+-", f"output error {cheap}", dear):
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    ranked = sorted(found.groups, key=lambda group: -group.kl)
    for place, group in enumerate(ranked[:shown], 1):
        errors = (f"{group.output_error[name]:.5f}" for name in found.schemes)
        table.add_row(
            str(place),
            str(group.block),
            group_name(group.group),
            f"{group.kl:.3g}",
            "-" if group.kl_se is None else f"{group.kl_se:.1g}",
            *errors,
        )
    out.print(table)
    rest = f"; {len(ranked) - shown} more in the file" if len(ranked) > shown else ""
    total = sum(group.kl for group in found.groups)
    out.print(
        f"all layers: KL {found.together[cheap]:.3g} in {cheap} (the sum of each alone is {total:.3g}), "
        f"{found.together[dear]:.3g} in {dear}{rest}",
        soft_wrap=True,
    )


def _print_cost(cost: SensitivityCost) -> None:
    out.print(
        f"statistics of {cost.statistics} tokens, KL on {cost.measured} others: about {cost.seconds / 60:.1f} minutes on "
        f"this machine, up to {size(cost.disk)} of disk beside the output",
        soft_wrap=True,
    )
