"""What an NPU could take for a model, for the page: roofline.py's figures, which are predictions and say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.roofline import PRECISIONS, decode_seconds, load_device, memory_bytes, prefill_seconds

BATCHES = (1, 2, 4, 8, 16, 32)
PROMPT, CONTEXT = 512, 2048  # tokens


@dataclass(frozen=True)
class Prediction:
    """prefill, decode: precision -> milliseconds for each of BATCHES. memory: precision -> GiB of weights and cache."""

    model: str
    device: str
    prefill: Mapping[str, tuple[float, ...]]
    decode: Mapping[str, tuple[float, ...]]
    memory: Mapping[str, float]


def predict(checkpoint: Path, device: str = "atlas_a2") -> Prediction:
    """For the shape that the checkpoint's config.json says. Raises PanguQuantError if that or the device is unknown."""
    config, limits = ModelConfig.from_file(checkpoint / "config.json"), load_device(device)

    def each(seconds: Mapping[tuple[str, int], float]) -> dict[str, tuple[float, ...]]:
        return {name: tuple(1e3 * seconds[name, batch] for batch in BATCHES) for name in PRECISIONS}

    cases = [(name, batch) for name in PRECISIONS for batch in BATCHES]
    return Prediction(
        checkpoint.resolve().name,
        device,
        each({(name, batch): prefill_seconds(limits, config, name, batch, PROMPT) for name, batch in cases}),
        each({(name, batch): decode_seconds(limits, config, name, batch, CONTEXT) for name, batch in cases}),
        {name: memory_bytes(config, name, CONTEXT) / 2**30 for name in PRECISIONS},
    )
