"""The Ascend backend: MindFormers' own cells and its W8A8 linear methods, as they are.

Nothing here has been run on an NPU. Dense W4A8 does not exist in MindFormers and has no method here yet, so a W4A8
directory is refused when it is loaded rather than computed in some other precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindformers.parallel_core.inference.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.inference.quantization.golden_stick.a8dynw8 import A8W8DynamicLinearMethod
from mindformers.parallel_core.inference.quantization.golden_stick.a8w8 import A8W8LinearMethod
from mindformers.parallel_core.inference.transformer.flash_attention import FlashAttention
from mindformers.parallel_core.inference.transformer.norm import RMSNorm
from mindspore import Tensor, mutable

from ms_pangu_quant.backends import Backend

_MASK = 128  # FlashAttentionScore's compressed causal mask is a triangle of this size


def _causal_mask(lengths: Sequence[int], contexts: Sequence[int], kv_tokens: int) -> Tensor:
    return Tensor(np.triu(np.ones((_MASK, _MASK), np.float32), 1), ms.bfloat16)


def _new_caches(layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int):
    def caches():
        return mutable(
            [Tensor(np.zeros((num_blocks, block_size, kv_heads, head_dim), np.float32), ms.bfloat16) for _ in range(layers)]
        )

    return caches(), caches()


BACKEND = Backend(
    norm=RMSNorm,
    mlp=None,
    core_attention=lambda num_blocks, block_size: FlashAttention,
    rope_name="rope",
    gpt_model=GPTModel,
    linear_methods={"W8A8": A8W8LinearMethod, "W8A8_DYNAMIC": A8W8DynamicLinearMethod},
    dtypes={
        "compute_dtype": "bfloat16",
        "params_dtype": "bfloat16",
        "layernorm_compute_dtype": "float32",
        "rotary_dtype": "bfloat16",
    },
    chunked_prefill=False,
    attention_mask=_causal_mask,
    new_caches=_new_caches,
    dynamic_mask=([None, None], ms.bfloat16),
)
