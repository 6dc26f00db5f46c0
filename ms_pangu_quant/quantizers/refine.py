"""Betters a rounded weight where it stands: scales that fit the codes best, then every code once more, again and again.

Both steps minimise tr(E G E^T) over what they change with everything else held fixed, so neither can make it larger:
  scales  a row's scales are the least-squares solution for its codes, groups x groups equations a row
  codes   one channel after another goes to the code that is best given all others, also those rounded after it, which
          GPTQ could not know (coordinate descent; Behdin et al. 2023, QuantEase, arXiv:2309.01885)

The large matrix products are float32, like those the gram is a sum of; what is made of them is added up in float64.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.quantizers.grid import QuantizedWeight, row_pieces
from ms_pangu_quant.quantizers.threads import LARGE, in_parallel, one_thread
from ms_pangu_quant.recipe.scheme import TensorScheme

BLOCK = 128
_PIECE_ELEMENTS = 1 << 21


def refine(
    weight: NDArray[np.float32],
    rounded: QuantizedWeight,
    scheme: TensorScheme,
    gram: NDArray[np.float32],
    damping: float,
    sweeps: int,
) -> QuantizedWeight:
    """`sweeps` times both steps on weight [out, in] and its rounding; the note is kept.

    gram     [in, in], symmetric.  damping  what is added to its diagonal (absolute).
    """
    codes, scale = rounded.codes.copy(), rounded.scale.copy()
    damped = gram.astype(np.float32)
    np.einsum("ii->i", damped)[:] = np.diagonal(gram) + damping

    def better(rows: slice) -> None:
        output = weight[rows] @ damped
        for _ in range(sweeps):
            scale[rows] = best_scales(output, codes[rows], scale[rows], scheme, damped)
            codes[rows] = sweep(weight[rows], codes[rows], scale[rows], scheme, damped)

    in_parallel(better, row_pieces(weight, _PIECE_ELEMENTS), LARGE)
    return QuantizedWeight(codes, scale, rounded.note)


def best_scales(
    output: NDArray[np.float32],
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    scheme: TensorScheme,
    gram: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Scales [out, groups] with the least tr(E G E^T) for these codes, rounded to what the scheme stores.

    output  [out, in], the weight times the gram.
    A group of zeros keeps its scale. So does a row where rounding made the new ones worse, or where one is not positive.
    """
    out_features, groups = scale.shape
    width = codes.shape[1] // groups
    wide = codes.astype(np.float32)
    matrix = np.empty((out_features, groups, groups))
    vector = (output * wide).reshape(out_features, groups, width).sum(axis=2, dtype=np.float64)
    for group in range(groups):  # the matrix is symmetric: what stands left of its diagonal is known
        start, stop = group * width, (group + 1) * width
        product = wide[:, start:stop] @ gram[start:stop, start:]
        product *= wide[:, start:]
        matrix[:, group, group:] = product.reshape(out_features, groups - group, width).sum(axis=2, dtype=np.float64)
        matrix[:, group:, group] = matrix[:, group, group:]
    diagonal = np.einsum("ogg->og", matrix)
    empty = diagonal <= 0  # a group of zeros: its scale has no say and stays
    diagonal += 1e-12 * diagonal.max(axis=1, keepdims=True) + empty
    vector = np.where(empty, scale * diagonal, vector)
    with one_thread():
        found = np.linalg.solve(matrix, vector[..., None])[..., 0]
    stored = found.astype(np.float32)
    if scheme.bfloat16_scale:
        stored = stored.astype(ml_dtypes.bfloat16).astype(np.float32)

    def cost(steps: NDArray[np.float32]) -> NDArray[np.float64]:
        """tr(E G E^T) of each row, less what does not depend on the scales."""
        s = steps.astype(np.float64)
        return np.asarray(np.einsum("og,ogh,oh->o", s, matrix, s) - 2 * np.einsum("og,og->o", s, vector))

    better = (stored > 0).all(axis=1) & (cost(stored) < cost(scale))
    return np.where(better[:, None], stored, scale)


def sweep(
    weight: NDArray[np.float32],
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    scheme: TensorScheme,
    gram: NDArray[np.float32],
) -> NDArray[np.int8]:
    """Every code [out, in] once set to the best given all others, channel 0 first."""
    steps = np.repeat(scale.T, weight.shape[1] // scale.shape[1], axis=0)  # [in, out]
    target = np.ascontiguousarray(weight.T)
    moved = codes.T.astype(np.float64)
    error = (target - moved * steps).astype(np.float32)
    for start in range(0, len(target), BLOCK):
        stop = min(start + BLOCK, len(target))
        gradient = (gram[start:stop] @ error).astype(np.float64)
        inside = gram[start:stop, start:stop].astype(np.float64)
        changes = np.zeros((stop - start, error.shape[1]))
        for j in range(start, stop):
            curvature = inside[j - start, j - start]
            if curvature == 0:  # a channel that was never active
                continue
            here = gradient[j - start] + inside[j - start, : j - start] @ changes[: j - start]
            code = np.clip(np.rint((moved[j] * steps[j] + here / curvature) / steps[j]), scheme.code_min, scheme.code_max)
            changes[j - start] = (moved[j] - code) * steps[j]
            moved[j] = code
        error[start:stop] = target[start:stop] - moved[start:stop] * steps[start:stop]
    return np.ascontiguousarray(moved.T).astype(np.int8)
