"""A Hadamard matrix in front of a linear layer while the network is served, in operators that every device has.

The CPU kernels have one of their own (cpu_fused.py), which agrees with this one up to float32 rounding.

How it works. H is a Kronecker product of small matrices (transforms/hadamard.py), so x H is a matmul
with each of them, each along its own axis of x [tokens, m1, m2, ...]: for 12800 = 100 * 64 * 2 inputs 166 multiplications
for each of them instead of 12800. An axis is turned to the end for its matmul and stays there, so after all of them they
are in their first order again.

What it does not do: cut the inputs over devices. Every output depends on every input, so a tensor-parallel down_proj, which
has a part of them, is refused.
"""

from __future__ import annotations

import numpy as np
from mindformers.parallel_core.inference.tensor_parallel.layers import LinearMethodBase
from mindspore import Tensor, nn, ops

from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.transforms.hadamard import hadamard_factors, online_scale


class Hadamard(nn.Cell):
    """x [tokens, size] times H and online_scale(size), a power of two; in the dtype of x."""

    def __init__(self, size: int, dtype) -> None:
        super().__init__()
        self.size = size
        first, *others = (factor.astype(np.float32) for factor in hadamard_factors(size))
        factors = [first * np.float32(online_scale(size)), *others]
        self.orders = [len(factor) for factor in factors]
        self.factors = [Tensor(factor, dtype) for factor in factors]
        self.multiply, self.transpose = ops.MatMul(), ops.Transpose()

    def construct(self, x):
        for order, factor in zip(self.orders, self.factors):  # noqa: B905 (a compiled graph has no strict)
            turned = self.transpose(x.reshape((-1, order, self.size // order)), (0, 2, 1))
            x = self.multiply(turned.reshape((-1, order)), factor)
        return x.reshape((-1, self.size))


class RotatedInput(LinearMethodBase):
    """Another linear method behind a Hadamard matrix of its input. hadamard: of all the layer's inputs (Backend)."""

    def __init__(self, method: LinearMethodBase, hadamard: nn.Cell) -> None:
        self.method, self.hadamard, self.size = method, hadamard, hadamard.size

    def create_weights(self, layer, input_size_per_partition, *arguments, **keywords):
        if input_size_per_partition != self.size:
            raise BackendError(
                f"an online Hadamard in front of {self.size} inputs, of which one device holds {input_size_per_partition}: "
                "it mixes all of them; serve this checkpoint on one device, or quantize it without rotate.online"
            )
        return self.method.create_weights(layer, input_size_per_partition, *arguments, **keywords)

    def process_weights_after_loading(self, layer) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer, x, weight=None, bias=None):
        return self.method.apply(layer, self.hadamard(x.reshape((-1, self.size))), weight, bias)
