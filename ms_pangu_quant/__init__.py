"""Post-training quantization of openPangu-Embedded models in MindSpore.

quantize  a float checkpoint into a directory in W8A8 or W4A8
calibrate text for that, by the model itself: its own answers to prompts
evaluate  a checkpoint on benchmarks in its thinking modes: answers, verdicts, scores
compare   how far two checkpoints' next-token distributions are apart
observe   the weights of a block and what enters its layers, after any transforms
load      a checkpoint to compute logits and generate text with
Endpoint  a server that evaluate() asks instead of loading the checkpoint
Progress  what quantize() calls while it is under way
ASSETS    folder of the embedded checkpoint, openpangu-mini, and its data
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms_pangu_quant.errors import PanguQuantError

if TYPE_CHECKING:
    from ms_pangu_quant.api import (
        CalibrationRequest,
        Endpoint,
        EvaluationRequest,
        Progress,
        calibrate,
        compare,
        evaluate,
        observe,
        quantize,
    )
    from ms_pangu_quant.inference.model import load

ASSETS = Path(__file__).parent / "assets"

__all__ = [
    "ASSETS",
    "CalibrationRequest",
    "Endpoint",
    "EvaluationRequest",
    "PanguQuantError",
    "Progress",
    "calibrate",
    "compare",
    "evaluate",
    "load",
    "observe",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """The public functions are imported on first use: MindSpore takes seconds, `--help` should not."""
    if name == "load":
        from ms_pangu_quant.inference.model import load

        return load
    if name in __all__:
        from ms_pangu_quant import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
