"""A decoder block of the CPU backend as one operator, where all its linear layers are quantized and on one rank.

With an operator for each cell, MindSpore's executor takes about 50 us for each of the dozen of a block: a third of a decode
step of the 1B. The operator calls the same kernels in the same order, so it gives the same bits.
"""

from __future__ import annotations

from typing import Any

from mindformers.parallel_core.inference.transformer.identity_op import IdentityOp
from mindformers.parallel_core.inference.transformer.transformer_layer import TransformerLayer

from ms_pangu_quant.backends.cpu_kernels.library import kernels
from ms_pangu_quant.backends.cpu_kernels.operators import block_operator


class Block(TransformerLayer):
    """MindFormers' layer, with its cells and parameter names.

    A linear method that the kernel knows has block_parameters(layer): weight, scale, input_scale, input_offset, sum_bias,
    bias; one element in place of each that it lacks.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        attention, mlp = self.self_attention, self.mlp
        linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        nothing_between = (
            self.post_self_attn_layernorm,
            self.post_mlp_layernorm,
            attention.q_layernorm,
            attention.k_layernorm,
        )
        self.whole = (
            all(hasattr(linear.quant_method, "block_parameters") for linear in linears)
            and all(cell is None or isinstance(cell, IdentityOp) for cell in nothing_between)
            and self.tp_group.size == 1
            and not self.apply_residual_connection_post_norm
        )
        self.kernel = block_operator(kernels()) if self.whole else None

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
        attention, mlp = self.self_attention, self.mlp
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
        return self.kernel(
            hidden_states,
            rotary_pos_cos,
            rotary_pos_sin,
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
            *attention.linear_qkv.quant_method.block_parameters(attention.linear_qkv),
            *attention.linear_proj.quant_method.block_parameters(attention.linear_proj),
            *mlp.linear_fc1.quant_method.block_parameters(mlp.linear_fc1),
            *mlp.linear_fc2.quant_method.block_parameters(mlp.linear_fc2),
        )
