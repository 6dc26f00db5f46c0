"""What differs between devices: the same short list of cells, one file each.

A backend substitutes what has no kernel on its device through MindFormers' own points of extension (layer specs, rope
names, linear methods, a GPTModel subclass) and leaves the rest of MindFormers' network as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.recipe.scheme import Arithmetic


@dataclass(frozen=True)
class Backend:
    """One device's cells.

    norm               RMSNorm cell class.
    mlp                MLP cell class in place of MindFormers', or None.
    core_attention     (num_blocks, block_size, cache) by name -> ModuleSpec or cell class of attention over the paged
                       cache; where `cache`, its scheme, is not None the cell has a parameter cache_grid
                       [4, kv_heads * head_dim].
    rope_name          MindFormers' position_embedding_type.
    gpt_model          GPTModel or a subclass.
    linear_methods     Arithmetic -> LinearMethodBase class; None -> that of float layers, where it is not MindFormers' own.
    hadamard           (size, MindSpore dtype) -> cell that multiplies rows [tokens, size] of that dtype by the Hadamard
                       matrix and online_scale of transforms/hadamard.py, and knows its size.
    dtypes             keyword arguments of MindFormers' model config.
    chunked_prefill    prefill attends to the cache, so a prompt may come in pieces.
    attention_mask     (new tokens of each sequence, cached tokens of each, longest cache in tokens) -> the tensor the
                       attention cell wants.
    new_caches         (layers, num_blocks, block_size, kv_heads, head_dim, cache by name) -> (key_caches,
                       value_caches) to pass in, or None where the attention cells own their cache.
    dynamic_mask       (shape, MindSpore dtype) of attention_mask for graph compilation.
    bfloat16_tables    embedding and head take a bfloat16 table as it is stored.
    layer              makes a decoder layer in place of MindFormers' TransformerLayer, or None.
    integer_kernels    quantized layers are computed in integers, several times as fast as float ones.
    float_method       whether their products may be of bfloat16 -> LinearMethodBase class of float layers through which
                       hundreds of tokens go at a time; or None for MindFormers' own.
    """

    norm: type
    mlp: type | None
    core_attention: Callable[..., Any]
    rope_name: str
    gpt_model: type
    linear_methods: Mapping[Arithmetic | None, type]
    hadamard: Callable[[int, Any], Any]
    dtypes: Mapping[str, str]
    chunked_prefill: bool
    attention_mask: Callable[[Sequence[int], Sequence[int], int], Any]
    new_caches: Callable[..., tuple[Any, Any] | None]
    dynamic_mask: tuple[list[None], Any]
    bfloat16_tables: bool = False
    layer: Callable[..., Any] | None = None
    integer_kernels: bool = False
    float_method: Callable[[bool], type] | None = None


def current_backend() -> Backend:
    """The backend of the device this process was started on; on the CPU, with kernels where there are any."""
    import mindspore as ms

    if ms.get_context("device_target") != "CPU":
        from ms_pangu_quant.backends.ascend import BACKEND
    elif library() is not None:
        from ms_pangu_quant.backends.cpu_fused import BACKEND
    else:
        from ms_pangu_quant.backends.cpu import BACKEND
    return BACKEND
