"""What the network's parameters hold of a checkpoint, whatever format it lies in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear, RoundedBlock
from ms_pangu_quant.formats import mindformers, packing
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache


class ArraySlice:
    """An array with the interface of safetensors' slices, which MindFormers' weight loaders expect."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.ascontiguousarray(self.array[index])


def runtime_tensors(block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """The tensors of one layer as the CPU backend's linear methods hold them, keys without the layer's name."""
    if linear.scheme.weight.bits == 4:
        return {"weight": packing.pack_offset_along_in(linear.weight.codes), "group_scale": linear.weight.scale}
    stored = mindformers.encode(block, site, linear)
    return {key: value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value for key, value in stored.items()}


def cache_tensor(prefix: str, cache: QuantizedCache) -> tuple[str, ArraySlice]:
    return f"{prefix}self_attn.core_attention.cache_grid", ArraySlice(cache.rows())


def network_tensors(prefix: str, rounded: RoundedBlock) -> Iterator[tuple[str, ArraySlice]]:
    """(name, array) pairs of one block for network.load_tensors."""
    if rounded.cache is not None:
        yield cache_tensor(prefix, rounded.cache)
    for name, value in rounded.kept.items():
        yield prefix + name, ArraySlice(value)
    for site in layout.SITES:
        if site.name in rounded.linears:
            for key, value in runtime_tensors(rounded.floats, site, rounded.linears[site.name]).items():
                yield f"{prefix}{site.name}.{key}", ArraySlice(value)
