"""From a checkpoint's files to the network's parameters without a float copy in between.

Where the backend can use them so, a bfloat16 embedding and head keep their dtype, and an int4 weight in MindFormers' layout
goes to the network's in one pass over its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np

from ms_pangu_quant.backends import Backend
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import TensorEntry
from ms_pangu_quant.formats import kv_cache, mindformers
from ms_pangu_quant.formats.parameters import ArraySlice, cache_tensor, network_tensors
from ms_pangu_quant.formats.reader import Reader
from ms_pangu_quant.kernels.library import Library, library
from ms_pangu_quant.network import runtime
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.scheme import TensorScheme


def served_tensors(
    reader: Reader, backend: Backend, *, cache: TensorScheme | None = None
) -> Iterator[tuple[str, ArraySlice]]:
    """Every tensor the network of `backend` wants, a block in memory at a time.

    cache  the network's; without it the grids that the directory has are left out.
    """
    tied = reader.config.tie_word_embeddings
    for name in layout.outer_shapes(reader.config):
        entry = reader.files.entries[name]
        if backend.bfloat16_tables and name != layout.FINAL_NORM and entry.dtype == ml_dtypes.bfloat16:
            # A few rows of an embedding are used at a time, and a rank's rows of a head: mapped, only those are in memory.
            mapped = runtime.tensor_parallel() > 1 or (name == layout.EMBEDDING and not tied)
            mapped = mapped and type(entry) is TensorEntry  # not one made of slices
            if mapped:
                bits = np.memmap(entry.file, np.uint16, "r", entry.offset, entry.shape)
            yield name, ArraySlice(bits.view(ml_dtypes.bfloat16) if mapped else entry.read())
        else:
            yield name, ArraySlice(reader.files.read_float32(name))
    kernels = library() if backend.bfloat16_tables else None
    for index, plan in enumerate(reader.plan.blocks):
        if plan.cache is not None and cache is not None:
            yield cache_tensor(layout.block_prefix(index), kv_cache.read_cache(reader.files, reader.config, index))
        int4 = not plan.is_float and all(scheme.weight.bits == 4 for _, scheme in plan.quantized)
        if kernels is not None and reader.format is mindformers and int4:
            yield from _int4_block(reader, plan, index, kernels)
        else:
            yield from network_tensors(layout.block_prefix(index), replace(reader.rounded_block(index), cache=None))


def _int4_block(reader: Reader, plan: BlockPlan, index: int, kernels: Library) -> Iterator[tuple[str, ArraySlice]]:
    """What network_tensors gives for a block whose layers are int4 or float."""
    prefix = layout.block_prefix(index)
    for name in plan.float_shapes(reader.config):
        yield prefix + name, ArraySlice(reader.files.read_float32(prefix + name))
    for site in (each.name for each, _ in plan.quantized):
        stored = reader.files.entries[f"{prefix}{site}.weight"].read()
        inputs, outputs = stored.shape[0], 2 * stored.shape[1]
        weight = np.empty((outputs, inputs // 2), np.uint8)
        kernels.functions.pangu_transpose_w4(stored.ctypes.data, weight.ctypes.data, outputs, inputs)
        yield f"{prefix}{site}.weight", ArraySlice(weight)
        scale = reader.files.read_float32(f"{prefix}{site}.weight_scale")
        yield f"{prefix}{site}.group_scale", ArraySlice(np.ascontiguousarray(scale.T))
