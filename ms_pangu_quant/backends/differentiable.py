"""The CPU backend's plain operators without a cache: a float network that MindSpore's autodiff goes through.

Attention writes into no parameter and gathers from none, which have no derivative. Its sequences come whole, side by side.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from mindformers.parallel_core.utils.spec_utils import ModuleSpec
from mindspore import Tensor, nn, ops

from ms_pangu_quant.backends import cpu


class DenseAttention(nn.Cell):
    """Called as cpu.PagedAttention, of whole sequences; attn_mask is that of dense_mask()."""

    def __init__(self, head_num, head_dim, kv_head_num, scale_value=1.0, **unused):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = head_num, kv_head_num, head_dim
        self.scale = scale_value
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.softmax, self.transpose = ops.Softmax(-1), ops.Transpose()

    def construct(self, query, key, value, attn_mask=None, **unused):
        group = self.heads // self.kv_heads
        query = (query * self.scale).reshape((-1, self.kv_heads, group, self.head_dim))
        query = self.transpose(query, (1, 2, 0, 3)).reshape((self.kv_heads, -1, self.head_dim))
        key = self.transpose(key.reshape((-1, self.kv_heads, self.head_dim)), (1, 0, 2))
        value = self.transpose(value.reshape((-1, self.kv_heads, self.head_dim)), (1, 0, 2))
        scores = self.scores(query, key) + ops.tile(attn_mask, (1, group, 1))
        context = self.mix(self.softmax(scores), value).reshape((self.heads, -1, self.head_dim))
        return self.transpose(context, (1, 0, 2)).reshape((-1, self.heads * self.head_dim))


def dense_mask(lengths, contexts, kv_tokens):
    """What attention adds to its scores, float32 [1, tokens, tokens]: 0 for a sequence's own tokens up to the query."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    seen = np.tril(sequence[:, None] == sequence)
    return Tensor(np.where(seen, np.float32(0), np.float32(-1e30))[None])


BACKEND = replace(
    cpu.BACKEND,
    core_attention=lambda **sizes: ModuleSpec(module=DenseAttention, params=sizes),
    attention_mask=dense_mask,
)
