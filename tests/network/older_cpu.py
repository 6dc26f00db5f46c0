"""What the CPU of MindSpore 2.7.1 lacks of what MindFormers 1.7.0 calls: the pair below vLLM-MindSpore 0.5.1, for an NPU.

A tensor without a device is an NPU's, bfloat16 has no zeros, and two operators have no kernel. Newer ones are left alone.
To be imported when the frameworks are started.
"""

from functools import partial
from importlib import metadata

import mindspore as ms
import numpy as np
from mindspore import mint, ops


def split(tensor, sizes, dim=0):
    return ops.split(tensor, sizes, dim)


def stay(tensor, to="CPU", blocking=True):
    return tensor


def zeros(size, *, dtype=ms.float32):
    return ms.Tensor(np.zeros(size, np.float32), dtype)


def lend_kernels() -> None:
    """Before a network is built."""
    if metadata.version("mindformers").startswith("1.7."):
        mint.empty, mint.zeros, mint.split = partial(mint.empty, device="CPU"), zeros, split
        ops.function.array_func.split_ext, ops.move_to = split, stay
