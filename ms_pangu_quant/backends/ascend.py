"""The Ascend backend: MindFormers' own cells and W8A8 linear methods, and the dense W4A8 that MindFormers lacks.

Dense W4A8 is computed as one group of GroupedMatmulV4, int8 activations times int4 weights: the operator that MindFormers'
expert layers use on Atlas A2. CANN documents it for groups of 256 inputs; a scale for each output channel is written as
equal scales of such groups. Weights with other group sizes are multiplied by WeightQuantBatchMatmul instead, which leaves
the activations in floating point (W4A16: the memory of int4, no integer arithmetic), and says so.

Nothing here has been run on an NPU. network/graph.py exports the graphs on the CPU front end, where operators, types and
shapes are checked, and the tensors handed to the operators are checked against their documented formulas.
"""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
from mindformers.parallel_core.inference.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.inference.quantization.golden_stick.a8dynw8 import A8W8DynamicLinearMethod
from mindformers.parallel_core.inference.quantization.golden_stick.a8w8 import A8W8LinearMethod
from mindformers.parallel_core.inference.tensor_parallel.layers import LinearMethodBase
from mindformers.parallel_core.inference.transformer.flash_attention import FlashAttention
from mindformers.parallel_core.inference.transformer.norm import RMSNorm
from mindformers.parallel_core.inference.weights_utils import set_weight_attrs
from mindspore import Parameter, Tensor, mint, mutable, ops
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import DynamicQuantExt, GroupedMatmulV4, QuantV2, WeightQuantBatchMatmul

from ms_pangu_quant.backends import Backend
from ms_pangu_quant.backends.cache import cache_grid_parameter
from ms_pangu_quant.backends.cut import set_column_loader
from ms_pangu_quant.backends.hadamard import Hadamard
from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.formats import packing
from ms_pangu_quant.recipe.scheme import W4A8, W8A8, W8A8_STATIC, TensorScheme

# aclnnGroupedMatmulV5, "A8W4" (CANN, ops-transformer): quantGroupSize 256, n a multiple of 8, k at most 18432.
GROUPED_SIZE, GROUPED_OUTPUTS, GROUPED_INPUTS = 256, 8, 18432
# aclnnWeightQuantBatchMatmulV2: antiquantGroupSize is 0 (per channel), or a multiple of 32 from 32 to k - 1.
WEIGHT_ONLY_MULTIPLE = 32
_MASK = 128  # FlashAttentionScore's compressed causal mask is a triangle of this size
_log = logging.getLogger(__name__)


