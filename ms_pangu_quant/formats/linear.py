"""A quantized layer as every format stores it: kind, codes, scales; and what the formats' files have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.quantizers.grid import QuantizedWeight, is_bfloat16

KINDS = ("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
FLOAT = "FLOAT"
FLOATS = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized layer.

    input_scale   the factor x is multiplied by before rounding; None means per-token dynamic.
    input_offset  zero point of a static layer: the code of x is round(x * input_scale) + input_offset, clipped to int8.
                  What pangu-quant rounds has 0; other programs' checkpoints may not.
    """

    kind: str
    weight: QuantizedWeight
    input_scale: float | None = None
    input_offset: int = 0

    @property
    def offset_correction(self) -> NDArray[np.int32]:
        """What the zero point adds to the integer products, [out] int32, to be taken off: input_offset * sum(codes)."""
        sums = self.weight.codes.sum(axis=1, dtype=np.int64)
        return np.asarray(self.input_offset * sums, np.int32)


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: its shape, and the dtypes it may have. The first is the one that is written, but for bfloat16:
    that is written only where no value changes, else the second is."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False

    def nbytes(self, *, bfloat16_values: bool) -> int:
        dtype = self.dtypes[0] if self.dtypes[0] != "bfloat16" or bfloat16_values else self.dtypes[1]
        size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        return size * int(np.prod(self.shape, dtype=np.int64))


def groups_of(config: ModelConfig, site: layout.LinearSite, group_size: int) -> int:
    """Scales per output channel of an int4 weight; group_size 0 is one per channel."""
    return layout.site_shape(config, site)[1] // group_size if group_size else 1


def narrow(scale: NDArray[np.float32]) -> NDArray[Any]:
    """bfloat16 where that changes no value."""
    return scale.astype(ml_dtypes.bfloat16) if is_bfloat16(scale) else scale


def origin(
    stored: NDArray[np.float32], guess: NDArray[np.float32], made: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The float32 values x with made(x) == stored, for a `made` that rounds; `guess` is made's inverse, rounded too.

    A bfloat16 value is preferred, because that is what scales are made as; then the guess, then its neighbours. Where
    nothing fits, the guess.
    """
    found = guess.copy()
    missing = made(guess) != stored
    up, down = np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(0))
    for candidate in (down, up):
        found = np.where(missing & (made(candidate) == stored), candidate, found)
    coarse = guess.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(made(coarse) == stored, coarse, found).astype(np.float32)


def factor_of(divisor: np.float32) -> float:
    """The factor whose reciprocal was stored as `divisor`: a bfloat16 value if one fits, else in float64, so that the
    way back gives the same float32."""
    exact = 1.0 / float(divisor)
    coarse = float(np.float32(exact).astype(ml_dtypes.bfloat16))
    return coarse if np.float32(1.0 / coarse) == divisor else exact


def refuse_online_hadamard(config: ModelConfig, stored_as: str) -> None:
    """Raises RequestError: no reader of these formats multiplies by the matrix that this project does."""
    if config.online_hadamard:
        raise RequestError(
            f"the {stored_as} format: no program that reads it computes the Hadamard matrix in front of down_proj that "
            "rotate.online leaves to it; use --format mindformers, or a recipe without it"
        )


def pangu_config(config: ModelConfig) -> dict[str, Any]:
    """config.json by openPangu's names with every default written out, and without any quantization."""
    dropped = ("auto_map", "attention_bias", "mlp_bias", "quantize", "quantization_config")
    raw = {key: value for key, value in config.raw.items() if key not in dropped}
    raw.update(
        architectures=["PanguEmbeddedForCausalLM"],
        model_type="PanguEmbedded",
        bias=config.attention_bias,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        num_key_value_heads=config.num_key_value_heads,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return raw


def family_config(config: ModelConfig) -> dict[str, Any]:
    """The same, but a Llama stays one: for programs that know both."""
    if config.raw.get("model_type") != "llama":
        return pangu_config(config)
    return {key: value for key, value in config.raw.items() if key not in ("auto_map", "quantize", "quantization_config")}


def describe(
    config: ModelConfig, kinds: Mapping[str, str], keys: Callable[[layout.LinearSite, str], Mapping[str, TensorSpec]]
) -> dict[str, str]:
    """Parameter name -> kind, a layer's weight before its bias (MindFormers takes the first key that contains its name).

    kinds  "model.layers.0.self_attn.q_proj.weight" -> kind;  keys  (site, kind) -> the tensors that are stored for it.
    """
    description = {}
    for index in range(config.num_hidden_layers):
        prefix = layout.block_prefix(index)
        for site in layout.SITES:
            name, kind = f"{prefix}{site.name}", kinds[f"{prefix}{site.name}.weight"]
            stored = ["weight"] if kind == FLOAT else [key for key, spec in keys(site, kind).items() if not spec.optional]
            description.update({f"{name}.{key}": kind for key in stored})
            if layout.has_bias(config, site):
                description[f"{name}.bias"] = FLOAT
        for norm in layout.NORMS:
            description[f"{prefix}{norm}.weight"] = FLOAT
    return {**description, **dict.fromkeys(layout.outer_shapes(config), FLOAT)}
