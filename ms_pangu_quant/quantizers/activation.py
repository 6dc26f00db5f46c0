"""The range of a static activation: one factor for a whole input, chosen on calibration data.

absmax      nothing seen is clipped; one rare outlier makes the grid coarse for everything else
percentile  the value that `percentile` percent of all |x| stay below
mse         of ranges from absmax downwards, the one with the least squared error of the rounded input
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.grid import as_divisor, round_down_to_bfloat16
from ms_pangu_quant.recipe.scheme import TensorScheme
from ms_pangu_quant.recipe.settings import check_types

_SHRINKS = np.geomspace(1.0, 0.02, 80)


@dataclass(frozen=True)
class ActivationRange:
    """How a static range is chosen; `percentile` is for method "percentile" alone."""

    method: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_types(self, "activation_range")
        if not 50 <= self.percentile <= 100:
            raise RecipeError(f"activation_range.percentile: got {self.percentile}, wanted a number from 50 to 100")

    @property
    def needs(self) -> Needs:
        return Needs(data=True, rows=0 if self.method == "absmax" else 512)

    def factor(self, stats: InputStats, scheme: TensorScheme) -> float:
        """What x is multiplied by before it is rounded: a bfloat16 value, rounded down so that the range fits the codes,
        and one that is the same for a program that holds the step in bfloat16 instead (grid.as_divisor).

        1 for an input that was never active.
        """
        largest = self._largest(stats, scheme)
        if largest < 1e-30:  # its factor would overflow
            return 1.0
        factor = round_down_to_bfloat16(np.array([scheme.divisor / largest], np.float32))
        if as_divisor(factor) != factor:  # then the next one below is
            factor = round_down_to_bfloat16(np.nextafter(factor, np.float32(0)))
        return float(factor[0])

    def _largest(self, stats: InputStats, scheme: TensorScheme) -> float:
        absmax = float(stats.absmax.max())
        if self.method == "absmax" or stats.sample is None:
            return absmax
        values = np.abs(stats.sample.rows)
        if self.method == "percentile":
            return float(np.percentile(values, self.percentile))
        # Each channel's largest value counts as one more row: an outlier that the sample missed must not look cheap.
        return absmax * best_shrink(np.vstack([values, stats.absmax]), absmax, scheme)


def best_shrink(values: NDArray[np.float32], absmax: float, scheme: TensorScheme) -> float:
    """Of _SHRINKS, the one for which rounding values [rows, in] >= 0 to a grid up to absmax * shrink errs least."""
    if absmax == 0:
        return 1.0
    flat = np.sort(values.reshape(-1).astype(np.float64))
    errors = []
    for shrink in _SHRINKS:
        step = absmax * shrink / scheme.divisor
        error = np.minimum(np.rint(flat / step), scheme.code_max) * step - flat
        errors.append(float(np.vdot(error, error)))
    return float(_SHRINKS[int(np.argmin(errors))])
