"""One decoder block as a quantized network computes it, its weights swapped from block to block.

It is MindFormers' own layer with the linear methods, kernels and packed weights of the network that serves: what comes out
is what the served network has behind this block, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import RoundedBlock
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.formats.parameters import ArraySlice, network_tensors
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.batch import dynamic_inputs
from ms_pangu_quant.network.pangu import build_network
from ms_pangu_quant.network.versions import release_graphs
from ms_pangu_quant.recipe.plan import BlockPlan, Plan


def is_served(plan: BlockPlan) -> bool:
    """Whether a network computes such a block: not where all is float, one part of a layer that is computed as one is
    rounded and another is not, or group sizes differ."""
    return not plan.is_float and not plan.split_layers and len(plan.group_sizes) < 2


class _Layer(nn.Cell):
    """Hidden states [tokens, hidden] in and out; the other inputs are those of packed_inputs."""

    def __init__(self, network: Any) -> None:
        super().__init__(auto_prefix=False)  # parameters keep the names the network loads them by
        self.rope, self.layer = network.model.rotary_pos_emb, network.model.decoder.layers[0]

    def construct(self, hidden, *inputs):
        positions, lengths, contexts, q_seq_lens, block_tables, slot_mapping, attention_mask = inputs
        cos, sin = self.rope.get_cos_sin_for_decode(positions)
        return self.layer(
            hidden,
            attention_mask,
            rotary_pos_cos=cos,
            rotary_pos_sin=sin,
            batch_valid_length=lengths,
            context_lens_tensor=contexts,
            q_seq_lens=q_seq_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
        )


class ServedBlock:
    """Blocks of one plan. num_blocks, block_size: of its key/value cache."""

    def __init__(self, config: ModelConfig, plan: BlockPlan, *, num_blocks: int, block_size: int) -> None:
        self.network = build_network(config, Plan((plan,)), num_blocks=num_blocks, block_size=block_size, whole=False)
        self._layer = _Layer(self.network)
        self._layer.set_train(False)
        if runtime.mode() == "graph":
            hidden = Tensor(shape=[None, config.hidden_size], dtype=ms.float32)
            self._layer.set_inputs(hidden, *dynamic_inputs(self.network.backend))

    def load(self, rounded: RoundedBlock, plan: BlockPlan | None = None) -> None:
        """Copies: MindFormers' loaders keep an array as the parameter, where the kernels then pack it.

        plan  of the block when all its layers are rounded: those that are not yet are left out, and must not be computed.
        """
        prefix = layout.block_prefix(0)
        ahead = {f"{prefix}{site.name}.weight" for site, _ in plan.quantized} if plan else set()
        ahead -= {f"{prefix}{name}.weight" for name in rounded.linears}
        tensors = (pair for pair in network_tensors(prefix, rounded) if pair[0] not in ahead)
        self.network.load_tensors(((name, ArraySlice(tensor.array.copy())) for name, tensor in tensors), partly=bool(ahead))

    def release(self) -> None:
        """Give the memory of weights and kernels back; the block is of no use afterwards."""
        release_graphs(self._layer)
        self.network.release()

    def __call__(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """inputs: of packed_inputs."""
        return self._layer(hidden, *inputs.values())
