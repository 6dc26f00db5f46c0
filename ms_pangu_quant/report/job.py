"""A report from end to end: files in, two pages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.mixed.sensitivity import Sensitivity
from ms_pangu_quant.report.prediction import predict
from ms_pangu_quant.report.results import load_runs
from ms_pangu_quant.report.speed import load_speeds


@dataclass(frozen=True)
class ReportRequest:
    """What to write a page about, and how.

    results      output directories of evaluate; the first is the reference.
    names        what to call each, in their order; the directories' names by default.
    benches      FILE or NAME=FILE that `pangu-quant bench --json` printed.
    sensitivity  file that `pangu-quant sensitivity` wrote.
    predict      checkpoint whose shape's speed on `device`, a name or a file as in configs/devices, is predicted.
    retention    share of the reference's pass@1 to test for.
    examples     problems whose answers are shown side by side.
    """

    results: Sequence[str | Path]
    names: Sequence[str] | None = None
    benches: Sequence[str] = ()
    sensitivity: str | Path | None = None
    predict: str | Path | None = None
    device: str = "atlas_a2"
    retention: float = 0.9
    examples: int = 6
    title: str = ""


def report(request: ReportRequest, output: str | Path) -> list[Path]:
    """One page on what quantization costs, as report.html and report.md in `output`; returns their paths.

    Raises DataError for what is no result, or cannot be compared; RequestError for an unknown device.
    """
    from ms_pangu_quant.report.page import Report, write

    found = None if request.sensitivity is None else Sensitivity.load(Path(request.sensitivity))
    runs, speeds = load_runs([Path(each) for each in request.results], request.names), load_speeds(request.benches)
    predicted = None
    if request.predict is not None:
        directory = Path(request.predict)
        predicted = predict(directory.resolve().name, ModelConfig.from_file(directory / "config.json"), request.device)
    about = Report(runs, speeds, found, predicted, request.retention, request.title, request.examples)
    return write(about, Path(output))
