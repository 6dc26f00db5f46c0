"""Choice of the scale: from the largest |w|, or the one of a grid of smaller ones that costs the least squared error.

A smaller scale rounds the many small weights more finely and clips the few largest. With 4 bits that pays off (about 0.8
of the largest |w| for a normal distribution of 256 weights), with 8 bits hardly ever.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.quantizers.grid import row_pieces, scale_from_absmax, weight_scale
from ms_pangu_quant.quantizers.threads import by_element
from ms_pangu_quant.recipe.scheme import TensorScheme

ScaleChoice = Literal["absmax", "mse"]
_SHRINKS = tuple(float(shrink) for shrink in np.linspace(1.0, 0.4, 25))


def choose_scale(
    weight: NDArray[np.float32], scheme: TensorScheme, choice: ScaleChoice, importance: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """Scale [out, groups] of weight [out, in]; importance as in mse_scale, unused for absmax."""
    return weight_scale(weight, scheme) if choice == "absmax" else mse_scale(weight, scheme, importance)


def mse_scale(
    weight: NDArray[np.float32], scheme: TensorScheme, importance: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """Of the scales absmax * shrink / divisor the one with the least sum of importance * (w - dequantized)^2.

    importance  [in] >= 0, what an error of each input's weight costs: the mean square of the input, which makes the sum
                the layer's output error were its inputs uncorrelated. None weighs all alike.
    Returns     [out, groups] float32; of equal ones the largest. Every scale is a value the scheme can store.
    """
    weight, groups = np.ascontiguousarray(weight), scheme.groups(weight.shape[1])
    cost = np.ones(weight.shape[1]) if importance is None or not importance.any() else importance / importance.max()
    factors = np.ascontiguousarray(cost.reshape(groups, -1), np.float32)
    chosen = np.empty((len(weight), groups), np.float32)

    kernels = library()

    def choose(rows: slice) -> None:
        grouped = weight[rows].reshape(-1, *factors.shape)
        absmax = np.abs(grouped).max(axis=2)
        scales = np.stack([scale_from_absmax(absmax * np.float32(shrink), scheme) for shrink in _SHRINKS])
        if kernels is None:
            errors = np.stack([_weighted_error(grouped, scale, scheme, factors) for scale in scales])
            chosen[rows] = np.take_along_axis(scales, errors.argmin(axis=0)[None], axis=0)[0]
            return
        read = [array.ctypes.data for array in (grouped, scales, factors)]
        found = np.empty(absmax.shape, np.float32)
        sizes = (*grouped.shape, len(scales), scheme.code_min, scheme.code_max)
        kernels.functions.pangu_best_scale(*read, *sizes, found.ctypes.data)
        chosen[rows] = found

    by_element(choose, row_pieces(weight))
    return chosen


def _weighted_error(
    grouped: NDArray[np.float32], scale: NDArray[np.float32], scheme: TensorScheme, factors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[rows, groups]: sum over a group of factors * (w - dequantized)^2, w and the scale taken relative to the scale."""
    wide = scale[:, :, None]
    error = grouped / wide
    codes = np.rint(error)
    np.clip(codes, scheme.code_min, scheme.code_max, out=codes)
    error -= codes
    error *= error
    total: NDArray[np.float32] = np.einsum("rgi,gi->rg", error, factors)
    return np.asarray(total * scale * scale)
