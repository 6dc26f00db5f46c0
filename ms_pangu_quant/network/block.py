"""One decoder block as a quantized network computes it, its weights swapped from block to block.

It is MindFormers' own layer with the linear methods, kernels and packed weights of the network that serves: what comes out
is what the served network has behind this block, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import Block
from ms_pangu_quant.formats.linear import FLOAT, QuantizedLinear
from ms_pangu_quant.formats.parameters import ArraySlice, cache_tensor, network_tensors
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.batch import dynamic_inputs
from ms_pangu_quant.network.pangu import build_network
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache


@dataclass(frozen=True)
class BlockKind:
    """What decides which network computes a block. kinds: of layout.SITES, in order; group_size: as in build_network."""

    kinds: tuple[str, ...]
    group_size: int
    int8_cache: bool


def block_kind(linears: Mapping[str, QuantizedLinear], *, int8_cache: bool) -> BlockKind | None:
    """None where a network computes no such block: all is float, one part of a joined layer is rounded and another is not,
    or group sizes differ."""
    kinds = {site: linears[site.name].kind if site.name in linears else FLOAT for site in layout.SITES}
    joined = {(site.fused, kind) for site, kind in kinds.items()}
    shapes = [linear.weight for linear in linears.values() if linear.kind == "W4A8_DYNAMIC"]
    sizes = {weight.codes.shape[1] // weight.scale.shape[1] for weight in shapes if weight.scale.shape[1] > 1}
    group_size = min(sizes, default=0)
    wanted = [weight.codes.shape[1] // group_size if group_size else 1 for weight in shapes]
    if not linears or len(joined) > len(dict(joined)) or wanted != [weight.scale.shape[1] for weight in shapes]:
        return None
    return BlockKind(tuple(kinds.values()), group_size, int8_cache)


class _Layer(nn.Cell):
    """Hidden states [tokens, hidden] in and out; the other inputs are those of packed_inputs."""

    def __init__(self, network: Any) -> None:
        super().__init__(auto_prefix=False)  # parameters keep the names the network loads them by
        self.rope, self.layer = network.model.rotary_pos_emb, network.model.decoder.layers[0]

    def construct(
        self,
        hidden,
        positions,
        batch_valid_length,
        context_lens_tensor,
        q_seq_lens,
        block_tables,
        slot_mapping,
        attention_mask,
    ):
        cos, sin = self.rope.get_cos_sin_for_decode(positions)
        return self.layer(
            hidden,
            attention_mask,
            rotary_pos_cos=cos,
            rotary_pos_sin=sin,
            batch_valid_length=batch_valid_length,
            context_lens_tensor=context_lens_tensor,
            q_seq_lens=q_seq_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
        )


class ServedBlock:
    """A block of one kind. num_blocks, block_size: of its key/value cache."""

    def __init__(self, config: ModelConfig, kind: BlockKind, *, num_blocks: int, block_size: int) -> None:
        prefix = layout.block_prefix(0)
        self._network = build_network(
            config,
            kinds={f"{prefix}{site.name}.weight": each for site, each in zip(layout.SITES, kind.kinds, strict=True)},
            group_size=kind.group_size,
            num_blocks=num_blocks,
            block_size=block_size,
            layers=1,
            whole=False,
            int8_cache=kind.int8_cache,
        )
        self._layer = _Layer(self._network)
        self._layer.set_train(False)
        if runtime.mode() == "graph":
            hidden = Tensor(shape=[None, config.hidden_size], dtype=ms.float32)
            self._layer.set_inputs(hidden, *dynamic_inputs(self._network.backend))

    def load(self, block: Block, linears: Mapping[str, QuantizedLinear], cache: QuantizedCache | None) -> None:
        self._network.load_tensors(_tensors(block, linears, cache))

    def release(self) -> None:
        """Give the memory of weights and kernels back; the block is of no use afterwards."""
        _cell_graph_executor.del_net_res(self._layer, self._layer.compile_cache)
        self._layer.compile_cache.clear()
        self._network.release()

    def __call__(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """inputs: of packed_inputs."""
        return self._layer(hidden, *inputs.values())


def _tensors(
    block: Block, linears: Mapping[str, QuantizedLinear], cache: QuantizedCache | None
) -> Iterator[tuple[str, ArraySlice]]:
    """Copies: MindFormers' loaders keep an array as the parameter, where the kernels then pack it."""
    prefix = layout.block_prefix(0)
    for name, tensor in network_tensors(prefix, block, linears):
        yield name, ArraySlice(tensor.array.copy())
    if cache is not None:
        yield cache_tensor(prefix, cache)
