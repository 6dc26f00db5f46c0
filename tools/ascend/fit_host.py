"""What the host adds to a decode step, fitted to what others measured; predicted beside measured, as Markdown tables.

The rows, with their source, are below `measured` in a device's file; so are the two constants that the last of the forms
here gives, host_ms and layer_launch_ms. Nothing else is fitted to them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.report.roofline import Device, decode_seconds, load_device
from tools.dev.make_checkpoint import make_config

DEVICE = Path(__file__).parents[2] / "configs" / "devices" / "ascend_910b2.yaml"
_HOST = np.arange(0.0, 30.0, 0.05)[:, None, None]  # milliseconds a step; the measured ranges are 1 wide
_LAUNCH = np.arange(0.0, 1.0, 0.005)[None, :, None]  # milliseconds a layer

# name, number of constants, step in ms from (host, launch, layers, device's ms)
FORMS: tuple[tuple[str, int, Callable[..., np.ndarray]], ...] = (
    ("max(host, device)", 1, lambda host, launch, layers, device: np.maximum(host, device)),
    ("host + device", 1, lambda host, launch, layers, device: host + device),
    ("launch * layers + device", 1, lambda host, launch, layers, device: launch * layers + device),
    ("host + launch * layers + device", 2, lambda host, launch, layers, device: host + launch * layers + device),
    (
        "host + max(launch * layers, device)",
        2,
        lambda host, launch, layers, device: host + np.maximum(launch * layers, device),
    ),
)


@dataclass(frozen=True)
class Row:
    """milliseconds: the two ends as published. device: what the device alone is predicted to take, milliseconds."""

    model: str
    precision: str
    layers: int
    milliseconds: tuple[float, float]
    device: float

    @property
    def middle(self) -> float:
        return sum(self.milliseconds) / 2


@dataclass(frozen=True)
class Fit:
    """host: milliseconds a step; launch: milliseconds a layer; residuals: predicted less measured, milliseconds."""

    form: str
    constants: int
    host: float
    launch: float
    residuals: tuple[float, ...]

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.residuals))))


def read_rows(path: Path, device: Device) -> tuple[Row, ...]:
    """The rows of a device's file."""
    measured = yaml.safe_load(path.read_text(encoding="utf-8"))["measured"]
    alone = dataclasses.replace(device, host_ms=0.0, layer_launch_ms=0.0)
    rows = []
    for row in measured["rows"]:
        config = ModelConfig.from_dict(make_config(row["model"]), where=row["model"])
        milliseconds = 1e3 * decode_seconds(alone, config, row["precision"], 1, measured["context"])
        low, high = row["milliseconds"]
        rows.append(Row(row["model"], row["precision"], config.num_hidden_layers, (low, high), milliseconds))
    return tuple(rows)


def fit(rows: Sequence[Row]) -> tuple[Fit, ...]:
    """Each form's least squares; where constants do not matter, or several are as good, the smallest."""
    layers, device, measured = (
        np.array([getattr(row, name) for row in rows], dtype=float) for name in ("layers", "device", "middle")
    )
    fits = []
    for name, constants, step in FORMS:
        errors = np.square(step(_HOST, _LAUNCH, layers, device) - measured).sum(axis=-1)
        errors = np.broadcast_to(errors, (_HOST.size, _LAUNCH.size))
        at = np.unravel_index(np.argmin(errors), errors.shape)
        host, launch = float(_HOST.ravel()[at[0]]), float(_LAUNCH.ravel()[at[1]])
        residuals = step(host, launch, layers, device) - measured
        fits.append(Fit(name, constants, host, launch, tuple(float(value) for value in residuals)))
    return tuple(fits)


def main() -> int:
    Parser(description=__doc__, example="python tools/ascend/fit_host.py").parse_args()
    try:
        device = load_device(str(DEVICE))
    except PanguQuantError as error:
        print(f"ascend/fit_host: error: {error}", file=sys.stderr)
        return 2
    rows = read_rows(DEVICE, device)
    fits = fit(rows)
    print("| a step takes | constants | host, ms | launch, ms a layer | residuals, ms | RMS |\n|---|---|---|---|---|---|")
    for found in fits:
        residuals = ", ".join(f"{value:+.1f}" for value in found.residuals)
        host = f"{found.host:.1f}" if "host" in found.form else "-"
        launch = f"{found.launch:.3f}" if "launch" in found.form else "-"
        print(f"| {found.form} | {found.constants} | {host} | {launch} | {residuals} | {found.rms:.2f} |")
    print("\n| model | precision | measured, ms | predicted | of it the device |\n|---|---|---|---|---|")
    for row in rows:
        step = device.host_ms + max(device.layer_launch_ms * row.layers, row.device)
        low, high = row.milliseconds
        print(f"| {row.model.upper()} | {row.precision} | {low:.1f} to {high:.1f} | {step:.1f} | {row.device:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
