"""From a checkpoint's files to the network's parameters without a float copy in between.

Where the backend can use them so, a bfloat16 embedding and head keep their dtype, and an int4 weight in MindFormers' layout
goes to the network's in one pass over its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.backends import Backend
from ms_pangu_quant.backends.cpu_kernels.library import Library, library
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import TensorEntry
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.formats import mindformers
from ms_pangu_quant.formats.linear import FLOAT
from ms_pangu_quant.formats.parameters import ArraySlice, cache_tensor, network_tensors
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.network import runtime


def served_tensors(
    reader: CheckpointReader | QuantizedReader, backend: Backend, *, int8_cache: bool = False
) -> Iterator[tuple[str, ArraySlice]]:
    """Every tensor the network of `backend` wants, a block in memory at a time.

    int8_cache  the network has one, so the grids that the directory has are among them.
    """
    tied = reader.config.tie_word_embeddings
    for name in layout.outer_shapes(reader.config):
        entry = reader.files.entries[name]
        if backend.bfloat16_tables and name != layout.FINAL_NORM and entry.dtype == ml_dtypes.bfloat16:
            # A few rows of an embedding are used at a time, and a rank's rows of a head: mapped, only those are in memory.
            mapped = runtime.tensor_parallel() > 1 or (name == layout.EMBEDDING and not tied)
            mapped = mapped and type(entry) is TensorEntry  # not one made of slices
            yield name, ArraySlice(_map(entry) if mapped else entry.read())
        else:
            yield name, ArraySlice(reader.files.read_float32(name))
    kernels = library() if backend.bfloat16_tables else None
    for index in range(reader.config.num_hidden_layers):
        cache = reader.cache(index) if int8_cache and isinstance(reader, QuantizedReader) else None
        if cache is not None:
            yield cache_tensor(layout.block_prefix(index), cache)
        if not isinstance(reader, QuantizedReader):
            yield from network_tensors(layout.block_prefix(index), reader.block(index), {})
        elif kernels is not None and reader.format is mindformers and _kinds(reader, index) <= {FLOAT, "W4A8_DYNAMIC"}:
            yield from _int4_block(reader, index, kernels)
        else:
            yield from network_tensors(layout.block_prefix(index), *reader.block(index))


def _kinds(reader: QuantizedReader, index: int) -> set[str]:
    return {reader.kinds[f"{layout.block_prefix(index)}{site.name}.weight"] for site in layout.SITES}


def _int4_block(reader: QuantizedReader, index: int, kernels: Library) -> Iterator[tuple[str, ArraySlice]]:
    """What network_tensors gives for a block whose layers are int4 or float."""
    prefix = layout.block_prefix(index)
    packed = {site.name for site in layout.SITES if reader.kinds[f"{prefix}{site.name}.weight"] != FLOAT}
    for name in layout.block_shapes(reader.config):
        if name.removesuffix(".weight") not in packed:
            yield prefix + name, ArraySlice(reader.files.read_float32(prefix + name))
    for site in packed:
        stored = reader.files.entries[f"{prefix}{site}.weight"].read()
        inputs, outputs = stored.shape[0], 2 * stored.shape[1]
        weight = np.empty((outputs, inputs // 2), np.uint8)
        kernels.functions.pangu_transpose_w4(stored.ctypes.data, weight.ctypes.data, outputs, inputs)
        yield f"{prefix}{site}.weight", ArraySlice(weight)
        scale = reader.files.read_float32(f"{prefix}{site}.weight_scale")
        yield f"{prefix}{site}.group_scale", ArraySlice(np.ascontiguousarray(scale.T))


def _map(entry: TensorEntry) -> NDArray[Any]:
    bits = np.memmap(entry.file, np.uint16, "r", entry.offset, entry.shape)
    return bits.view(ml_dtypes.bfloat16)
