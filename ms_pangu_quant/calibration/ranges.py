"""What calibration remembers of keys and values on their way into the cache: each channel's least and largest number.

A monoid like InputStats: statistics of two batches merge into those of both, in any order and grouping. Beside it because
a cache's grid need not be symmetric, so the sign of an extreme matters, and because nothing multiplies a cache: no gram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import RowSample
from ms_pangu_quant.errors import DataError


@dataclass(frozen=True)
class RangeStats:
    """Of x [tokens, channels]; for keys and values channel = head * head_dim + place in the head.

    tokens     number of rows seen.
    low, high  [channels] float32, least and largest value over tokens.
    sample     some rows of x; None unless asked for.
    """

    tokens: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    sample: RowSample | None = None

    @classmethod
    def observe(cls, x: NDArray[np.float32], *, rows: int = 0, start: int = 0, where: str = "cache") -> RangeStats:
        """Of x, rows start, start + 1, ... of the calibration data; keeps `rows` of them.

        Raises DataError if x has a NaN or an infinity, ValueError if it has no rows.
        """
        low, high = x.min(axis=0), x.max(axis=0)
        bad = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))
        if bad.size:
            raise DataError(
                f"{where}: {bad.size} of {low.size} channels are NaN or infinite (first: {bad[0]}); the checkpoint "
                "overflows on this calibration data"
            )
        sample = RowSample.draw(x, rows, start) if rows else None
        return cls(len(x), low.astype(np.float32), high.astype(np.float32), sample)

    def merge(self, other: RangeStats) -> RangeStats:
        if self.low.shape != other.low.shape or (self.sample is None) != (other.sample is None):
            raise ValueError("statistics of different caches do not merge")
        sample = None if self.sample is None or other.sample is None else self.sample.merge(other.sample)
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return RangeStats(self.tokens + other.tokens, low, high, sample)
