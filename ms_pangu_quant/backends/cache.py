"""What the backends' attention cells have in common of an int8 cache: its grid, and rounding to it in plain operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, ops
from mindspore.common.initializer import initializer


def cache_codes(x, scale, offset):
    """Codes, as float32, of x [.., n] in an int8 cache with scale and offset [1, n]: quantizers.kv_cache.CacheGrid.

    int8 holds no NaN: it becomes -128, and an infinity the last code on its side.
    """
    return ops.clamp(ops.Rint()(x * (1.0 / scale)) + offset, -128.0, 127.0)


def on_cache_grid(x, scale, offset):
    """What an int8 cache gives back of x [.., n]."""
    return (cache_codes(x, scale, offset) - offset) * scale


def cache_grid_parameter(channels: int) -> Parameter:
    """[4, kv_heads * head_dim], quantizers.kv_cache.QuantizedCache.rows(); is loaded as a weight is."""
    return Parameter(initializer("ones", (4, channels), ms.float32), name="cache_grid", requires_grad=False)
