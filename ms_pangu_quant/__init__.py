"""Post-training quantization of openPangu-Embedded models in MindSpore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ms_pangu_quant.errors import PanguQuantError

if TYPE_CHECKING:
    from ms_pangu_quant.inference.model import load
    from ms_pangu_quant.pipeline import quantize

__all__ = ["PanguQuantError", "load", "quantize"]


def __getattr__(name: str) -> Any:
    """The public functions are imported on first use: MindSpore takes seconds, `--help` should not."""
    if name == "load":
        from ms_pangu_quant.inference.model import load

        return load
    if name == "quantize":
        from ms_pangu_quant.pipeline import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
