"""Gradients of a number that a float model gives, from behind a decoder block to in front of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from ms_pangu_quant.backends.differentiable import BACKEND
from ms_pangu_quant.calibration.runner import BLOCK_SIZE, BlockCell, Hidden, float_tensors
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, RoundedBlock
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.batch import blocks_for, dynamic_inputs, packed_inputs
from ms_pangu_quant.network.pangu import build_network
from ms_pangu_quant.network.versions import release_graphs
from ms_pangu_quant.recipe.plan import BlockPlan, Plan

LONGEST = 512  # tokens of a sequence: attention has all its scores at once


class _Pullback(nn.Cell):
    """(hidden states, gradients behind the block [count, tokens, hidden], ...) -> a tuple of those in front of it.

    All of them are of one pass through the block.
    """

    def __init__(self, block: BlockCell, count: int) -> None:
        super().__init__(auto_prefix=False)  # parameters keep the names the network loads them by
        self.block, self.count = block, count
        self.gradient = ops.GradOperation()

    def along(self, hidden, direction, *others):
        """Its gradient is the vector-Jacobian product; GradOperation's own takes no `sens` of a dynamic shape."""
        return (self.block(hidden, hidden, *others)[-1] * direction).sum()

    def construct(self, hidden, behind, *others):
        found = ()
        for index in range(self.count):
            found += (self.gradient(self.along)(hidden, behind[index], *others),)
        return found


class BlockGradients:
    """Of float blocks of one checkpoint; no sequence is longer than LONGEST.

    count  of gradients that go back together and share a pass through the block; more take longer to compile.

    Left as a context it gives the memory of its network back, as BlockRunner does.
    """

    def __init__(self, config: ModelConfig, count: int) -> None:
        self._config, self._count = config, count
        self._inputs = len(layout.INPUT_NAMES)

    def __enter__(self) -> BlockGradients:
        return self

    def __exit__(self, *_: object) -> None:
        if "_cell" in vars(self):
            release_graphs(self._cell)
            del self._cell
        if "_network" in vars(self):
            self._network.release()
            del self._network

    @cached_property
    def _network(self) -> Any:
        plan = Plan((BlockPlan(),))
        config = replace(self._config, online_hadamard=False)  # BlockCell multiplies by the matrix
        return build_network(config, plan, num_blocks=1, block_size=BLOCK_SIZE, whole=False, backend=BACKEND)

    @cached_property
    def _cell(self) -> _Pullback:
        steps = (0, None, False)
        block = BlockCell(self._network, (None,) * self._inputs, steps, self._config.online_hadamard, rounds_cache=False)
        cell = _Pullback(block, self._count)
        cell.set_train(False)
        if runtime.mode() == "graph":
            channels = self._config.num_key_value_heads * self._config.head_dim
            cell.set_inputs(
                Tensor(shape=[None, self._config.hidden_size], dtype=ms.float32),
                Tensor(shape=[self._count, None, self._config.hidden_size], dtype=ms.float32),
                Tensor(shape=[2, self._inputs], dtype=ms.float32),
                Tensor(shape=[4, channels], dtype=ms.float32),
                *dynamic_inputs(BACKEND),
            )
        return cell

    def pull_back(self, block: Block, hidden: Hidden, behind: NDArray[np.float32], before: NDArray[np.float32]) -> None:
        """Write gradients in front of a block into `before`, of those `behind` it, both [n * count, tokens, hidden].

        hidden  in front of the block.
        """
        self._network.load_tensors(float_tensors(RoundedBlock(block)))
        channels = self._config.num_key_value_heads * self._config.head_dim
        grids = Tensor(np.zeros((2, self._inputs), np.float32)), Tensor(np.zeros((4, channels), np.float32))
        for rows, lengths in hidden.batches(LONGEST):
            tables = [[0] * blocks_for(length, BLOCK_SIZE) for length in lengths]  # there is no cache to look up
            inputs = packed_inputs(lengths, [0] * len(lengths), tables, BLOCK_SIZE, BACKEND)
            states = Tensor(np.ascontiguousarray(hidden.states[rows]))
            for first in range(0, len(behind), self._count):
                directions = Tensor(np.ascontiguousarray(behind[first : first + self._count, rows]))
                for place, found in enumerate(self._cell(states, directions, *grids, *inputs.values()), first):
                    before[place, rows] = found.asnumpy()
