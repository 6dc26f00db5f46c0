"""The scales of an int8 key/value cache on disk, the same four tensors in every format that can hold them.

  self_attn.k_proj.kv_cache_scale, .kv_cache_offset   [kv_heads * head_dim], of keys after rope
  self_attn.v_proj.kv_cache_scale, .kv_cache_offset   [kv_heads * head_dim]

A number is (code - offset) * scale. msModelSlim names them so, in MindIE's and vllm-ascend's contract "C8": the description
says "C8" of each, and "kv_cache_type": "C8" of the whole. Scales and offsets are bfloat16 tensors where no value changes.

Source  msModelSlim 26.1, format ascendv1 (on_dynamic_cache); MindIE LLM, "KV Cache int8"; vllm-ascend, quantization/
        modelslim_config.py and methods/kv_c8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.errors import CheckpointError, located
from ms_pangu_quant.formats.linear import FLOATS, TensorSpec, narrow
from ms_pangu_quant.formats.words import INT8_CACHE_WORD
from ms_pangu_quant.quantizers.kv_cache import CODE_MAX, CODE_MIN, CacheGrid, QuantizedCache
from ms_pangu_quant.recipe.scheme import INT8_CACHE, TensorScheme

TYPE_KEY = "kv_cache_type"
_SCALE, _OFFSET = "kv_cache_scale", "kv_cache_offset"


def encode(cache: QuantizedCache) -> dict[str, NDArray[Any]]:
    """Tensors to store, keys without the block's prefix."""
    tensors: dict[str, NDArray[Any]] = {}
    for site, grid in zip(layout.CACHED, (cache.key, cache.value), strict=True):
        tensors[f"{site.name}.{_SCALE}"] = narrow(grid.scale.reshape(-1))
        tensors[f"{site.name}.{_OFFSET}"] = narrow(grid.offset.reshape(-1).astype(np.float32))
    return tensors


def decode(config: ModelConfig, tensors: Mapping[str, NDArray[Any]]) -> QuantizedCache:
    """Inverse of encode. Raises CheckpointError for a scale or an offset that no int8 grid has."""
    return QuantizedCache(*(_grid(config, site.name, tensors) for site in layout.CACHED))


def _grid(config: ModelConfig, site: str, tensors: Mapping[str, NDArray[Any]]) -> CacheGrid:
    shape = (config.num_key_value_heads, config.head_dim)
    scale, offset = (tensors[f"{site}.{key}"].astype(np.float32).reshape(shape) for key in (_SCALE, _OFFSET))
    bad = int((~(np.isfinite(scale) & (scale > 0))).sum())
    if bad:
        raise CheckpointError(f"{site}.{_SCALE}: {bad} of {scale.size} scales are not positive finite numbers")
    bad = int((~((offset == np.rint(offset)) & (offset >= CODE_MIN) & (offset <= CODE_MAX))).sum())
    if bad:
        raise CheckpointError(
            f"{site}.{_OFFSET}: {bad} of {offset.size} offsets are not whole numbers from {CODE_MIN} to {CODE_MAX}"
        )
    return CacheGrid(scale, offset.astype(np.int8))


def specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Full names of what encode gives for all blocks."""
    spec = TensorSpec((config.num_key_value_heads * config.head_dim,), FLOATS)
    return {name: spec for index in range(config.num_hidden_layers) for name in names(index)}


def names(index: int) -> list[str]:
    """Of one block's tensors, in full."""
    return [f"{layout.block_prefix(index)}{site.name}.{key}" for site in layout.CACHED for key in (_SCALE, _OFFSET)]


def is_cache_tensor(name: str) -> bool:
    """Whether a tensor of this name holds scales or offsets of a cache."""
    return name.endswith((f".{_SCALE}", f".{_OFFSET}"))


def read_scheme(word: Any, where: str) -> TensorScheme | None:
    """What a directory says of its cache. Raises CheckpointError for a kind that is not read here."""
    if word not in (None, INT8_CACHE_WORD):
        raise CheckpointError(f"{where} is {word!r}, wanted {INT8_CACHE_WORD!r} (int8) or nothing")
    return None if word is None else INT8_CACHE


def read_cache(files: TensorFiles, config: ModelConfig, index: int) -> QuantizedCache:
    """One block's grids. Raises CheckpointError naming the tensor."""
    prefix = layout.block_prefix(index)
    found = {name.removeprefix(prefix): files.entries[name].read() for name in names(index)}
    with located(prefix):
        return decode(config, found)


def bytes_per_token(config: ModelConfig, bytes_per_number: int) -> int:
    """What one token takes in the caches of all blocks."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number
