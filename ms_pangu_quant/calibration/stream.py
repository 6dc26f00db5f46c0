"""Runs one decoder block after another over packed calibration sequences.

One block cell is built and compiled for each combination of linear methods (float, and the quantized ones the plan uses);
weights are swapped from block to block. The cell is MindFormers' own decoder layer with the backend's cells, the same that
serves later: only its order of calls is written out again here, because the inputs of the linear layers must come out.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import Block
from ms_pangu_quant.formats.mindformers import FLOAT, QuantizedLinear, network_tensors
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.batch import blocks_for, packed_inputs
from ms_pangu_quant.network.pangu import build_network

BLOCK_SIZE = 16
_LARGEST_TEMPORARY = 1 << 25        # bytes; MindSpore keeps many at once


@dataclass(frozen=True)
class Hidden:
    """Hidden states of all sequences, packed: states [tokens, hidden] float32, lengths tokens of each sequence."""

    states: NDArray[np.float32]
    lengths: Sequence[int]

    def batches(self, max_tokens: int) -> Iterator[tuple[slice, list[int]]]:
        """(rows, lengths) of consecutive sequences holding at most max_tokens tokens, at least one sequence each."""
        start, chosen = 0, []
        for length in self.lengths:
            if chosen and sum(chosen) + length > max_tokens:
                yield slice(start, start + sum(chosen)), chosen
                start, chosen = start + sum(chosen), []
            chosen.append(length)
        yield slice(start, start + sum(chosen)), chosen


class BlockCell(nn.Cell):
    """Hidden states in, hidden states and the inputs of the linear layers (in layout.INPUT_NAMES' order) out."""

    def __init__(self, network) -> None:
        super().__init__(auto_prefix=False)     # parameters keep the names the network loads them by
        self.rope = network.model.rotary_pos_emb
        self.layer = network.model.decoder.layers[0]
        self.inner = self.layer.mlp.ffn_hidden_size_per_partition

    def construct(self, hidden, positions, batch_valid_length, context_lens_tensor, q_seq_lens, block_tables,
                  slot_mapping, attention_mask):
        attention, mlp = self.layer.self_attention, self.layer.mlp
        cos, sin = self.rope.get_cos_sin_for_decode(positions)
        attention_input = self.layer.input_layernorm(hidden)
        query, key, value = attention.get_query_key_value_tensors(attention_input)
        query, key = attention.rotary_emb(query, key, cos, sin, batch_valid_length)
        attention_output = attention.core_attention(
            query=query, key=key, value=value, slot_mapping=slot_mapping, block_tables=block_tables,
            batch_valid_length=batch_valid_length, context_lens_tensor=context_lens_tensor, q_seq_lens=q_seq_lens,
            attn_mask=attention_mask)
        residual = hidden + attention.linear_proj(attention_output)
        mlp_input = self.layer.pre_mlp_layernorm(residual)
        gate, up = ops.function.array_func.split_ext(mlp.linear_fc1(mlp_input), (self.inner, self.inner), -1)
        mlp_hidden = up * mlp.activation_func(gate)
        output = residual + mlp.linear_fc2(mlp_hidden)
        return output, attention_input, attention_output, mlp_input, mlp_hidden


class BlockRunner:
    """Runs float and quantized blocks of one checkpoint in the mode the process was started in."""

    def __init__(self, config: ModelConfig, group_size: int, lengths: Sequence[int]) -> None:
        self._config, self._group_size = config, group_size
        self._cells: dict[tuple[str, ...] | None, tuple[BlockCell, object]] = {}
        self._max_tokens = self._batch_tokens()
        probe = Hidden(np.empty((0, 0), np.float32), lengths)
        self._blocks = max(sum(blocks_for(length, BLOCK_SIZE) for length in batch)
                           for _, batch in probe.batches(self._max_tokens))

    def observe(self, block: Block, hidden: Hidden, *, gram: bool,
                where: str) -> tuple[dict[str, InputStats], NDArray[np.float32]]:
        """Float outputs [tokens, hidden] of the block and the statistics of its linear layers' inputs."""
        stats: dict[str, InputStats] = {}
        output = np.empty_like(hidden.states)
        for rows, (states, *inputs) in self._run(block, {}, hidden):
            output[rows] = states.asnumpy()
            for name, x in zip(layout.INPUT_NAMES, inputs, strict=True):
                seen = InputStats.observe(x.asnumpy(), gram=gram, where=f"{where}: {name}")
                stats[name] = stats[name].merge(seen) if name in stats else seen
        return stats, output

    def advance(self, block: Block, linears: Mapping[str, QuantizedLinear], hidden: Hidden) -> Hidden:
        """Hidden states after the block as it will be served; linears maps site names to quantized layers."""
        output = np.empty_like(hidden.states)
        for rows, (states, *_) in self._run(block, linears, hidden):
            output[rows] = states.asnumpy()
        return Hidden(output, hidden.lengths)

    def _run(self, block: Block, linears: Mapping[str, QuantizedLinear],
             hidden: Hidden) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        cell, network = self._cell(linears)
        network.load_tensors(network_tensors(layout.block_prefix(0), block, linears))
        for rows, lengths in hidden.batches(self._max_tokens):
            free = iter(range(self._blocks))
            tables = [[next(free) for _ in range(blocks_for(length, BLOCK_SIZE))] for length in lengths]
            inputs = packed_inputs(lengths, [0] * len(lengths), tables, BLOCK_SIZE)
            yield rows, cell(Tensor(np.ascontiguousarray(hidden.states[rows])), *inputs.values())

    def _cell(self, linears: Mapping[str, QuantizedLinear]):
        kinds = tuple(linears[site.name].kind if site.name in linears else FLOAT for site in layout.SITES)
        if kinds not in self._cells:
            named = {f"{layout.block_prefix(0)}{site.name}.weight": kind
                     for site, kind in zip(layout.SITES, kinds, strict=True)}
            network = build_network(self._config, kinds=named, group_size=self._group_size, num_blocks=self._blocks,
                                    block_size=BLOCK_SIZE, layers=1, whole=False)
            cell = BlockCell(network)
            cell.set_train(False)
            if runtime.mode() == "graph":
                vector, table = Tensor(shape=[None], dtype=ms.int32), Tensor(shape=[None, None], dtype=ms.int32)
                mask_shape, mask_dtype = network.backend.dynamic_mask
                cell.set_inputs(Tensor(shape=[None, self._config.hidden_size], dtype=ms.float32), vector, vector, vector,
                                vector, table, vector, Tensor(shape=mask_shape, dtype=mask_dtype))
            self._cells[kinds] = cell, network
        return self._cells[kinds]

    def _batch_tokens(self) -> int:
        """Tokens a batch may hold so that the largest temporary of a block stays within _LARGEST_TEMPORARY bytes."""
        widest: dict[str, int] = {}
        for site in layout.SITES:       # a fused layer's output is as wide as its parts together
            outputs, inputs = layout.site_shape(self._config, site)
            groups = inputs // self._group_size if self._group_size else 1
            widest[site.fused] = widest.get(site.fused, 0) + outputs * groups
        return int(np.clip(_LARGEST_TEMPORARY // (4 * max(widest.values())), 64, 2048))
