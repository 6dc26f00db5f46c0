"""The kernels as MindSpore operators, for graph mode with dynamic shapes and for PyNative.

Only the combination of a C++ InferShape, a constant output type and reg_info works in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from ms_pangu_quant.kernels.library import Library

_F32, _I32, _I8 = DataType.F32_Default, DataType.I32_Default, DataType.I8_Default
_U8, _U16, _I64 = DataType.U8_Default, DataType.U16_Default, DataType.I64_Default
_INPUTS = {  # see the comments above each OPERATOR in the C++ sources
    "PanguW8A8Dynamic": (_F32, _I8, _F32, _F32),
    "PanguW8A8Static": (_F32, _I8, _F32, _F32, _I8, _I32, _F32),
    "PanguW4A8Dynamic": (_F32, _U8, _F32, _F32),
    "PanguW4A8Codes": (_F32, _U8, _F32, _F32, _I8),
    "PanguFloat": (_F32, _F32, _F32),
    "PanguBfloat16": (_F32, _F32, _F32),
    "PanguRMSNorm": (_F32, _F32, _F32),
    "PanguRope": (_F32, _F32, _F32),
    "PanguSwiGLU": (_F32,),
    "PanguHadamard": (_F32, _U8, _F32),
    "PanguEmbedding": (_I32, _U16),
    "PanguHead": (_F32, _U16),
    "PanguStack": (_F32, _F32, _F32, _I32, _I32, _I32, _I32, _I64),
}


_CACHES = (_F32, _I8)  # what key and value cache may hold


def _attention(cache: Any) -> tuple[Any, ...]:
    """Three tensors, the caches, the tables, scale and cache_grid."""
    return (_F32, _F32, _F32, cache, cache, _I32, _I32, _I32, _I32, _F32, _F32)


def operator(library: Library, name: str) -> ops.Custom:
    """One kernel; every output is float32."""
    if name == "PanguAttention":
        return _operator(library, name, [_attention(cache) for cache in _CACHES])
    return _operator(library, name, [_INPUTS[name]])


def block_operator(library: Library) -> ops.Custom:
    """PanguBlock, for each cache and each combination of int8 and packed int4 weights: MindSpore knows one registration of
    a name."""
    rest = (_F32, _F32, _I8, _I32, _F32)
    return _operator(
        library,
        "PanguBlock",
        [
            (*_attention(cache), _F32, _F32, _F32, _U8, _F32, *(dtype for weight in weights for dtype in (weight, *rest)))
            for cache, *weights in product(_CACHES, *[(_I8, _U8)] * 4)
        ],
    )


def _operator(library: Library, name: str, types: Sequence[tuple[Any, ...]]) -> ops.Custom:
    """types: the input dtypes it takes."""
    registration = CustomRegOp(name)
    for index in range(len(types[0])):
        registration = registration.input(index, f"x{index}")
    registration = registration.output(0, "y")
    for inputs in types:
        registration = registration.dtype_format(*inputs, _F32)
    return ops.Custom(
        f"{library.file}:{name}",
        out_shape=None,
        out_dtype=ms.float32,
        func_type="aot",
        reg_info=registration.target("CPU").get_op_info(),
    )
