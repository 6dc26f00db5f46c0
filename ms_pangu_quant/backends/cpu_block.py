"""A decoder block of the CPU backend as one operator, where all its linear layers are quantized and on one rank.

A Hadamard matrix in front of down_proj is a part of it, between SwiGLU and the rounding of each token.

With an operator for each cell, MindSpore's executor takes about 50 us for each of the dozen of a block: a third of a decode
step of the 1B. The operator calls the same kernels in the same order, so it gives the same bits.

Blocks that follow one another are again one operator (FusedRun). Their 40 inputs each would still cost the executor a fifth
of a decode step, so it is given the addresses of the parameters instead, which are no part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindformers.parallel_core.inference.transformer.identity_op import IdentityOp
from mindformers.parallel_core.inference.transformer.transformer_layer import TransformerLayer
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from ms_pangu_quant.backends.cpu_operators import block_operator, operator
from ms_pangu_quant.backends.hadamard import RotatedInput
from ms_pangu_quant.kernels.library import Library, kernels

_ENTRY = 7  # int64 of the table that say where an input is; see PanguStack in block.cc


class FusedRun(nn.Cell):
    """Blocks that follow one another, as one operator; point() tells it where their parameters are.

    table  int64 [blocks, inputs of a block, 7], a parameter because the graph would take a tensor's values for constants.
    """

    def __init__(self, library: Library, first: int, blocks: int, inputs: int) -> None:
        """first: place of its first block, since names of parameters are unique in a network."""
        super().__init__()
        shape = (blocks, inputs, _ENTRY)
        self.table = Parameter(Tensor(np.zeros(shape, np.int64)), name=f"{first}.table", requires_grad=False)
        self.kernel = operator(library, "PanguStack")
        self.kept: list[NDArray[Any]] = []

    def point(self, blocks: Sequence[FusedBlock]) -> None:
        """To be called when the blocks' parameters have been loaded; what it points to lives as long as this cell."""
        arrays = [[one if isinstance(one, int) else one.asnumpy() for one in block.inputs(*range(7))] for block in blocks]
        self.table.set_data(Tensor(np.array([[_entry(one) for one in row] for row in arrays], np.int64)))
        self.kept = [one for row in arrays for one in row if not isinstance(one, int)]

    def forget(self) -> None:
        """Keep no parameter alive; the operator fails until it is pointed at some again."""
        self.kept = []
        self.table.set_data(Tensor(np.zeros(self.table.shape, np.int64)))

    def construct(self, *given):
        return self.kernel(*given, self.table)


def _entry(where: int | NDArray[Any]) -> list[int]:
    if isinstance(where, int):
        return [-1 - where] + [0] * (_ENTRY - 1)
    shape = [*where.shape, *[0] * (_ENTRY - 3 - where.ndim)]
    return [where.ctypes.data, int(where.dtype == np.uint8), where.ndim, *shape]


def join_blocks(layers: Sequence[Any]) -> list[tuple[FusedRun, list[FusedBlock]]]:
    """Lets the first of several whole blocks in a row compute all of them, and the others pass on what they get.

    Returns what has to be pointed at the parameters when they have been loaded.
    """
    runs: list[tuple[FusedRun, list[FusedBlock]]] = []
    row: list[FusedBlock] = []
    for place, layer in enumerate([*layers, None]):
        if layer is not None and isinstance(layer, FusedBlock) and layer.whole:
            row.append(layer)
            continue
        if row:
            run = FusedRun(kernels(), place - len(row), len(row), len(row[0].inputs(*range(7))))
            row[0].run = run
            for passed in row[1:]:
                passed.joined = True
            runs.append((run, row))
        row = []
    return runs


class FusedBlock(TransformerLayer):
    """MindFormers' layer, with its cells and parameter names.

    A linear method that the kernel knows has block_parameters(layer): weight, scale, input_scale, input_offset, sum_bias,
    bias; one element in place of each that it lacks.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        attention, mlp = self.self_attention, self.mlp
        self.down, turn = mlp.linear_fc2.quant_method, None
        if isinstance(self.down, RotatedInput) and hasattr(self.down.hadamard, "signs"):
            self.down, turn = self.down.method, self.down.hadamard
        self.hadamard_signs = Tensor(np.zeros(1, np.uint8)) if turn is None else turn.signs
        self.hadamard_scale = Tensor(np.zeros(1, np.float32)) if turn is None else turn.scale
        methods = [each.quant_method for each in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1)]
        nothing_between = (
            self.post_self_attn_layernorm,
            self.post_mlp_layernorm,
            attention.q_layernorm,
            attention.k_layernorm,
        )
        self.whole = (
            all(hasattr(method, "block_parameters") for method in (*methods, self.down))
            and all(cell is None or isinstance(cell, IdentityOp) for cell in nothing_between)
            and self.tp_group.size == 1
            and not self.apply_residual_connection_post_norm
        )
        self.kernel = block_operator(kernels()) if self.whole else None
        self.run: FusedRun | None = None  # of this block and those behind it
        self.joined = False  # computed by the run of a block before it

    def inputs(self, x, cos, sin, slot_mapping, block_tables, batch_valid_length, q_seq_lens):
        """Of PanguBlock."""
        attention, mlp = self.self_attention, self.mlp
        return (
            x,
            cos,
            sin,
            attention.core_attention.key_cache,
            attention.core_attention.value_cache,
            slot_mapping,
            block_tables,
            batch_valid_length,
            q_seq_lens,
            attention.core_attention.scale,
            attention.core_attention.cache_grid,
            self.input_layernorm.epsilon,
            self.input_layernorm.weight,
            self.pre_mlp_layernorm.weight,
            self.hadamard_signs,
            self.hadamard_scale,
            *attention.linear_qkv.quant_method.block_parameters(attention.linear_qkv),
            *attention.linear_proj.quant_method.block_parameters(attention.linear_proj),
            *mlp.linear_fc1.quant_method.block_parameters(mlp.linear_fc1),
            *self.down.block_parameters(mlp.linear_fc2),
        )

    def construct(
        self,
        hidden_states,
        attention_mask,
        context=None,
        context_mask=None,
        rotary_pos_cos=None,
        rotary_pos_sin=None,
        attention_bias=None,
        packed_seq_params=None,
        batch_valid_length=None,
        context_lens_tensor=None,
        q_seq_lens=None,
        block_tables=None,
        slot_mapping=None,
        attn_padding_idx=None,
        attn_unpadding_idx=None,
        ffn_padding_idx=None,
        ffn_unpadding_idx=None,
        key_cache=None,
        value_cache=None,
        q_seq_lens_cpu=None,
        batch_valid_length_cpu=None,
        context_lens_tensor_cpu=None,
    ):
        if not self.whole:
            normed, residual = self._construct_attention(
                hidden_states,
                attention_mask=attention_mask,
                rotary_pos_cos=rotary_pos_cos,
                rotary_pos_sin=rotary_pos_sin,
                batch_valid_length=batch_valid_length,
                context_lens_tensor=context_lens_tensor,
                q_seq_lens=q_seq_lens,
                block_tables=block_tables,
                slot_mapping=slot_mapping,
            )
            return self._construct_mlp(normed, residual=residual)
        if self.joined:
            return hidden_states
        given = (
            hidden_states,
            rotary_pos_cos,
            rotary_pos_sin,
            slot_mapping,
            block_tables,
            batch_valid_length,
            q_seq_lens,
        )
        if self.run is not None:
            return self.run(*given)
        return self.kernel(*self.inputs(*given))
