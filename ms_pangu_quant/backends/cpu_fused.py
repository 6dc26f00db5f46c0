"""The CPU backend with C++ kernels: the same cells as cpu.py, one operator each (a quantized block: one, cpu_block.py).

Linear layers give the bits of the plain ones: integer sums are exact and the float operations after them are the same, in
the same order. Norm, rope, SwiGLU and attention agree up to float32 rounding. Weights are packed in place when they have
been loaded, so they are in memory once.
"""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
from mindformers.parallel_core.inference.base_models.common.embeddings import rope_utils
from mindformers.parallel_core.inference.tensor_parallel.layers import UnquantizedLinearMethod
from mindformers.parallel_core.inference.transformer.mlp import MLP
from mindformers.parallel_core.utils.spec_utils import ModuleSpec
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer

from ms_pangu_quant.backends import Backend, cpu
from ms_pangu_quant.backends.cache import cache_grid_parameter
from ms_pangu_quant.backends.cpu_block import FusedBlock
from ms_pangu_quant.backends.cpu_operators import operator
from ms_pangu_quant.backends.cpu_tables import TableGPTModel
from ms_pangu_quant.backends.cut import ranks_of
from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.kernels.library import kernels
from ms_pangu_quant.recipe.scheme import W4A8, W8A8, W8A8_STATIC
from ms_pangu_quant.transforms.hadamard import hadamard_core, online_scale

LANES = 16  # keys and head dimensions of the cache are padded to whole vectors
LARGEST_SHARE = 32  # query heads to one key head: rows of a tile in layer.h
LARGEST_INPUT = 65536  # partial sums of an integer product fit int32
LARGEST_CORE = 512  # order of a Hadamard matrix from which on a product is faster than its sums of four rows


class RMSNorm(cpu.RMSNorm):
    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.kernel = operator(kernels(), "PanguRMSNorm")
        self.epsilon = Tensor([eps], ms.float32)

    def construct(self, x):
        return self.kernel(x, self.weight, self.epsilon)


class Rope(cpu.Rope):
    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.kernel = operator(kernels(), "PanguRope")

    def _rotate(self, x, cos, sin):
        return self.kernel(x, cos, sin)


class SwiGLUMLP(MLP):
    """MindFormers' MLP with silu(gate) * up as one operator."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.kernel = operator(kernels(), "PanguSwiGLU")

    def gated(self, gate_and_up):
        """silu(gate) * up [tokens, inner] of what linear_fc1 gives [tokens, 2 * inner]."""
        return self.kernel(gate_and_up)

    def construct(self, hidden_states):
        return self.linear_fc2(self.gated(self.linear_fc1(hidden_states)))


class Hadamard(nn.Cell):
    """backends/hadamard.py's of float32. signs, scale: of the kernel, see hadamard.h."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        core = hadamard_core(size)
        fours = (core.T < 0).reshape((len(core), -1, 4))
        self.signs = Tensor(np.packbits(fours, axis=2, bitorder="little")[:, :, 0])
        self.scale = Tensor([online_scale(size)], ms.float32)
        self.kernel = operator(kernels(), "PanguHadamard")

    def construct(self, x):
        return self.kernel(x, self.signs, self.scale)


def hadamard(size: int, dtype):
    """In plain operators where the core is too large for the kernel, as of 11008 = 5504 * 2, or there is none."""
    small = size >= 4 and len(hadamard_core(size)) <= LARGEST_CORE
    return Hadamard(size) if small else cpu.BACKEND.hadamard(size, dtype)


