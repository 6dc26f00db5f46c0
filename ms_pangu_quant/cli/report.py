"""pangu-quant report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_pangu_quant.api import ReportRequest
from ms_pangu_quant.api import report as write_report
from ms_pangu_quant.cli.console import out


def report_command(
    results: Annotated[
        list[Path], typer.Argument(help="Output directories of evaluate; the first is the reference.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for report.html and report.md.")] = Path(
        "report"
    ),
    name: Annotated[
        list[str] | None, typer.Option(help="What to call each result, in their order; the directories' names by default.")
    ] = None,
    bench: Annotated[
        list[str] | None, typer.Option(help="FILE or NAME=FILE that bench --json printed; may be given several times.")
    ] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="FILE that the command sensitivity wrote.")] = None,
    predict: Annotated[
        Path | None, typer.Option(help="Checkpoint whose shape's speed on a device is predicted from its limits.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of --predict: a name or a file as in configs/devices.")] = "atlas_a2",
    retention: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the reference's pass@1 to test for.")] = 0.9,
    examples: Annotated[int, typer.Option(min=0, help="Problems whose answers are shown side by side.")] = 6,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "What quantization costs",
) -> None:
    """One page on what quantization costs: accuracy, retention, flips, lengths, answers, speed; HTML and Markdown.

    Example:
        pangu-quant report results/float results/w8a8 results/w4a8 \\
            --output report --bench w8a8=w8a8.bench.json
    """
    request = ReportRequest(
        results, name, bench or [], sensitivity, predict, device, retention=retention, examples=examples, title=title
    )
    for path in write_report(request, output):
        out.print(f"{path}", soft_wrap=True)
