"""Quantized layers whose inputs are cut over ranks (MindFormers' RowParallelLinear): those that write the stream.

A token's scale comes from its largest input, which one rank has. So the CPU's linear methods take the largest over all
ranks, add up the integer sums (exactly, while they are below 2^24 and float32 holds them) and scale them once: a layer on
many ranks gives the bits of the layer on one. Sums over int4 groups are floats when ranks meet, and agree up to rounding.

MindFormers' own linear methods, which Ascend keeps, scale each rank's part of a token by itself.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindformers.parallel_core.inference.tensor_parallel.layers import RowParallelLinear
from mindspore import Parameter, nn, ops


def ranks_of(layer: Any) -> int:
    """Ranks that each have a part of the layer's inputs."""
    return layer.tp_group.size if isinstance(layer, RowParallelLinear) else 1


def let_ranks_meet(network: nn.Cell) -> None:
    """Give the layers of a network that has been built, and whose linear methods can use it, a meeting of their own."""
    for _, layer in network.cells_and_names():
        if ranks_of(layer) > 1 and hasattr(layer.quant_method, "meeting"):
            layer.quant_method.meeting = Meeting(layer)


class Meeting:
    """Where the ranks of a layer meet; of a layer that has all its inputs, nothing happens."""

    def __init__(self, layer: Any = None) -> None:
        self.size = ranks_of(layer)
        if self.size > 1:
            layer.delay_allreduce = True  # MindFormers would add up what has been scaled
            self.gather, self.reduce = (kind(group=layer.tp_group.group) for kind in (ops.AllGather, ops.AllReduce))

    def largest(self, absmax):
        """Of each token [tokens, 1], over all ranks."""
        if self.size == 1:
            return absmax
        return self.gather(absmax).reshape((self.size, -1, 1)).max(0)

    def total(self, partial):
        return partial if self.size == 1 else self.reduce(partial)

    def bias(self, layer, bias):
        """MindFormers gives the bias to one rank, for the sum; here it is added after it."""
        return bias if self.size == 1 else layer.bias


def set_cache_loaders(network: nn.Cell) -> None:
    """Let the grids of int8 caches be loaded: stored for all key heads, of which each rank takes its own.

    More ranks than key heads have copies of them, as MindFormers gives them those heads' weights.
    """
    for _, attention in network.cells_and_names():
        grid = getattr(getattr(attention, "core_attention", None), "cache_grid", None)
        if isinstance(grid, Parameter):
            grid.weight_loader = _cache_loader(attention.tp, attention.hidden_size_per_attention_head)


def _cache_loader(group: Any, head_dim: int) -> Any:
    def load(parameter: Parameter, stored: Any) -> None:
        mine, heads = parameter.shape[1], stored.get_shape()[1] // head_dim
        start = group.rank * heads // group.size * head_dim
        parameter.init_data()
        parameter.set_data(ms.from_numpy(np.ascontiguousarray(stored[:, start : start + mine])))

    return load


def set_column_loader(layer: Any, parameter: Parameter) -> None:
    """Let [out, columns] be loaded that has several inputs in a column, or one column for all of them.

    MindFormers' own loader of a layer that is cut along its inputs counts a column for each.
    """
    if not isinstance(layer, RowParallelLinear):
        return

    def load(parameter: Parameter, stored: Any) -> None:
        (outputs, width), columns = parameter.shape, stored.get_shape()[1]
        if stored.get_shape()[0] != outputs or columns not in (width, width * layer.tp_group.size):
            raise ValueError(f"{parameter.name}: got {stored.get_shape()}, one rank holds {[outputs, width]}")
        start = layer.tp_group.rank * width if columns != width else 0
        parameter.init_data()
        parameter.set_data(ms.from_numpy(np.ascontiguousarray(stored[:, start : start + width])))

    parameter.weight_loader = load
