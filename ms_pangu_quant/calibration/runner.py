"""Runs one decoder block after another over packed calibration sequences.

One block of the network is built, and its weights are swapped from block to block. The cell is MindFormers' own decoder
layer with the backend's cells, the same that serves later: only its order of calls is written out again here, because the
inputs of the linear layers must come out.

A quantized block runs as it will be served (network/block.py), where the backend has integer kernels, be it that only a
part of it is rounded yet. Elsewhere it runs with the codes and scales it will be served with, but as float32 values: its
inputs are rounded to their grid and its weights are dequantized, so the products are those of the integer layers up to
float32 rounding, in the memory and at the speed of the float block.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from ms_pangu_quant.backends import current_backend
from ms_pangu_quant.backends.cache import on_cache_grid
from ms_pangu_quant.backends.cpu import per_token_codes
from ms_pangu_quant.calibration.ranges import RangeStats
from ms_pangu_quant.calibration.statistics import InputStats, Needs, StatsBuilder, sums_output_drift, token_weights
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.formats.parameters import ArraySlice
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.batch import blocks_for, dynamic_inputs, packed_inputs
from ms_pangu_quant.network.block import ServedBlock, is_served
from ms_pangu_quant.network.pangu import build_network
from ms_pangu_quant.network.versions import release_graphs
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import TensorScheme

BLOCK_SIZE = 16
_CACHED = -1  # in the place of an input: the keys and values on their way into the cache
_ATTENDED, _MLP, _GATED = 1, 2, 3  # places of inputs; behind the first two a way through a block can be gone on with
_INPUTS = len(layout.INPUT_NAMES)  # in the place of an input: all of them, and nothing behind the last
_LARGEST_TEMPORARY = 1 << 25  # bytes; MindSpore keeps many at once
Rounding = tuple[TensorScheme | None, ...]
Steps = tuple[int, int | None, bool]  # behind, until, onward: of BlockCell
Reached = NDArray[np.float32] | None
_SERVED_BLOCKS = 4  # kept, each with a block's weights: mixed precision has up to 16 kinds of block


@dataclass(frozen=True)
class Hidden:
    """Hidden states of all sequences, packed: states [tokens, hidden] float32, lengths tokens of each sequence.

    held_out  of the last sequences; no statistics are of them.
    first_rows  place of the first token in the calibration data, of which these sequences may be a part, and of the first
              held-out one.
    """

    states: NDArray[np.float32]
    lengths: Sequence[int]
    held_out: int = 0
    first_rows: tuple[int, int] = (0, 0)

    @property
    def fitted(self) -> int:
        """Rows of the sequences that are not held out, which are the first."""
        return sum(self.lengths[: len(self.lengths) - self.held_out])

    def batches(self, max_tokens: int) -> Iterator[tuple[slice, list[int]]]:
        """(rows, lengths) of consecutive sequences, held out or not, of at most max_tokens tokens, or one sequence."""
        start, chosen = 0, []
        for index, length in enumerate(self.lengths):
            if chosen and (sum(chosen) + length > max_tokens or index == len(self.lengths) - self.held_out):
                yield slice(start, start + sum(chosen)), chosen
                start, chosen = start + sum(chosen), []
            chosen.append(length)
        yield slice(start, start + sum(chosen)), chosen


class BlockCell(nn.Cell):
    """Hidden states in; the inputs of the linear layers (in layout.INPUT_NAMES' order) and the residual stream behind
    attention and behind the block out.

    rounding  for each of layout.INPUT_NAMES the scheme it is rounded in, None leaves it as it is. A static one has its
              factor in the first row of `grids` [2, inputs] and its zero point in the second.
    behind    place of an input: nothing in front of it is computed, `reached` is given instead. It is what Way keeps.
    until     place in layout.INPUT_NAMES of the only output wanted, _CACHED, or _INPUTS: nothing behind it is computed.
              None: the whole block. With _MLP the residual stream comes out too.
    onward    with the input of a layer that writes the residual stream comes out what that is behind the layer.
    online_hadamard  what down_proj reads is multiplied by a Hadamard matrix (ModelConfig).
    rounds_cache  keys and values are rounded as the int8 cache of `cache_grid` [4, kv_heads * head_dim] would hold them.
    """

    def __init__(self, network, rounding: Rounding, steps: Steps, online_hadamard: bool, rounds_cache: bool) -> None:
        super().__init__(auto_prefix=False)  # parameters keep the names the network loads them by
        self.rope = network.model.rotary_pos_emb
        self.layer = network.model.decoder.layers[0]
        self.inner = self.layer.mlp.ffn_hidden_size_per_partition
        self.gated = hasattr(self.layer.mlp, "gated")  # as one operator
        self.rounded = tuple(scheme is not None for scheme in rounding)
        self.dynamic = tuple(scheme is not None and scheme.dynamic for scheme in rounding)
        self.code_max = tuple(0.0 if scheme is None else float(scheme.code_max) for scheme in rounding)
        self.behind, self.until, self.onward = steps
        self.rounds_cache = rounds_cache
        self.hadamard = network.backend.hadamard(self.inner, ms.float32) if online_hadamard else None

    def release(self) -> None:
        """Give the memory of its graph back; it is of no use afterwards."""
        release_graphs(self)

    def _round(self, x, place, grids):
        if not self.rounded[place]:
            return x
        if self.dynamic[place]:
            codes, scale = per_token_codes(x, x.shape[-1], code_max=self.code_max[place])
            return codes * ops.tile(scale, (1, x.shape[-1]))
        factor, zero_point = grids[0, place], grids[1, place]
        return (ops.clamp(ops.Rint()(x * factor) + zero_point, -128.0, 127.0) - zero_point) / factor

    def construct(self, hidden, reached, grids, cache_grid, *inputs):
        seen = ()
        if self.behind < _ATTENDED:
            seen = self._attend(hidden, grids, cache_grid, *inputs)
            if self.until is not None and self.until <= _ATTENDED and not (self.onward and self.until == _ATTENDED):
                return seen if self.until == _CACHED else seen[self.until :]
            reached = seen[-1]
        if self.behind < _MLP:
            reached = hidden + self.layer.self_attention.linear_proj(self._round(reached, 1, grids))
            if self.until == _ATTENDED:
                return (seen[-1], reached)
        mlp_input = self.layer.pre_mlp_layernorm(reached)
        if self.until == _MLP:
            return (mlp_input, reached)
        mlp_hidden = self._gated(self.layer.mlp.linear_fc1(self._round(mlp_input, 2, grids)))
        seen += (mlp_input, mlp_hidden)
        if self.until == _INPUTS:
            return seen
        if self.until == _GATED and not self.onward:
            return (mlp_hidden,)
        behind_it = reached + self.layer.mlp.linear_fc2(self._round(mlp_hidden, 3, grids))
        return (mlp_hidden, behind_it) if self.until == _GATED else (*seen, reached, behind_it)

    def _attend(self, hidden, grids, cache_grid, *inputs):
        """The inputs up to attention's output, or keys and values."""
        positions, lengths, contexts, q_seq_lens, block_tables, slot_mapping, attention_mask = inputs
        attention = self.layer.self_attention
        cos, sin = self.rope.get_cos_sin_for_decode(positions)
        attention_input = self.layer.input_layernorm(hidden)
        if self.until == 0:
            return (attention_input,)
        query, key, value = attention.get_query_key_value_tensors(self._round(attention_input, 0, grids))
        query, key = attention.rotary_emb(query, key, cos, sin, lengths)
        if self.until == _CACHED:
            return (key, value)
        if self.rounds_cache:
            key = on_cache_grid(key, cache_grid[0:1], cache_grid[1:2])
            value = on_cache_grid(value, cache_grid[2:3], cache_grid[3:4])
        attention_output = attention.core_attention(
            query=query,
            key=key,
            value=value,
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            batch_valid_length=lengths,
            context_lens_tensor=contexts,
            q_seq_lens=q_seq_lens,
            attn_mask=attention_mask,
        )
        return (attention_input, attention_output)

    def _gated(self, gate_and_up):
        mlp = self.layer.mlp
        if self.gated:
            hidden = mlp.gated(gate_and_up)
        else:
            gate, up = ops.function.array_func.split_ext(gate_and_up, (self.inner, self.inner), -1)
            hidden = up * mlp.activation_func(gate)
        return hidden if self.hadamard is None else self.hadamard(hidden)


class Way:
    """One model's way through a block, from input to input: what lies in front of the last one is not computed again.

    hidden  in front of the block.
    plan    of the block when all its layers are rounded; None for the float model.
    """

    def __init__(self, runner: BlockRunner, hidden: Hidden, plan: BlockPlan | None = None) -> None:
        self._runner, self.hidden, self._plan = runner, hidden, plan
        self._behind = 0
        self._reached: Reached = None  # attention's output, and behind o_proj the residual stream; [tokens, width]
        self._output: Reached = None

    def to(self, place: int, block: RoundedBlock) -> Iterator[tuple[slice, NDArray[np.float32], Reached]]:
        """(rows, input `place` of them, [tokens, in] float32, and, in the float model where a layer that reads it writes
        the residual stream, that behind it); the layers in front of the input are those of block.

        Only the layers behind the input that was asked for last may be others than they were then.
        """
        onward = self._plan is None and place in (_ATTENDED, _GATED)
        keeps = place in (_ATTENDED, _MLP) or onward
        kept: NDArray[np.float32] | None = None
        steps = self._behind, place, onward
        for rows, outputs in self._runner.run(block, self.hidden, steps, reached=self._reached, plan=self._plan):
            last = outputs[-1].asnumpy()
            yield rows, outputs[0].asnumpy(), last if onward else None
            if keeps:
                kept = np.empty((len(self.hidden.states), last.shape[1]), np.float32) if kept is None else kept
                kept[rows] = last
        if place == _GATED:
            self._output, self._reached = kept, None
        elif keeps:
            self._behind, self._reached = _MLP if onward else place, kept

    def behind(self, block: RoundedBlock) -> Hidden:
        """The float model's hidden states behind the block."""
        if self._output is None:
            for _ in self.to(_GATED, block):
                pass
        assert self._output is not None
        return replace(self.hidden, states=self._output)


class BlockRunner:
    """Runs float and quantized blocks of one checkpoint in the mode the process was started in.

    lengths    tokens of each sequence it will be given, of which the last `held_out` are held out.
    also       those of every other Hidden that it will run, or of a longer one that begins with the same; none held out.
    bfloat16   the layers of float blocks may multiply in it (Needs); not what stands for a quantized layer.

    Left as a context it gives the memory of its networks back, several blocks' worth, which MindSpore's graphs would hold
    until the process ends.
    """

    def __init__(
        self,
        config: ModelConfig,
        lengths: Sequence[int],
        *,
        held_out: int = 0,
        also: Sequence[Sequence[int]] = (),
        bfloat16: bool = False,
    ) -> None:
        self._config, self._bfloat16 = config, bfloat16
        self._max_tokens = self._batch_tokens()
        nothing = np.empty((0, 0), np.float32)
        self._blocks = max(
            sum(blocks_for(length, BLOCK_SIZE) for length in batch)
            for each in (Hidden(nothing, lengths, held_out), *(Hidden(nothing, other) for other in also))
            for _, batch in each.batches(self._max_tokens)
        )
        self._cells: dict[tuple[BlockPlan | bool, Rounding, Steps, bool], BlockCell] = {}
        self._served: dict[BlockPlan, ServedBlock] = {}
        self._floats: dict[bool, Any] = {}  # float networks, by whether they multiply in bfloat16
        self._loaded: dict[bool, weakref.ref[Block]] = {}  # what is in them

    def __enter__(self) -> BlockRunner:
        return self

    def __exit__(self, *_: object) -> None:
        for holder in (*self._cells.values(), *self._served.values(), *self._floats.values()):
            holder.release()
        for held in (self._cells, self._served, self._floats, self._loaded):
            held.clear()

    def observe(
        self, block: Block, hidden: Hidden, needs: Needs, where: str, *, output: bool = True
    ) -> tuple[dict[str, InputStats], Hidden | None]:
        """The statistics of the inputs of a float block's linear layers, and what comes out of the block, if asked for."""
        builders = [_builder(needs, f"{where}: {name}", hidden) for name in layout.INPUT_NAMES]
        states = np.empty_like(hidden.states) if output else None
        for place, outputs in self.run(RoundedBlock(block), hidden, (0, None if output else _INPUTS, False)):
            behind: dict[str, NDArray[np.float32]] = {}
            if states is not None:
                attended, states[place] = (each.asnumpy() for each in outputs[_INPUTS:])
                behind = {layout.ATTENTION_OUTPUT: attended, layout.MLP_HIDDEN: states[place]}
            for name, builder, x in zip(layout.INPUT_NAMES, builders, outputs[:_INPUTS], strict=True):
                weights = _weights(behind.get(name), needs)
                (builder.add if place.start < hidden.fitted else builder.hold_out)(x.asnumpy(), weights=weights)
        stats = {name: builder.finish() for name, builder in zip(layout.INPUT_NAMES, builders, strict=True)}
        return stats, None if states is None else replace(hidden, states=states)

    def observe_input(
        self, input_name: str, block: RoundedBlock, ways: tuple[Way, Way], needs: Needs, where: str
    ) -> InputStats:
        """Statistics of one input with gram and drift, the layers and the cache in front of it as far as they are rounded.

        ways  this block's, and the float model's through the float block, of the same sequences.
        """
        place = layout.INPUT_NAMES.index(input_name)
        builder = _builder(needs, f"{where}: {input_name}", ways[0].hidden, _few_outputs(block, input_name))
        served, reference = ways[0].to(place, block), ways[1].to(place, RoundedBlock(block.floats))
        for (rows, x, _), (_, y, behind) in zip(served, reference, strict=True):
            (builder.add if rows.start < ways[0].hidden.fitted else builder.hold_out)(x, y, _weights(behind, needs))
        return builder.finish()

    def observe_cache(
        self, block: RoundedBlock, hidden: Hidden, needs: Needs, where: str, plan: BlockPlan | None = None
    ) -> tuple[RangeStats, RangeStats]:
        """Statistics of the keys, after rope, and of the values that the block's layers, as they are rounded, make."""
        seen: list[list[RangeStats]] = [[], []]
        for place, outputs in self.run(block, hidden, (0, _CACHED, False), plan=plan):
            if place.start >= hidden.fitted:
                break
            for parts, name, x in zip(seen, ("keys", "values"), outputs, strict=True):
                first = hidden.first_rows[0] + place.start
                stats = RangeStats.observe(x.asnumpy(), rows=needs.rows, start=first, where=f"{where}: {name}")
                parts[:] = [parts[0].merge(stats) if parts else stats]
        return seen[0][0], seen[1][0]

    def advance(self, block: RoundedBlock, hidden: Hidden, output: NDArray[np.float32] | None = None) -> Hidden:
        """Hidden states after the block as it will be served, in `output` if given."""
        output = np.empty_like(hidden.states) if output is None else output
        plan = block.plan
        if _in_integers(plan):
            served = self._served_block(plan)
            served.load(block)
            for rows, states, inputs in self._batches(hidden):
                output[rows] = served(states, inputs).asnumpy()
        else:
            for rows, (*_, states) in self.run(block, hidden):
                output[rows] = states.asnumpy()
        return replace(hidden, states=output)

    def run(
        self,
        block: RoundedBlock,
        hidden: Hidden,
        steps: Steps = (0, None, False),
        *,
        reached: Reached = None,
        plan: BlockPlan | None = None,
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """(rows, what a BlockCell gives for them). reached [tokens, width] is that of BlockCell, None in front of a block.

        plan  of the block when all its layers are rounded: as far as they are, integer kernels compute them, if any can.
        """
        channels = self._config.num_key_value_heads * self._config.head_dim
        cache_grid = Tensor(np.zeros((4, channels), np.float32) if block.cache is None else block.cache.rows())
        readers = [_first_reading(name, block.linears) for name in layout.INPUT_NAMES]
        if plan is not None and _in_integers(plan):
            self._served_block(plan).load(block, plan)
            cell = self._cell(plan, (None,) * _INPUTS, steps, rounds_cache=False)
        else:
            rounding = tuple(None if linear is None else linear.scheme.activation for linear in readers)
            cell = self._cell(self._load(block), rounding, steps, rounds_cache=block.cache is not None)
        grids = Tensor(np.array([_grid(linear) for linear in readers], np.float32).T.copy())
        for rows, states, inputs in self._batches(hidden):
            begun = states if reached is None else Tensor(reached[rows])
            yield rows, cell(states, begun, grids, cache_grid, *inputs.values())

    def _batches(self, hidden: Hidden) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
        """(rows, their hidden states, the other inputs of a block) of as many sequences as go through it at a time."""
        for rows, lengths in hidden.batches(self._max_tokens):
            free = iter(range(self._blocks))
            tables = [[next(free) for _ in range(blocks_for(length, BLOCK_SIZE))] for length in lengths]
            inputs = packed_inputs(lengths, [0] * len(lengths), tables, BLOCK_SIZE)
            yield rows, Tensor(np.ascontiguousarray(hidden.states[rows])), inputs

    def _load(self, block: RoundedBlock) -> bool:
        """Into the float network that is for it, unless it is in it already; which one that is."""
        bfloat16 = self._bfloat16 and not block.linears
        if bfloat16 not in self._floats:
            self._floats[bfloat16] = _float_network(self._config, self._blocks, bfloat16)
        loaded = self._loaded.get(bfloat16)
        if block.linears or loaded is None or loaded() is not block.floats:
            self._floats[bfloat16].load_tensors(float_tensors(block))
            self._loaded.pop(bfloat16, None)
            if not block.linears:
                self._loaded[bfloat16] = weakref.ref(block.floats)
        return bfloat16

    def _served_block(self, plan: BlockPlan) -> ServedBlock:
        if plan not in self._served:
            if len(self._served) == _SERVED_BLOCKS:
                oldest = next(iter(self._served))
                for key in [key for key in self._cells if key[0] == oldest]:
                    self._cells.pop(key).release()
                self._served.pop(oldest).release()
            self._served[plan] = ServedBlock(self._config, plan, num_blocks=self._blocks, block_size=BLOCK_SIZE)
        return self._served[plan]

    def _cell(self, of: BlockPlan | bool, rounding: Rounding, steps: Steps, *, rounds_cache: bool) -> BlockCell:
        """Of the network that serves this plan, or of a float one."""
        key = (of, rounding, steps, rounds_cache)
        if key not in self._cells:
            network = self._floats[of] if isinstance(of, bool) else self._served[of].network
            cell = BlockCell(network, rounding, steps, self._config.online_hadamard, rounds_cache)
            cell.set_train(False)
            if runtime.mode() == "graph":
                attended = self._config.num_attention_heads * self._config.head_dim
                reached = attended if steps[0] == _ATTENDED else self._config.hidden_size
                cell.set_inputs(
                    Tensor(shape=[None, self._config.hidden_size], dtype=ms.float32),
                    Tensor(shape=[None, reached], dtype=ms.float32),
                    Tensor(shape=[2, len(rounding)], dtype=ms.float32),
                    Tensor(shape=[4, self._config.num_key_value_heads * self._config.head_dim], dtype=ms.float32),
                    *dynamic_inputs(network.backend),
                )
            self._cells[key] = cell
        return self._cells[key]

    def _batch_tokens(self) -> int:
        """Tokens a batch may hold so that the largest temporary of a block stays within _LARGEST_TEMPORARY bytes."""
        widest = max(
            2 * self._config.intermediate_size,
            (self._config.num_attention_heads + 2 * self._config.num_key_value_heads) * self._config.head_dim,
        )
        return int(np.clip(_LARGEST_TEMPORARY // (4 * widest), 64, 2048))


def _in_integers(plan: BlockPlan) -> bool:
    return current_backend().integer_kernels and is_served(plan)


def _builder(needs: Needs, where: str, hidden: Hidden, weight: Reached = None) -> StatsBuilder:
    start, held_out_start = hidden.first_rows
    return StatsBuilder(needs, where, start=start, held_out_start=held_out_start, weight=weight)


def _few_outputs(block: RoundedBlock, input_name: str) -> Reached:
    """The weight that reads this input, where the drift of its outputs is summed in the place of that of the input."""
    sites = layout.sites_reading(input_name)
    weight = block.floats.weight(sites[0])
    return weight if sums_output_drift(len(sites), *weight.shape) else None


def _weights(behind: Reached, needs: Needs) -> Reached:
    """Of the rows of an input, from the residual stream [tokens, hidden] behind the layer that reads it and writes that."""
    return token_weights(behind, needs.temper) if needs.temper and behind is not None else None


def _first_reading(input_name: str, linears: Mapping[str, QuantizedLinear]) -> QuantizedLinear | None:
    """A quantized layer that reads this input, which is rounded for all of them."""
    return next((linears[site.name] for site in layout.sites_reading(input_name) if site.name in linears), None)


def _grid(linear: QuantizedLinear | None) -> tuple[float, float]:
    """(factor, zero point) of a layer's static input; what it says of another kind of layer is not looked at."""
    return (1.0, 0.0) if linear is None else (linear.input_scale or 1.0, linear.input_offset)


def _float_network(config: ModelConfig, num_blocks: int, bfloat16: bool) -> Any:
    """A block of float layers, for many tokens where the backend has such; BlockCell multiplies by the Hadamard matrix."""
    backend = current_backend()
    if backend.float_method is not None:
        backend = replace(backend, linear_methods={**backend.linear_methods, None: backend.float_method(bfloat16)})
    config = replace(config, online_hadamard=False)
    return build_network(
        config, Plan((BlockPlan(),)), num_blocks=num_blocks, block_size=BLOCK_SIZE, whole=False, backend=backend
    )


def float_tensors(block: RoundedBlock) -> Iterator[tuple[str, ArraySlice]]:
    """A block for the float network, quantized layers dequantized; one of them in memory at a time.

    A weight that is a layer of its own is copied: MindFormers' loader keeps the array, and a kernel may pack it in place.
    """
    prefix = layout.block_prefix(0)
    alone = {f"{site.name}.weight" for site in layout.SITES if len(layout.fused(site.fused)) == 1}
    for name, value in block.kept.items():
        yield prefix + name, ArraySlice(value.copy() if name in alone else value)
    for site, linear in block.linears.items():
        yield f"{prefix}{site}.weight", ArraySlice(linear.weight.dequantize())