class Int4Linear(LinearMethodBase):
    """What both ways of computing have in common: int4 weights as they are loaded.

    Loaded as weight uint8 [out, in/2] and group_scale float32 [out, groups], the layout of formats.parameters'
    runtime_tensors, whose two axes MindFormers' loaders can fuse and slice; process_weights_after_loading() makes the
    operator's own tensors of them.
    """

    def __init__(self, quant_config) -> None:
        self.group_size = int(quant_config.full_config.get("group_size") or 0)
        self.add_bias = ops.Add()

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, params_dtype, **extra_weight_attrs):
        inputs, outputs = input_size_per_partition, sum(output_partition_sizes)
        self.inputs, self.outputs, self.dtype = inputs, outputs, params_dtype
        self.groups = inputs // self.group_size if self.group_size else 1
        if self.group_size and inputs % self.group_size:
            raise BackendError(
                f"int4 groups of {self.group_size} do not divide the {inputs} inputs that one device holds; use fewer "
                "devices"
            )
        self.check()
        weight = Parameter(initializer("zeros", (outputs, inputs // 2), ms.uint8), name="weight", requires_grad=False)
        scale = Parameter(initializer("ones", (outputs, self.groups), ms.float32), name="group_scale", requires_grad=False)
        for name, parameter in (("weight", weight), ("group_scale", scale)):
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
            set_column_loader(layer, parameter)
            layer.insert_param_to_cell(name, parameter)

    def check(self) -> None:
        """Raises BackendError where the operator cannot take this layer."""

    def loaded(self, layer) -> tuple[np.ndarray, np.ndarray]:
        """Bytes int8 [in, out/2], even output channels in the low nibble, and scales float32 [groups, out]."""
        codes = packing.unpack_offset_along_in(layer.weight.asnumpy())
        return packing.pack_along_out(codes), np.ascontiguousarray(layer.group_scale.asnumpy().T)


class W4A8GroupedLinear(Int4Linear):
    """int8 activations, scaled token by token, times int4 weights in integers.

    y = ((x - 8) @ (w * scale) + gmm_bias) * token_scale with gmm_bias = 8 * sum over inputs of w * scale, as CANN documents
    the operator, which is x @ (w * scale) * token_scale.
    """

    def __init__(self, quant_config) -> None:
        super().__init__(quant_config)
        self.quantize, self.multiply = DynamicQuantExt(), GroupedMatmulV4()

    def check(self) -> None:
        if self.inputs % GROUPED_SIZE or self.inputs > GROUPED_INPUTS or self.outputs % GROUPED_OUTPUTS:
            raise BackendError(
                f"a W4A8 layer of {self.inputs} inputs and {self.outputs} outputs on one device: GroupedMatmulV4 takes a "
                f"multiple of {GROUPED_SIZE} inputs up to {GROUPED_INPUTS} and a multiple of {GROUPED_OUTPUTS} outputs; "
                "use fewer devices, or w4a8='weight_only'"
            )

    def process_weights_after_loading(self, layer) -> None:
        packed, scale = self.loaded(layer)
        sums = packing.unpack_along_out(packed).T.reshape(len(scale), -1, self.outputs).sum(1)  # of codes, [groups, out]
        bias = 8 * (sums * scale.astype(np.float64)).sum(0)
        scale = np.repeat(scale, self.inputs // GROUPED_SIZE // len(scale), axis=0)
        bits = scale.view(np.uint32).astype(np.uint64)  # a float32 in the low word
        layer.weight = Parameter(Tensor(packed[None], ms.qint4x2), name=layer.weight.name, requires_grad=False)
        layer.group_scale = Parameter(Tensor(bits[None]), name=layer.group_scale.name, requires_grad=False)
        name = layer.weight.name.removesuffix("weight") + "gmm_bias"
        layer.gmm_bias = Parameter(Tensor(bias[None].astype(np.float32)), name=name, requires_grad=False)

    def apply(self, layer, x, weight=None, bias=None, group_list=None, **kwargs):
        codes, token_scale = self.quantize(x.reshape((-1, self.inputs)), None)
        tokens = ops.scalar_to_tensor(codes.shape[0], ms.int64).reshape((1,))
        out = self.multiply(
            [codes],
            [layer.weight],
            [layer.gmm_bias],
            [layer.group_scale],
            None,
            None,
            None,
            [token_scale.reshape(-1)],
            tokens,
            split_item=3,
            group_type=0,
            group_list_type=1,
        )[0]
        return out if bias is None else self.add_bias(out, bias)


class W4A16Linear(Int4Linear):
    """int4 weights widened on the fly, activations left in bfloat16 or float16: saves memory, not arithmetic."""

    def __init__(self, quant_config) -> None:
        super().__init__(quant_config)
        self.multiply = WeightQuantBatchMatmul(False, False, self.group_size)

    def check(self) -> None:
        if self.group_size % WEIGHT_ONLY_MULTIPLE or (self.group_size and self.group_size >= self.inputs):
            raise BackendError(
                f"int4 groups of {self.group_size} in a layer of {self.inputs} inputs: WeightQuantBatchMatmul takes a "
                f"multiple of {WEIGHT_ONLY_MULTIPLE} below the number of inputs, or one scale per channel"
            )

    def process_weights_after_loading(self, layer) -> None:
        packed, scale = self.loaded(layer)
        scale = scale if self.group_size else scale[0]
        layer.weight = Parameter(Tensor(packed, ms.qint4x2), name=layer.weight.name, requires_grad=False)
        layer.group_scale = Parameter(Tensor(scale).astype(self.dtype), name=layer.group_scale.name, requires_grad=False)

    def apply(self, layer, x, weight=None, bias=None, group_list=None, **kwargs):
        x = x.reshape((-1, self.inputs))
        out = self.multiply(x, layer.weight, layer.group_scale, None, None, None, None)
        return out if bias is None else self.add_bias(out, bias)


def int4_method(quant_config) -> Int4Linear:
    """As full_config["w4a8"] says: grouped, weight_only, or auto, which computes in integers where the operator can."""
    chosen = quant_config.full_config.get("w4a8", "auto")
    size = int(quant_config.full_config.get("group_size") or 0)
    if chosen == "auto":
        chosen = "weight_only" if size % GROUPED_SIZE else "grouped"
    if chosen not in ("grouped", "weight_only"):
        raise BackendError(f"w4a8: got {chosen!r}, wanted auto, grouped or weight_only")
    if chosen == "grouped" and size % GROUPED_SIZE:
        raise BackendError(
            f"w4a8='grouped': the weights have groups of {size} inputs, GroupedMatmulV4 takes multiples of {GROUPED_SIZE} "
            "or one scale per channel (recipes w4a8, w4a8_g256)"
        )
    if chosen == "weight_only":
        _warn_weight_only(quant_config, size)
        return W4A16Linear(quant_config)
    return W4A8GroupedLinear(quant_config)


def _warn_weight_only(quant_config, size: int) -> None:
    """Once for each network: what is computed is not what the recipe is called."""
    if not quant_config.full_config.setdefault("w4a8_warned", False):
        quant_config.full_config["w4a8_warned"] = True
        _log.warning("W4A8 with group size %d is computed as W4A16 here: int4 weights, activations not quantized", size)


class AscendGPTModel(GPTModel):
    """GPTModel that can also give logits after every token, which MindFormers' prefill does not."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.all_positions = False

    def pre_gather_func(self, output, context_lens_tensor, seq_lens_tensor):
        if self.is_prefill and not self.all_positions:
            ends = mint.sub(mint.cumsum(mint.sub(seq_lens_tensor, context_lens_tensor), 0), 1)
            output = self.gather(output, ends, 0)
        return output


class Int8CacheAttention(FlashAttention):
    """MindFormers' attention with int8 caches: prefill attends to the float keys and values, decoding to the cache.

    Keys and values are rounded by QuantV2, which documents round(x * scale + offset), and read by PagedAttention, whose
    antiquant inputs Golden Stick fills for a bfloat16 network with float16 scales and with the zero points negated:
    x = (code + antiquant_offset) * antiquant_scale.
    Source: mindspore_gs 1.4, ptq/hal.py, C8PagedAttentionCell and QuantV2Cell.
    """

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.quantize = QuantV2()
        channels = self.kv_head_num * self.hidden_size_per_attention_head
        self.cache_grid = cache_grid_parameter(channels)

    def process_grid_after_loading(self) -> None:
        """Make the operators' own tensors of the grid. Raises BackendError for scales that their dtypes cannot hold."""
        grid = self.cache_grid.asnumpy()
        scale, offset = grid[0::2], grid[1::2]  # [2, channels]: keys, values
        held = scale.astype(np.float16)
        if not np.array_equal(held.astype(np.float32), scale):
            raise BackendError(
                f"{self.cache_grid.name}: scales from {scale.min():.3g} to {scale.max():.3g} are not float16 values, which "
                "PagedAttention takes; serve this model with a float cache"
            )
        tensors = {"antiquant_scale": Tensor(held), "antiquant_offset": Tensor(-offset.astype(np.float16))}
        for place, name in enumerate(("key", "value")):
            tensors[f"{name}_factor"] = Tensor(1 / scale[place], ms.bfloat16)
            tensors[f"{name}_offset"] = Tensor(offset[place].astype(np.int8))
        prefix = self.cache_grid.name.removesuffix("cache_grid")
        for name, tensor in tensors.items():
            setattr(self, name, Parameter(tensor, name=prefix + name, requires_grad=False))

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
        keys = self.quantize(key, self.key_factor, self.key_offset, False, "ROUND", ms.int8)
        values = self.quantize(value, self.value_factor, self.value_offset, False, "ROUND", ms.int8)
        self.reshape_and_cache(keys, values, key_cache, value_cache, slot_mapping)
        if self.is_prefill:
            _, _, _, context = self.flash_attention(
                query, key, value, None, None, padding_mask, attn_mask, prefix, actual_seq_qlen, actual_seq_kvlen
            )
            return context
        return self.paged_attention(
            query,
            key_cache,
            value_cache,
            block_tables,
            batch_valid_length,
            self.antiquant_scale,
            self.antiquant_offset,
            attn_mask,
            q_seq_lens,
        )


def _new_caches(layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, *, cache: TensorScheme | None):
    shape, dtype = (num_blocks, block_size, kv_heads, head_dim), ms.int8 if cache else ms.bfloat16

    def caches():
        return mutable([Tensor(np.zeros(shape, np.float32), dtype) for _ in range(layers)])

    return caches(), caches()


BACKEND = Backend(
    norm=RMSNorm,
    mlp=None,
    core_attention=lambda *, cache, **sizes: Int8CacheAttention if cache else FlashAttention,
    rope_name="rope",
    gpt_model=AscendGPTModel,
    linear_methods={W8A8_STATIC: A8W8LinearMethod, W8A8: A8W8DynamicLinearMethod, W4A8: int4_method},
    hadamard=Hadamard,
    dtypes={
        "compute_dtype": "bfloat16",
        "params_dtype": "bfloat16",
        "layernorm_compute_dtype": "float32",
        "rotary_dtype": "bfloat16",
    },
    chunked_prefill=False,
    attention_mask=lambda *lengths: Tensor(np.triu(np.ones((_MASK, _MASK), np.float32), 1), ms.bfloat16),
    new_caches=_new_caches,
    dynamic_mask=([None, None], ms.bfloat16),
)
