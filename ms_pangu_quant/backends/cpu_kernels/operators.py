"""The kernels as MindSpore operators, for graph mode with dynamic shapes and for PyNative.

Only the combination of a C++ InferShape, a constant output type and reg_info works in both.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from ms_pangu_quant.backends.cpu_kernels.library import Library

_F32, _I32, _I8 = DataType.F32_Default, DataType.I32_Default, DataType.I8_Default
_U8, _U16 = DataType.U8_Default, DataType.U16_Default
_INPUTS = {  # see the comments above each OPERATOR in the C++ sources
    "PanguW8A8Dynamic": (_F32, _I8, _F32, _F32),
    "PanguW8A8Static": (_F32, _I8, _F32, _F32, _I8, _I32, _F32),
    "PanguW4A8Dynamic": (_F32, _U8, _F32, _F32),
    "PanguW4A8Codes": (_F32, _U8, _F32, _F32, _I8),
    "PanguRMSNorm": (_F32, _F32, _F32),
    "PanguRope": (_F32, _F32, _F32),
    "PanguSwiGLU": (_F32,),
    "PanguAttention": (_F32, _F32, _F32, _F32, _F32, _I32, _I32, _I32, _I32, _F32),
    "PanguEmbedding": (_I32, _U16),
    "PanguHead": (_F32, _U16),
}


def operator(library: Library, name: str) -> ops.Custom:
    """One kernel; every output is float32."""
    registration = CustomRegOp(name)
    for index in range(len(_INPUTS[name])):
        registration = registration.input(index, f"x{index}")
    registration = registration.output(0, "y").dtype_format(*_INPUTS[name], _F32).target("CPU")
    return ops.Custom(
        f"{library.file}:{name}",
        out_shape=None,
        out_dtype=ms.float32,
        func_type="aot",
        reg_info=registration.get_op_info(),
    )
