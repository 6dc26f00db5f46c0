"""What the formats' files have in common: specs of tensors, scales that come back exactly, config.json, descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import TensorEntry
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats.words import FLOAT, scheme_of, word_of
from ms_pangu_quant.quantizers.grid import is_bfloat16
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import QuantScheme, TensorScheme

FLOATS = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: its shape, and the dtypes it may have. The first is the one that is written, but for bfloat16:
    that is written only where no value changes, else the second is."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{' or '.join(dict.fromkeys(self.dtypes))} {list(self.shape)}"

    def fits(self, entry: TensorEntry | None) -> bool:
        """Whether what is stored is so; None: nothing is."""
        if entry is None:
            return self.optional
        return entry.shape == self.shape and entry.dtype.name in self.dtypes

    def nbytes(self, *, bfloat16_values: bool) -> int:
        dtype = self.dtypes[0] if self.dtypes[0] != "bfloat16" or bfloat16_values else self.dtypes[1]
        size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        return size * int(np.prod(self.shape, dtype=np.int64))


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
    """config.json by openPangu's names with every default written out, and without any quantization.

    openPangu's o_proj has a bias where q, k and v have them; `output_bias` is said where it is otherwise. auto_map names an
    openPangu's own code, which is carried over.
    """
    dropped = ["attention_bias", "mlp_bias", "output_bias", "quantize", "quantization_config"]
    if config.raw.get("model_type") != "PanguEmbedded":
        dropped.append("auto_map")
    bias, output_bias = layout.Q_PROJ in config.biased, layout.O_PROJ in config.biased
    raw = {key: value for key, value in config.raw.items() if key not in dropped}
    raw.update(
        architectures=["PanguEmbeddedForCausalLM"],
        model_type="PanguEmbedded",
        bias=bias,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        num_key_value_heads=config.num_key_value_heads,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    if output_bias != bias:
        raw["output_bias"] = output_bias
    return raw


def family_config(config: ModelConfig) -> dict[str, Any]:
    """The same, but what is not an openPangu stays what it is: for programs that know both."""
    if config.raw.get("model_type") == "PanguEmbedded":
        return pangu_config(config)
    return {key: value for key, value in config.raw.items() if key not in ("auto_map", "quantize", "quantization_config")}


def describe(
    config: ModelConfig,
    plan: Plan,
    specs: Callable[[ModelConfig, layout.LinearSite, QuantScheme], Mapping[str, TensorSpec]],
) -> dict[str, str]:
    """Parameter name -> word, a layer's weight before its bias (MindFormers takes the first key that contains its name).

    specs  the format's.
    """
    description = {}
    for index, block in enumerate(plan.blocks):
        prefix = layout.block_prefix(index)
        for site in layout.SITES:
            name, scheme = f"{prefix}{site.name}", block.scheme(site)
            stored = {} if scheme is None else specs(config, site, scheme)
            keys = ["weight"] if scheme is None else [key for key, spec in stored.items() if not spec.optional]
            description.update({f"{name}.{key}": word_of(scheme) for key in keys})
            if site in config.biased:
                description[f"{name}.bias"] = FLOAT
        for norm in layout.NORMS:
            description[f"{prefix}{norm}.weight"] = FLOAT
    return {**description, **dict.fromkeys(layout.outer_shapes(config), FLOAT)}


def read_description(
    config: ModelConfig, description: Mapping[str, Any], group_size: int, cache: TensorScheme | None, where: Path
) -> Plan:
    """The inverse of describe. Raises CheckpointError for a word that says nothing."""
    schemes = {
        name: scheme_of(description.get(f"{name}.weight"), group_size, f"{where}: {name}.weight")
        for name in layout.layer_names(config)
    }
    return Plan.of_layers(schemes, config.num_hidden_layers, cache)


def read_group_size(settings: Mapping[str, Any], where: str) -> int:
    """`where` is what errors call it. Raises CheckpointError for what is no number of inputs."""
    size = settings.get("group_size", 0)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size % 2:
        raise CheckpointError(f"{where} is {size!r}, wanted an even whole number; 0 is one scale per output channel")
    return size