class PagedAttention(nn.Cell):
    """Called as cpu.PagedAttention; needs no mask, since a query's position follows from the lengths.

    key_cache [blocks, kv_heads, head_dim, block_size] and value_cache [blocks, kv_heads, block_size, head_dim rounded up],
    float32, or int8 with a parameter cache_grid; without it cache_grid is one element.
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
        if block_size % LANES:
            raise BackendError(f"block_size: got {block_size}, wanted a multiple of {LANES}")
        if head_num > LARGEST_SHARE * kv_head_num:
            raise BackendError(f"{head_num} heads share {kv_head_num} key heads, wanted at most {LARGEST_SHARE} to one")
        keys = (num_blocks, kv_head_num, head_dim, block_size)
        values = (num_blocks, kv_head_num, block_size, -(-head_dim // LANES) * LANES)
        dtype = ms.int8 if cache else ms.float32
        self.key_cache = Parameter(initializer("zeros", keys, dtype), name="key_cache", requires_grad=False)
        self.value_cache = Parameter(initializer("zeros", values, dtype), name="value_cache", requires_grad=False)
        self.cache_grid = Tensor([0], ms.float32)
        if cache:
            self.cache_grid = cache_grid_parameter(kv_head_num * head_dim)
        self.scale = Tensor([scale_value], ms.float32)
        self.kernel = operator(kernels(), "PanguAttention")

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
        return self.kernel(
            query,
            key,
            value,
            self.key_cache,
            self.value_cache,
            slot_mapping,
            block_tables,
            batch_valid_length,
            q_seq_lens,
            self.scale,
            self.cache_grid,
        )


def _prepare(method, layer, name: str) -> None:
    """What every linear method needs: its kernel, and what stands for missing parameters."""
    if method.input_size_per_partition > LARGEST_INPUT:
        raise BackendError(f"{layer.weight.name}: {method.input_size_per_partition} inputs, wanted at most {LARGEST_INPUT}")
    # Memory that no one has touched: MindFormers' initializer would fill it, at the speed of its reading from disk.
    layer.weight.set_data(ms.from_numpy(np.empty(layer.weight.shape, ms.dtype_to_nptype(layer.weight.dtype))))
    method.kernel = operator(kernels(), name)
    # For a kernel that has no use for one of its inputs.
    method.none, method.none_i8, method.none_i32 = (Tensor(np.zeros(1, kind)) for kind in (np.float32, np.int8, np.int32))
    if ranks_of(layer) == 1:
        return
    # Its token scales and sums need the other ranks: codes go in and sums come out.
    method.code_kernel = operator(kernels(), "PanguW4A8Codes" if "W4" in name else "PanguW8A8Static")
    inputs, outputs = method.input_size_per_partition, method.output_size_per_partition
    method.no_factor, method.no_offset = Tensor(np.ones(inputs, np.float32)), Tensor(np.zeros(inputs, np.int8))
    method.no_scale, method.no_sum = Tensor(np.ones((outputs, 1), np.float32)), Tensor(np.zeros(outputs, np.int32))


class _Kernel:
    """In front of a linear method of cpu.py: an int8 one, as far as packing goes. name: of its kernel."""

    name: str

    def create_weights(self, layer, *arguments, **keywords):
        weight = super().create_weights(layer, *arguments, **keywords)
        _prepare(self, layer, self.name)
        return weight

    def process_weights_after_loading(self, layer):
        kernels().functions.pangu_pack_w8(layer.weight.asnumpy().ctypes.data, *layer.weight.shape)


class W8A8DynamicLinear(_Kernel, cpu.W8A8DynamicLinear):
    name = "PanguW8A8Dynamic"

    def apply(self, layer, x, weight=None, bias=None, group_list=None, **kwargs):
        if self.meeting.size > 1:
            return super().apply(layer, x, weight, bias)
        x = x.reshape((-1, self.input_size_per_partition))
        return self.kernel(x, layer.weight, layer.w_scale, self.none if bias is None else bias)

    def block_parameters(self, layer):
        bias = layer.bias if layer.has_bias else self.none
        return layer.weight, layer.w_scale, self.none, self.none_i8, self.none_i32, bias

    def sums(self, layer, codes):
        one, zero = self.no_scale.reshape(-1), self.no_sum
        return self.code_kernel(codes, layer.weight, one, self.no_factor, self.no_offset, zero, self.none)


class W8A8StaticLinear(_Kernel, cpu.W8A8StaticLinear):
    name = "PanguW8A8Static"

    def apply(self, layer, x, weight=None, bias=None):
        if self.meeting.size > 1:
            return super().apply(layer, x, weight, bias)
        return self._computed(layer, x, layer.deq_scale, self.none if bias is None else bias)

    def sums(self, layer, x):
        return self._computed(layer, x, self.no_scale.reshape(-1), self.none)

    def _computed(self, layer, x, scale, bias):
        return self.kernel(
            x.reshape((-1, self.input_size_per_partition)),
            layer.weight,
            scale,
            layer.input_scale,
            layer.input_offset,
            layer.quant_bias,
            bias,
        )

    def block_parameters(self, layer):
        bias = layer.bias if layer.has_bias else self.none
        return layer.weight, layer.deq_scale, layer.input_scale, layer.input_offset, layer.quant_bias, bias


class W4A8DynamicLinear(_Kernel, cpu.W4A8DynamicLinear):
    name = "PanguW4A8Dynamic"

    def process_weights_after_loading(self, layer):
        outputs, inputs = layer.weight.shape[0], self.input_size_per_partition
        functions = kernels().functions
        functions.pangu_pack_w4(layer.weight.asnumpy().ctypes.data, outputs, inputs, inputs // self.groups)
        functions.pangu_pack_scale(layer.group_scale.asnumpy().ctypes.data, outputs, self.groups)

    def apply(self, layer, x, weight=None, bias=None):
        if self.meeting.size > 1:
            return super().apply(layer, x, weight, bias)
        x = x.reshape((-1, self.input_size_per_partition))
        return self.kernel(x, layer.weight, layer.group_scale, self.none if bias is None else bias)

    def block_parameters(self, layer):
        bias = layer.bias if layer.has_bias else self.none
        return layer.weight, layer.group_scale, self.none, self.none_i8, self.none_i32, bias

    def sums(self, layer, codes):
        scale = self.no_scale if self.whole else layer.group_scale
        return self.code_kernel(codes, layer.weight, scale, self.no_factor, self.no_offset)


class FloatLinear(UnquantizedLinearMethod):
    """Of many tokens at a time; its weight is packed once for all of them."""

    name, pack = "PanguFloat", "pangu_pack_f32"

    def __init__(self, quant_config=None):
        super().__init__()
        self.kernel, self.none = operator(kernels(), self.name), Tensor(np.zeros(1, np.float32))

    def process_weights_after_loading(self, layer):
        getattr(kernels().functions, self.pack)(layer.weight.asnumpy().ctypes.data, *layer.weight.shape)

    def apply(self, layer, x, weight=None, bias=None):
        x = x.reshape((-1, self.input_size_per_partition))
        return self.kernel(x, layer.weight, self.none if bias is None else bias)


class Bfloat16Linear(FloatLinear):
    """Inputs and weight rounded to bfloat16, their products added up in float32; the parameter stays one of float32."""

    name, pack = "PanguBfloat16", "pangu_pack_bfloat16"


# MindFormers' own table of rope kinds
rope_utils.ROPE_FUNCTION["pangu_cpu_fused_rope"] = lambda **arguments: cpu.rope(Rope, arguments)

BACKEND: Backend = replace(
    cpu.BACKEND,
    norm=RMSNorm,
    layer=FusedBlock,
    mlp=SwiGLUMLP,
    core_attention=lambda **sizes: ModuleSpec(module=PagedAttention, params=sizes),
    rope_name="pangu_cpu_fused_rope",
    gpt_model=lambda **arguments: TableGPTModel(kernels(), **arguments),
    linear_methods={  # what has no kernel is computed in plain operators
        **cpu.BACKEND.linear_methods,
        W8A8_STATIC: W8A8StaticLinear,
        W8A8: W8A8DynamicLinear,
        W4A8: W4A8DynamicLinear,
    },
    hadamard=hadamard,
    attention_mask=lambda *lengths: Tensor(np.zeros((1, 1, 1), np.float32)),  # none is looked at
    bfloat16_tables=True,
    integer_kernels=True,
    float_method=lambda bfloat16: Bfloat16Linear if bfloat16 and kernels().bfloat16 else FloatLinear,
)
