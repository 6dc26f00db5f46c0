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
from ms_pangu_quant.backends.cache import cache_codes, cache_grid_parameter
from ms_pangu_quant.backends.cut import Meeting, ranks_of, set_column_loader
from ms_pangu_quant.backends.hadamard import Hadamard
from ms_pangu_quant.recipe.scheme import W4A8, W8A8, W8A8_STATIC

EXACT_INPUTS_W8 = 1024  # 128 * 128 * 1024 = 2^24: the longest int8 dot product whose every partial sum float32 holds
EXACT_INPUTS_W4 = 16384  # 128 * 8 * 16384 = 2^24
TINY = 1.1754944e-38  # smallest normal float32


class RMSNorm(nn.Cell):
    """Same parameter and call as MindFormers' RMSNorm; the mean and the root are taken in float32."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.outer = ops.MatMul()
        self.weight = Parameter(
            initializer("ones", (hidden_size,), config.layernorm_compute_dtype), name="weight", requires_grad=False
        )

    def construct(self, x):
        wide = x.astype(ms.float32)
        scale = mint.rsqrt(mint.mean(mint.square(wide), -1, True) + self.eps)
        return (wide * self.outer(scale, self.weight.reshape((1, -1)))).astype(x.dtype)


class Rope(RotaryEmbedding):
    """Rotate-half rope on packed tokens; cos and sin [tokens, head_dim] are gathered by position, also in prefill."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        half = np.eye(self.dim // 2, dtype=np.float32)
        self.turn = Tensor(np.block([[0 * half, half], [-half, 0 * half]]))  # (left, right) @ turn = (-right, left)
        self.multiply = ops.MatMul()

    def _compute_cos_sin_cache(self):
        half = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        inverse = (1.0 / np.float32(self.rotary_base) ** half).astype(np.float32)
        angles = np.outer(np.arange(self.max_position_embeddings, dtype=np.float32), inverse)
        table = np.concatenate([angles, angles], axis=-1)
        return Tensor(np.cos(table).astype(np.float32)), Tensor(np.sin(table).astype(np.float32))

    def _rotate(self, x, cos, sin):
        heads = x.shape[-1] // self.dim
        turned = self.multiply(x.reshape((-1, self.dim)), self.turn).reshape((-1, heads * self.dim))
        return x * ops.tile(cos, (1, heads)) + turned * ops.tile(sin, (1, heads))

    def construct(self, query, key, rotary_pos_cos, rotary_pos_sin, seq_lens_tensor):
        return (self._rotate(query, rotary_pos_cos, rotary_pos_sin), self._rotate(key, rotary_pos_cos, rotary_pos_sin))


