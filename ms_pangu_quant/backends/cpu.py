"""The CPU backend in plain MindSpore operators: the executable specification of every kernel.

MindSpore's CPU has no RMSNorm, rope, paged attention or quantized matmul, and its int8 MatMul wraps around. Here each is
written in operators that exist, for graph mode with dynamic shapes. Integer products are computed in float32 matmuls over
slices of the input dimension so short that every partial sum is below 2^24 and therefore exact, and added up in int32:
the result is the integer accumulator, bit for bit, at the speed of the float matmul.

It does not try to be as fast as kernels could be, and it holds one int4 as half a byte but unpacks it at each use.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindformers.parallel_core.inference.base_models.common.embeddings import rope_utils
from mindformers.parallel_core.inference.base_models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from mindformers.parallel_core.inference.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.inference.quantization.golden_stick.a8dynw8 import A8W8DynamicLinearMethod
from mindformers.parallel_core.inference.quantization.golden_stick.a8w8 import A8W8LinearMethod
from mindformers.parallel_core.inference.tensor_parallel.layers import LinearMethodBase
from mindformers.parallel_core.inference.weights_utils import set_weight_attrs
from mindformers.parallel_core.utils.spec_utils import ModuleSpec
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

from ms_pangu_quant.backends import Backend

EXACT_INPUTS_W8 = 1024      # 128 * 128 * 1024 = 2^24: the longest int8 dot product whose every partial sum float32 holds
EXACT_INPUTS_W4 = 8192      # 128 * 15 * 8192 < 2^24, with the nibbles read as 0..15


class RMSNorm(nn.Cell):
    """Same parameter and call as MindFormers' RMSNorm; the mean and the root are taken in float32."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(initializer("ones", (hidden_size,), config.layernorm_compute_dtype), name="weight",
                                requires_grad=False)

    def construct(self, x):
        wide = x.astype(ms.float32)
        scale = mint.rsqrt(mint.mean(mint.square(wide), -1, True) + self.eps)
        return (wide * scale * self.weight).astype(x.dtype)


