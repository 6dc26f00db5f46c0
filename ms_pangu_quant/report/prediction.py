"""What an NPU could take for a model, for the page: roofline.py's figures, which are predictions and say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.report.roofline import PRECISIONS, Device, decode_seconds, load_device, memory_bytes, prefill_seconds

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


def predict(
    model: str, config: ModelConfig, device: str = "atlas_a2", *, prompt: int = PROMPT, context: int = CONTEXT
) -> Prediction:
    """Prefill of prompts of `prompt` tokens, decode after `context`. Raises RequestError if the device is unknown."""
    limits = load_device(device)

    def latencies(
        seconds: Callable[[Device, ModelConfig, str, int, int], float], tokens: int
    ) -> dict[str, tuple[float, ...]]:
        return {name: tuple(1e3 * seconds(limits, config, name, batch, tokens) for batch in BATCHES) for name in PRECISIONS}

    return Prediction(
        model,
        device,
        latencies(prefill_seconds, prompt),
        latencies(decode_seconds, context),
        {name: memory_bytes(config, name, context) / 2**30 for name in PRECISIONS},
    )
