"""int8 keys and values: the grid on which the cache holds them, and how its range is chosen on calibration data.

Keys are rounded as they are written to the cache, after rope, and values as they are made. Every head and channel may
have a scale of its own, which costs nothing when the cache is read: a key channel's scale is multiplied into the query, a
value channel's into the result. For the same reason a zero point is nearly free: a key's adds the same number to all scores
of a query, which softmax ignores, and a value's is subtracted from the result, since the weights sum to one.

What is stored is a scale and a zero point for each channel, as msModelSlim's "C8" has it; one scale for a whole head is the
same scale in all its channels.

Source  Liu et al. 2024 (KIVI, arXiv:2402.02750), Hooper et al. 2024 (KVQuant, arXiv:2401.18079): keys have outlier channels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.ranges import RangeStats
from ms_pangu_quant.calibration.statistics import Needs
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.grid import round_up_to_bfloat16
from ms_pangu_quant.recipe.settings import check_types

CODE_MIN, CODE_MAX = -128, 127
_SHRINKS = np.linspace(1.0, 0.3, 36)
_TINY = np.float32(2.0**-120)  # a scale whose reciprocal is a float32 too


@dataclass(frozen=True)
class CacheGrid:
    """A number x becomes the code clip(rint(x / scale) + offset, -128, 127), and is read as (code - offset) * scale.

    scale   [kv_heads, head_dim] float32, > 0, as a rule bfloat16 values.
    offset  [kv_heads, head_dim] int8: the code of 0.
    """

    scale: NDArray[np.float32]
    offset: NDArray[np.int8]

    def codes(self, x: NDArray[np.float32]) -> NDArray[np.int8]:
        """x [tokens, kv_heads, head_dim] -> int8 of the same shape; half to even, as x * (1 / scale) in float32."""
        steps = np.rint(x * (np.float32(1) / self.scale)) + self.offset.astype(np.float32)
        return np.asarray(np.clip(steps, CODE_MIN, CODE_MAX), np.int8)

    def values(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """What codes [tokens, kv_heads, head_dim] stand for."""
        return (codes.astype(np.float32) - self.offset.astype(np.float32)) * self.scale


@dataclass(frozen=True)
class QuantizedCache:
    """The grids of one block's cache."""

    key: CacheGrid
    value: CacheGrid

    def rows(self) -> NDArray[np.float32]:
        """[4, kv_heads * head_dim]: key scale, key offset, value scale, value offset, as the attention cells take them."""
        parts = (self.key.scale, self.key.offset, self.value.scale, self.value.offset)
        return np.stack([part.reshape(-1).astype(np.float32) for part in parts])


@dataclass(frozen=True)
class Int8Cache:
    """How the grids are chosen.

    keys, values  "channel": a scale for each channel of each head; "head": one for a head.
    symmetric     zero points are 0 and codes -127 to 127 within the range seen. False: the range seen, with 0 in it, is
                  spread over all 256 codes.
    method        absmax: nothing seen is clipped; percentile: of what is seen the outermost (100 - percentile) percent are;
                  mse: of narrower and narrower ranges the one with the least squared error.
    """

    keys: Literal["channel", "head"] = "channel"
    values: Literal["channel", "head"] = "channel"
    symmetric: bool = True
    method: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_types(self, "int8")
        if not 50 <= self.percentile <= 100:
            raise RecipeError(f"int8.percentile: got {self.percentile}, wanted a number from 50 to 100")

    @property
    def needs(self) -> Needs:
        return Needs(data=True, rows=0 if self.method == "absmax" else 1024)

    def cache(self, keys: RangeStats, values: RangeStats, kv_heads: int) -> QuantizedCache:
        """The grids for a block whose keys and values [tokens, kv_heads * head_dim] were seen."""
        return QuantizedCache(self._grid(keys, self.keys, kv_heads), self._grid(values, self.values, kv_heads))

    def _grid(self, stats: RangeStats, granularity: str, kv_heads: int) -> CacheGrid:
        shape = (kv_heads, len(stats.low) // kv_heads)
        low, high = (each.reshape(shape) for each in (stats.low, stats.high))
        units = shape if granularity == "channel" else (kv_heads, 1)
        if granularity == "head":
            low, high = low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)
        if self.method != "absmax" and stats.sample is not None:
            # The extremes count as two more rows: an outlier that the sample missed must not look cheap.
            rows = np.concatenate([stats.sample.rows, stats.low[None], stats.high[None]])
            low, high = self._narrowed(rows.reshape(len(rows), *units, -1), low, high)
        return grid_of_range(*(np.broadcast_to(each, shape) for each in (low, high)), symmetric=self.symmetric)

    def _narrowed(
        self, rows: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Narrower ends [kv_heads, head_dim or 1] for rows [n, kv_heads, head_dim or 1, numbers that share a scale]."""
        if self.method == "percentile":
            seen = np.abs(rows) if self.symmetric else rows
            ends = np.percentile(seen, [100 - self.percentile, self.percentile], axis=(0, 3)).astype(np.float32)
            return (-ends[1], ends[1]) if self.symmetric else (np.maximum(ends[0], low), np.minimum(ends[1], high))
        best, chosen = np.full(low.shape, np.inf), np.ones(low.shape)
        for shrink in _SHRINKS:
            grid = grid_of_range(*((end * shrink).astype(np.float32) for end in (low, high)), symmetric=self.symmetric)
            moved = np.moveaxis(rows, 3, 1).reshape(-1, *low.shape)
            error = np.square(grid.values(grid.codes(moved)) - moved).sum(axis=0, dtype=np.float64)
            chosen, best = np.where(error < best, shrink, chosen), np.minimum(error, best)
        return (low * chosen).astype(np.float32), (high * chosen).astype(np.float32)


def grid_of_range(low: NDArray[np.float32], high: NDArray[np.float32], *, symmetric: bool) -> CacheGrid:
    """The finest grid that holds low..high and 0 without clipping; its scales are bfloat16 values, rounded up.

    The scale is 1 where nothing but 0 was seen.
    """
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    wide = np.maximum(-low, high) / np.float32(127) if symmetric else (high - low) / np.float32(255)
    scale = np.where(high > low, round_up_to_bfloat16(np.maximum(wide, _TINY)), np.float32(1)).astype(np.float32)
    offset = np.zeros(scale.shape) if symmetric else np.clip(np.rint(CODE_MIN - low / scale), CODE_MIN, CODE_MAX)
    return CacheGrid(scale, offset.astype(np.int8))