class Rope(RotaryEmbedding):
    """Rotate-half rope on packed tokens; cos and sin [tokens, head_dim] are gathered by position, also in prefill."""

    def _compute_cos_sin_cache(self):
        half = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        inverse = (1.0 / np.float32(self.rotary_base) ** half).astype(np.float32)
        angles = np.outer(np.arange(self.max_position_embeddings, dtype=np.float32), inverse)
        table = np.concatenate([angles, angles], axis=-1)
        return Tensor(np.cos(table).astype(np.float32)), Tensor(np.sin(table).astype(np.float32))

    def _rotate(self, x, cos, sin):
        heads = x.reshape((x.shape[0], -1, self.dim))
        left, right = heads[..., :self.dim // 2], heads[..., self.dim // 2:]
        turned = heads * cos.expand_dims(1) + mint.cat((-right, left), -1) * sin.expand_dims(1)
        return turned.reshape(x.shape)

    def construct(self, query, key, rotary_pos_cos, rotary_pos_sin, seq_lens_tensor):
        return (self._rotate(query, rotary_pos_cos, rotary_pos_sin),
                self._rotate(key, rotary_pos_cos, rotary_pos_sin))


class PagedAttention(nn.Cell):
    """Writes keys and values to the paged cache, then attends to it; prefill, chunked prefill and batched decode.

    query [tokens, heads * head_dim], key and value [tokens, kv_heads * head_dim] are packed: sequence b contributes
    q_seq_lens[b] tokens, the last of which has position batch_valid_length[b] - 1. attn_mask is not a mask but the query
    offsets 0..max(q_seq_lens)-1, whose length tells the graph how far to pad; the mask follows from the lengths.
    """

    def __init__(self, head_num, head_dim=None, kv_head_num=None, scale_value=1.0, next_tokens=0, pa_kv_head_num=None,
                 num_blocks=1, block_size=16):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = head_num, kv_head_num, head_dim
        self.scale = scale_value
        self.is_prefill = True
        self.block_offsets = Tensor(np.arange(block_size, dtype=np.int32))
        self.block_size = block_size
        self.head_of_query = Tensor((np.arange(head_num) // (head_num // kv_head_num)).astype(np.int32))
        shape = (num_blocks * block_size, kv_head_num, head_dim)
        # A plain operator cannot write into an input tensor in a CPU graph, so the cell owns its cache.
        self.key_cache = Parameter(initializer("zeros", shape, ms.float32), name="key_cache", requires_grad=False)
        self.value_cache = Parameter(initializer("zeros", shape, ms.float32), name="value_cache", requires_grad=False)
        self.write = ops.ScatterUpdate()

    def _read(self, cache, slots):
        """Cache rows [batch, kv_tokens, heads, head_dim] of slots [batch, kv_tokens], one row for each query head."""
        return ops.gather(ops.gather(cache, slots, 0), self.head_of_query, 2)

    def construct(self, query, key, value, slot_mapping=None, block_tables=None, batch_valid_length=None,
                  context_lens_tensor=None, q_seq_lens=None, actual_seq_qlen=None, actual_seq_kvlen=None,
                  attn_mask=None, padding_mask=None, prefix=None, key_cache=None, value_cache=None):
        keys = self.write(self.key_cache, slot_mapping, key.reshape((-1, self.kv_heads, self.head_dim)))
        values = self.write(self.value_cache, slot_mapping, value.reshape((-1, self.kv_heads, self.head_dim)))
        batch = block_tables.shape[0]
        slots = (block_tables.expand_dims(-1) * self.block_size + self.block_offsets).reshape((batch, -1))
        keys = self._read(keys, slots).transpose((0, 2, 3, 1))             # [batch, heads, head_dim, kv_tokens]
        values = self._read(values, slots).transpose((0, 2, 1, 3))         # [batch, heads, kv_tokens, head_dim]
        query = query.reshape((-1, self.heads, self.head_dim))
        first = batch_valid_length - q_seq_lens                             # position of each sequence's first query
        if not self.is_prefill:
            return self._attend(query.expand_dims(2), keys, values, first.expand_dims(1))
        ends = ops.cumsum(q_seq_lens, 0)
        starts = ends - q_seq_lens
        token = ops.cumsum(ops.ones_like(slot_mapping), 0) - 1
        sequence = (token.expand_dims(1) >= ends.expand_dims(0)).astype(ms.int32).sum(1)
        padded_row = sequence * attn_mask.shape[0] + token - ops.gather(starts, sequence, 0)
        row = ops.minimum(starts.expand_dims(1) + attn_mask.expand_dims(0), token[-1])
        query = ops.gather(query, row, 0).transpose((0, 2, 1, 3))          # [batch, heads, max_query, head_dim]
        context = self._attend(query, keys, values, first.expand_dims(1) + attn_mask.expand_dims(0))
        return ops.gather(context, padded_row, 0)

    def _attend(self, query, keys, values, position):
        """Causal attention; query [batch, heads, queries, head_dim], position [batch, queries] of each query in its
        sequence; returns [batch * queries, heads * head_dim]."""
        scores = ops.matmul(query, keys) * self.scale
        kv_position = (ops.cumsum(ops.ones_like(keys[0, 0, 0].astype(ms.int32)), 0) - 1).reshape((1, 1, -1))
        visible = (kv_position <= position.expand_dims(-1)).expand_dims(1)
        scores = ops.where(visible, scores, Tensor(-3e38, ms.float32))
        context = ops.matmul(ops.softmax(scores, -1), values).transpose((0, 2, 1, 3))
        return context.reshape((-1, self.heads * self.head_dim))


class CpuGPTModel(GPTModel):
    """GPTModel without the two operators that have no CPU kernel (CumsumExt, MoveTo)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.move_lens_to_cpu = False
        self.is_chunked = True          # cos and sin are gathered by position in prefill too
        self.all_positions = False

    def pre_gather_func(self, output, context_lens_tensor, seq_lens_tensor):
        if self.is_prefill and not self.all_positions:
            output = self.gather(output, ops.cumsum(seq_lens_tensor - context_lens_tensor, 0) - 1, 0)
        return output


def per_token_codes(x):
    """Codes (as float32) [tokens, in] and scales [tokens, 1] of x [tokens, in]: scale = absmax / 127, half to even.

    A row of zeros gets scale 0 and codes 0; NaN and Inf propagate into the result.
    """
    scale = ops.abs(x).max(-1, keepdims=True) / 127.0
    divisor = ops.where(scale == 0.0, ops.ones_like(scale), scale)
    return ops.round(x / divisor), scale


def integer_products(codes, weight, inputs, exact_inputs, multiply):
    """Products of codes [tokens, in] and weight [out, in] (integers held in float32) over slices of exact_inputs inputs.

    Each element of the returned list [tokens, out] is exact.
    """
    return [multiply(codes[:, start:start + exact_inputs], weight[:, start:start + exact_inputs])
            for start in range(0, inputs, exact_inputs)]


def integer_sum(parts, below_2_24):
    """Exact sum of integers held in float32, as float32 (rounded once); in int32 unless it stays below 2^24."""
    if not below_2_24:
        parts = [part.astype(ms.int32) for part in parts]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.astype(ms.float32)


class W8A8DynamicLinear(A8W8DynamicLinearMethod):
    """Parameters as MindFormers creates them: weight int8 [out, in], w_scale [out]."""

    def __init__(self, quant_config):
        super().__init__(quant_config)
        self.multiply = ops.MatMul(transpose_b=True)

    def apply(self, layer, x, weight=None, bias=None, group_list=None, **kwargs):
        codes, token_scale = per_token_codes(x.reshape((-1, self.input_size_per_partition)))
        inputs = self.input_size_per_partition
        parts = integer_products(codes, layer.weight.astype(ms.float32), inputs, EXACT_INPUTS_W8, self.multiply)
        total = integer_sum(parts, inputs <= EXACT_INPUTS_W8)
        out = total * token_scale * layer.w_scale.astype(ms.float32)
        return out if bias is None else out + bias


class W8A8StaticLinear(A8W8LinearMethod):
    """Parameters as MindFormers creates them: weight int8 [out, in], input_scale (a multiplier) and input_offset [in],
    deq_scale and quant_bias [out]."""

    def __init__(self, quant_config):
        super().__init__(quant_config)
        self.multiply = ops.MatMul(transpose_b=True)

    def apply(self, layer, x, weight=None, bias=None):
        x = x.reshape((-1, self.input_size_per_partition))
        codes = ops.round(x * layer.input_scale.astype(ms.float32)) + layer.input_offset.astype(ms.float32)
        codes = ops.clamp(codes, -128.0, 127.0)
        inputs = self.input_size_per_partition
        parts = integer_products(codes, layer.weight.astype(ms.float32), inputs, EXACT_INPUTS_W8, self.multiply)
        total = integer_sum(parts, inputs <= EXACT_INPUTS_W8)
        out = (total + layer.quant_bias.astype(ms.float32)) * layer.deq_scale
        return out if bias is None else out + bias


class W4A8DynamicLinear(LinearMethodBase):
    """int4 weights, per-token int8 activations; dense W4A8 does not exist in MindFormers.

    weight uint8 [out, in/2]: byte j holds inputs 2j (low nibble) and 2j + 1 (high nibble), each as code + 8.
    group_scale float32 [out, groups]. The even and the odd inputs are multiplied apart, so nothing is interleaved, and
    8 * sum(codes) is taken off again.
    """

    def __init__(self, quant_config):
        self.group_size = int(quant_config.full_config.get("group_size") or 0)
        self.multiply = ops.MatMul(transpose_b=True)
        self.multiply_groups = ops.BatchMatMul(transpose_b=True)

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, params_dtype, **extra_weight_attrs):
        outputs = sum(output_partition_sizes)
        self.input_size_per_partition, self.output_size_per_partition = input_size_per_partition, outputs
        self.groups = input_size_per_partition // self.group_size if self.group_size else 1
        weight = Parameter(initializer("zeros", (outputs, input_size_per_partition // 2), ms.uint8), name="weight",
                           requires_grad=False)
        scale = Parameter(initializer("ones", (outputs, self.groups), ms.float32), name="group_scale", requires_grad=False)
        for name, parameter in (("weight", weight), ("group_scale", scale)):
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
            layer.insert_param_to_cell(name, parameter)

    def apply(self, layer, x, weight=None, bias=None):
        inputs, outputs, groups = self.input_size_per_partition, self.output_size_per_partition, self.groups
        codes, token_scale = per_token_codes(x.reshape((-1, inputs)))
        packed = layer.weight.astype(ms.float32)
        high = ops.floor(packed * 0.0625)
        low = packed - high * 16.0
        if groups == 1:
            even, odd = codes[:, 0::2], codes[:, 1::2]
            parts = [*integer_products(even, low, inputs // 2, EXACT_INPUTS_W4, self.multiply),
                     *integer_products(odd, high, inputs // 2, EXACT_INPUTS_W4, self.multiply),
                     codes.sum(-1, keepdims=True) * -8.0]
            total = integer_sum(parts, inputs <= EXACT_INPUTS_W4)
            out = total * token_scale * layer.group_scale.reshape((1, outputs))
        else:
            grouped = codes.reshape((-1, groups, inputs // groups)).transpose((1, 0, 2))        # [groups, tokens, size]
            low = low.reshape((outputs, groups, -1)).transpose((1, 0, 2))                       # [groups, out, size/2]
            high = high.reshape((outputs, groups, -1)).transpose((1, 0, 2))
            total = (self.multiply_groups(grouped[:, :, 0::2], low) + self.multiply_groups(grouped[:, :, 1::2], high)
                     - grouped.sum(-1, keepdims=True) * 8.0)
            scale = layer.group_scale.transpose((1, 0)).expand_dims(1)                          # [groups, 1, out]
            out = (total * scale).sum(0) * token_scale
        return out if bias is None else out + bias


def _rope(**arguments):
    return Rope(kv_channels=arguments["kv_channels"], rotary_percent=arguments["rotary_percent"],
                rotary_base=arguments["rotary_base"], rotary_dtype=arguments["rotary_dtype"],
                rotary_cos_format=arguments["rotary_cos_format"],
                max_position_embeddings=arguments["original_max_position_embeddings"])


rope_utils.ROPE_FUNCTION["pangu_cpu_rope"] = _rope      # MindFormers' own table of rope kinds

BACKEND = Backend(
    norm=RMSNorm,
    core_attention=lambda num_blocks, block_size: ModuleSpec(
        module=PagedAttention, params={"num_blocks": num_blocks, "block_size": block_size}),
    rope_name="pangu_cpu_rope",
    gpt_model=CpuGPTModel,
    linear_methods={"W8A8": W8A8StaticLinear, "W8A8_DYNAMIC": W8A8DynamicLinear, "W4A8_DYNAMIC": W4A8DynamicLinear},
    dtypes={"compute_dtype": "float32", "params_dtype": "float32", "layernorm_compute_dtype": "float32",
            "rotary_dtype": "float32"},
    chunked_prefill=True,
    attention_mask=lambda queries: np.arange(queries, dtype=np.int32),
    new_caches=lambda layers, num_blocks, block_size, kv_heads, head_dim: None,
    dynamic_mask=([None], ms.int32),
)
