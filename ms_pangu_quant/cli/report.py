"""pangu-quant report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.cli.console import out
from ms_pangu_quant.report.results import load_runs
from ms_pangu_quant.report.speed import load_speeds


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
    from ms_pangu_quant.mixed.sensitivity import Sensitivity
    from ms_pangu_quant.report.page import write
    from ms_pangu_quant.report.prediction import predict as predict_speed

    found = None if sensitivity is None else Sensitivity.load(sensitivity)
    runs, speeds = load_runs(results, name), load_speeds(bench or [])
    predicted = None
    if predict is not None:
        predicted = predict_speed(predict.resolve().name, ModelConfig.from_file(predict / "config.json"), device)
    for path in write(
        runs,
        output,
        speeds=speeds,
        sensitivity=found,
        prediction=predicted,
        wanted=retention,
        title=title,
        examples=examples,
    ):
        out.print(f"{path}", soft_wrap=True)