class PagedAttention(nn.Cell):
    """Writes keys and values to the paged cache, then attends to it; prefill, chunked prefill and batched decode.

    query [tokens, heads * head_dim], key and value [tokens, kv_heads * head_dim] are packed: sequence b contributes
    q_seq_lens[b] tokens, the last of which has position batch_valid_length[b] - 1. attn_mask is the additive mask
    [batch, max_query, kv_tokens] of visible_mask(); its shape tells the graph how far to pad.

    The query heads that share a key head are rows of one matrix, so keys are not copied for each of them, and heads come
    in front of tokens by gathers of whole rows (8x faster than Transpose).

    With a scheme for the cache it holds codes of `cache_grid`, and attention sees what they stand for, the new tokens' too.
    """

    def __init__(
        self,
        head_num,
        head_dim,
        kv_head_num,
        scale_value=1.0,
        num_blocks=1,
        block_size=16,
        cache=None,
        **unused,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = head_num, kv_head_num, head_dim
        self.scale = scale_value
        self.is_prefill = True
        self.block_size = block_size
        shape = (num_blocks * block_size * kv_head_num, head_dim)  # row = slot * kv_heads + head; a reshape would copy
        # A plain operator cannot write into an input tensor in a CPU graph, so the cell owns its cache.
        self.rounds_cache, dtype = cache is not None, ms.int8 if cache else ms.float32
        self.key_cache = Parameter(initializer("zeros", shape, dtype), name="key_cache", requires_grad=False)
        self.value_cache = Parameter(initializer("zeros", shape, dtype), name="value_cache", requires_grad=False)
        if cache:
            self.cache_grid = cache_grid_parameter(kv_head_num * head_dim)
        kv_head, head = np.arange(kv_head_num, dtype=np.int32), np.arange(head_num, dtype=np.int32)
        self.kv_head, self.head = Tensor(kv_head), Tensor(head)
        # [kv_heads, 1, block_size]: rows of a block, for each head
        self.block_rows = Tensor(np.arange(block_size, dtype=np.int32) * kv_head_num + kv_head[:, None, None])
        self.first_query = Tensor(np.zeros((kv_head_num, head_num // kv_head_num), np.int32))
        self.write = ops.ScatterUpdate()
        self.scores = ops.BatchMatMul(transpose_b=True)  # 3x faster than ops.matmul
        self.mix = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def construct(
        self,
        query,
        key,
        value,
        slot_mapping=None,
        block_tables=None,
        batch_valid_length=None,
        context_lens_tensor=None,
        q_seq_lens=None,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
        attn_mask=None,
        padding_mask=None,
        prefix=None,
        key_cache=None,
        value_cache=None,
    ):
        rows = (slot_mapping * self.kv_heads).expand_dims(1) + self.kv_head  # [tokens, kv_heads]
        if self.rounds_cache:
            key = cache_codes(key, self.cache_grid[0:1], self.cache_grid[1:2]).astype(ms.int8)
            value = cache_codes(value, self.cache_grid[2:3], self.cache_grid[3:4]).astype(ms.int8)
        keys = self.write(self.key_cache, rows, key.reshape((-1, self.kv_heads, self.head_dim)))
        values = self.write(self.value_cache, rows, value.reshape((-1, self.kv_heads, self.head_dim)))
        batch = block_tables.shape[0]
        blocks = (block_tables * (self.block_size * self.kv_heads)).reshape((batch, 1, -1, 1))
        rows = (blocks + self.block_rows).reshape((batch, self.kv_heads, -1))
        keys, values = ops.gather(keys, rows, 0), ops.gather(values, rows, 0)  # [batch, kv_heads, kv_tokens, head_dim]
        if self.rounds_cache:
            grid = self.cache_grid.reshape((4, self.kv_heads, 1, self.head_dim))
            keys = (keys.astype(ms.float32) - grid[1]) * grid[0]
            values = (values.astype(ms.float32) - grid[3]) * grid[2]
        query = query * self.scale
        group = self.heads // self.kv_heads
        if not self.is_prefill:
            query = query.reshape((-1, self.kv_heads, group, self.head_dim))
            context = self._attend(query, keys, values, ops.gather(attn_mask, self.first_query, 1))
            return context.reshape((-1, self.heads * self.head_dim))
        max_query = attn_mask.shape[1]
        offset = ops.arange(max_query)
        ends = ops.cumsum(q_seq_lens, 0)
        starts = ends - q_seq_lens
        head = self.head.expand_dims(1)
        # Row of query.reshape(-1, head_dim) for each head of each padded query; padding repeats the last token.
        row = starts.expand_dims(1) + ops.minimum(offset, (q_seq_lens - 1).expand_dims(1))  # [batch, max_query]
        row = ((row * self.heads).expand_dims(1) + head).reshape((batch, self.kv_heads, -1))
        query = ops.gather(query.reshape((-1, self.head_dim)), row, 0)  # [batch, kv_heads, group * max_query, head_dim]
        every_query = (ops.zeros_like(head) + offset).reshape((self.kv_heads, -1))
        context = self._attend(query, keys, values, ops.gather(attn_mask, every_query, 1))
        # And the way back: row of context.reshape(-1, head_dim) for each head of each token.
        token = ops.cumsum(ops.ones_like(slot_mapping), 0) - 1
        sequence = (token.expand_dims(1) >= ends).astype(ms.int32).sum(1)
        row = sequence * (self.heads * max_query) + token - ops.gather(starts, sequence, 0)
        row = row.expand_dims(1) + self.head * max_query  # [tokens, heads]
        return ops.gather(context.reshape((-1, self.head_dim)), row, 0).reshape((-1, self.heads * self.head_dim))

    def _attend(self, query, keys, values, mask):
        """query [batch, kv_heads, rows, head_dim], mask [batch, kv_heads, rows, kv_tokens] -> context, like query."""
        return self.mix(self.softmax(self.scores(query, keys) + mask), values)


def visible_mask(lengths, contexts, kv_tokens):
    """What attention adds to its scores, float32 [batch, max(lengths), kv_tokens]: 0 for keys up to the query's position.

    Made once for all layers: a comparison or a `where` that broadcasts costs 10x as much as adding.
    """
    position = np.asarray(contexts)[:, None] + np.arange(max(lengths))
    return np.where(np.arange(kv_tokens) <= position[:, :, None], np.float32(0), np.float32(-1e30))


class CpuGPTModel(GPTModel):
    """GPTModel without the two operators that have no CPU kernel (CumsumExt, MoveTo)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.move_lens_to_cpu = False
        self.is_chunked = True  # cos and sin are gathered by position in prefill too
        self.all_positions = False

    def pre_gather_func(self, output, context_lens_tensor, seq_lens_tensor):
        if self.is_prefill and not self.all_positions:
            output = self.gather(output, ops.cumsum(seq_lens_tensor - context_lens_tensor, 0) - 1, 0)
        return output


def per_token_codes(x, inputs, meeting=None, code_max=127.0):
    """Codes (as float32) [tokens, in] and scales [tokens, 1] of x [tokens, in]: scale = absmax / code_max, half to even.

    meeting  of the ranks that hold the other inputs of these tokens.
    A row of zeros gets scale 0 and codes 0; one with a NaN or an infinity gets a NaN code, so its outputs are all NaN.
    """
    absmax = ops.abs(x).max(-1, keepdims=True)
    scale = (absmax if meeting is None else meeting.largest(absmax)) / code_max
    divisor = ops.tile(ops.maximum(scale, TINY), (1, inputs))
    return ops.Rint()(x / divisor), scale


def exact_product(codes, weight, inputs, exact_inputs, multiply):
    """codes [tokens, in] times weight [out, in], integers held in float32, rounded once: slices of exact_inputs inputs
    are exact, and are added up in int32."""
    if inputs <= exact_inputs:
        return multiply(codes, weight)
    total = 0
    for start in range(0, inputs, exact_inputs):
        part = multiply(codes[:, start : start + exact_inputs], weight[:, start : start + exact_inputs])
        total = total + part.astype(ms.int32)
    lost = 0.0 * codes.sum(-1, keepdims=True)  # zero, or the NaN that an integer cannot hold
    return total.astype(ms.float32) + lost


def widened(weight, codes):
    """int8 weight as float32, not before codes are there.

    Without the dependency the casts of all layers run first, and the whole network is in memory in float32.
    """
    return ops.depend(weight, codes).astype(ms.float32)


class W8A8DynamicLinear(A8W8DynamicLinearMethod):
    """Parameters as MindFormers creates them: weight int8 [out, in], w_scale [out]."""

    def __init__(self, quant_config):
        super().__init__(quant_config)
        self.multiply, self.outer, self.add_bias = ops.MatMul(transpose_b=True), ops.MatMul(), ops.BiasAdd()
        self.meeting = Meeting()

    def apply(self, layer, x, weight=None, bias=None, group_list=None, **kwargs):
        inputs = self.input_size_per_partition
        codes, token_scale = per_token_codes(x.reshape((-1, inputs)), inputs, self.meeting)
        return self.scaled(self.meeting.total(self.sums(layer, codes)), token_scale, layer, bias)

    def sums(self, layer, codes):
        """Integer products of this rank's inputs, in float32."""
        return exact_product(
            codes, widened(layer.weight, codes), self.input_size_per_partition, EXACT_INPUTS_W8, self.multiply
        )

    def scaled(self, total, token_scale, layer, bias):
        bias = self.meeting.bias(layer, bias)
        out = total * self.outer(token_scale, layer.w_scale.astype(ms.float32).reshape((1, -1)))
        return out if bias is None else self.add_bias(out, bias)


class W8A8StaticLinear(A8W8LinearMethod):
    """Parameters as MindFormers creates them: weight int8 [out, in], input_scale (a multiplier) and input_offset [in],
    deq_scale and quant_bias [out]."""

    def __init__(self, quant_config):
        super().__init__(quant_config)
        self.multiply, self.outer, self.add_bias = ops.MatMul(transpose_b=True), ops.MatMul(), ops.BiasAdd()
        self.meeting = Meeting()

    def apply(self, layer, x, weight=None, bias=None):
        return self.scaled(self.meeting.total(self.sums(layer, x)), layer, bias)

    def sums(self, layer, x):
        """Integer products of this rank's inputs and what is added to them, in float32."""
        inputs = self.input_size_per_partition
        x = x.reshape((-1, inputs))
        ones = ops.ones_like(x[:, :1])
        codes = ops.Rint()(x * self.outer(ones, layer.input_scale.astype(ms.float32).reshape((1, -1))))
        codes = ops.clamp(self.add_bias(codes, layer.input_offset.astype(ms.float32)), -128.0, 127.0)
        codes = codes + 0.0 * x  # clamp makes a NaN -128; so a row with a NaN or an infinity becomes NaN
        total = exact_product(codes, widened(layer.weight, codes), inputs, EXACT_INPUTS_W8, self.multiply)
        return self.add_bias(total, layer.quant_bias.astype(ms.float32))

    def scaled(self, total, layer, bias):
        bias = self.meeting.bias(layer, bias)
        out = total * self.outer(ops.ones_like(total[:, :1]), layer.deq_scale.reshape((1, -1)))
        return out if bias is None else self.add_bias(out, bias)


class W4A8DynamicLinear(LinearMethodBase):
    """int4 weights, per-token int8 activations; dense W4A8 does not exist in MindFormers.

    weight uint8 [out, in/2]: byte j holds inputs 2j (low nibble) and 2j + 1 (high nibble), each as code + 8.
    group_scale float32 [out, groups]. A byte is unpacked by looking up its pair of codes, which then lie side by side.
    """

    def __init__(self, quant_config):
        self.group_size = int(quant_config.full_config.get("group_size") or 0)
        self.multiply, self.outer, self.add_bias = ops.MatMul(transpose_b=True), ops.MatMul(), ops.BiasAdd()
        self.meeting = Meeting()
        self.multiply_groups, self.outer_groups = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        byte = np.arange(256)
        self.codes_of_byte = Tensor(np.stack([byte % 16 - 8, byte // 16 - 8], axis=1).astype(np.float32))

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, params_dtype, **extra_weight_attrs):
        outputs = sum(output_partition_sizes)
        self.input_size_per_partition, self.output_size_per_partition = input_size_per_partition, outputs
        self.groups = input_size_per_partition // self.group_size if self.group_size else 1
        self.whole = self.groups * (ranks_of(layer) if self.group_size else 1) == 1  # one scale for each output channel
        # Rows of weight.reshape(out * groups, -1), groups first.
        self.by_group = Tensor(np.arange(outputs * self.groups, dtype=np.int32).reshape(outputs, self.groups).T)
        weight = Parameter(
            initializer("zeros", (outputs, input_size_per_partition // 2), ms.uint8), name="weight", requires_grad=False
        )
        scale = Parameter(initializer("ones", (outputs, self.groups), ms.float32), name="group_scale", requires_grad=False)
        for name, parameter in (("weight", weight), ("group_scale", scale)):
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
            set_column_loader(layer, parameter)
            layer.insert_param_to_cell(name, parameter)

    def _unpack(self, packed):
        return ops.gather(self.codes_of_byte, packed.astype(ms.int32), 0)

    def apply(self, layer, x, weight=None, bias=None):
        inputs = self.input_size_per_partition
        codes, token_scale = per_token_codes(x.reshape((-1, inputs)), inputs, self.meeting)
        return self.scaled(self.meeting.total(self.sums(layer, codes)), token_scale, layer, bias)

    def sums(self, layer, codes):
        """Of this rank's inputs, in float32: integer products, or with groups their sum, each group's times its scale."""
        inputs, outputs, groups = self.input_size_per_partition, self.output_size_per_partition, self.groups
        if self.whole:
            codes_w = self._unpack(ops.depend(layer.weight, codes)).reshape((outputs, inputs))
            return exact_product(codes, codes_w, inputs, EXACT_INPUTS_W4, self.multiply)
        size = inputs // groups
        packed = ops.depend(layer.weight, codes).reshape((outputs * groups, size // 2))
        packed = ops.gather(packed, self.by_group, 0)
        codes_w = self._unpack(packed).reshape((groups, outputs, size))
        row = ops.arange(codes.shape[0]) * groups + ops.arange(groups).expand_dims(1)  # [groups, tokens]
        total = self.multiply_groups(ops.gather(codes.reshape((-1, size)), row, 0), codes_w)  # [groups, tokens, out]
        scale = layer.group_scale.transpose((1, 0)).expand_dims(1)  # [groups, 1, out]
        scale = self.outer_groups(ops.ones_like(total[:, :, :1]), scale)  # a broadcast is slower
        return (total * scale).sum(0)

    def scaled(self, total, token_scale, layer, bias):
        bias = self.meeting.bias(layer, bias)
        if self.whole:
            out = total * self.outer(token_scale, layer.group_scale.reshape((1, -1)))
        else:
            out = total * ops.tile(token_scale, (1, self.output_size_per_partition))
        return out if bias is None else self.add_bias(out, bias)


def rope(cell, arguments):
    """MindFormers' arguments of a rope kind -> a cell of ours."""
    return cell(
        kv_channels=arguments["kv_channels"],
        rotary_percent=arguments["rotary_percent"],
        rotary_base=arguments["rotary_base"],
        rotary_dtype=arguments["rotary_dtype"],
        rotary_cos_format=arguments["rotary_cos_format"],
        max_position_embeddings=arguments["original_max_position_embeddings"],
    )


def _rope(**arguments):
    return rope(Rope, arguments)


rope_utils.ROPE_FUNCTION["pangu_cpu_rope"] = _rope  # MindFormers' own table of rope kinds

BACKEND = Backend(
    norm=RMSNorm,
    mlp=None,
    core_attention=lambda **sizes: ModuleSpec(module=PagedAttention, params=sizes),
    rope_name="pangu_cpu_rope",
    gpt_model=CpuGPTModel,
    linear_methods={W8A8_STATIC: W8A8StaticLinear, W8A8: W8A8DynamicLinear, W4A8: W4A8DynamicLinear},
    hadamard=Hadamard,
    dtypes={
        "compute_dtype": "float32",
        "params_dtype": "float32",
        "layernorm_compute_dtype": "float32",
        "rotary_dtype": "float32",
    },
    chunked_prefill=True,
    attention_mask=lambda *lengths: Tensor(visible_mask(*lengths)),
    new_caches=lambda *sizes, cache: None,
    dynamic_mask=([None, None, None], ms.float32),
)
