"""Cholesky's factorisation on all cores, in place, with bits that do not depend on how many there are; and what it solves.

LAPACK's own either runs on one core or splits its sums by the number of threads. Here panels of a fixed width are taken one
after another, left to right: what the panels before contribute is one matrix product for each piece of rows, and the pieces
are independent of each other. What has to be divided by a panel's own triangle is multiplied by its inverse, as fast as any
product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs

from ms_pangu_quant.quantizers.threads import in_parallel, one_thread, pieces

_PANEL, _ROWS = 512, 512


def cholesky(matrix: NDArray[Any]) -> bool:
    """The lower triangle of matrix [n, n], float32 or float64 and symmetric, becomes L, L L^T the matrix. What stands above
    the diagonal is neither read nor, but for the blocks on it, left alone. False if the matrix is not positive definite; it
    is then undefined."""
    (factor,) = get_lapack_funcs(("potrf",), (matrix,))
    size = len(matrix)
    for panel in pieces(0, size, _PANEL):
        before = matrix[panel, : panel.start]

        def subtract(rows: slice, panel: slice = panel, before: NDArray[Any] = before) -> None:
            matrix[rows, panel] -= matrix[rows, : panel.start] @ before.T

        if panel.start:
            in_parallel(subtract, pieces(panel.start, size, _ROWS))
        with one_thread():
            upper, failed = factor(np.asfortranarray(matrix[panel, panel].T), lower=0, clean=1)
            if failed:
                return False
            matrix[panel, panel] = upper.T
            inverse = _inverse(upper)

        def scale(rows: slice, panel: slice = panel, inverse: NDArray[Any] = inverse) -> None:
            matrix[rows, panel] = matrix[rows, panel] @ inverse

        in_parallel(scale, pieces(panel.stop, size, _ROWS))
    return True


def solver(lower: NDArray[Any]) -> Callable[[NDArray[Any]], None]:
    """What makes rows [count, n] rows (L L^T)^-1, in place, on the thread that calls it; lower as cholesky leaves it."""
    panels = list(pieces(0, len(lower), _PANEL))
    with one_thread():
        inverses = [_inverse(np.asfortranarray(lower[panel, panel].T)) for panel in panels]

    def solve(rows: NDArray[Any]) -> None:
        for panel, inverse in zip(panels, inverses, strict=True):
            rows[:, panel] = (rows[:, panel] - rows[:, : panel.start] @ lower[panel, : panel.start].T) @ inverse
        for panel, inverse in zip(reversed(panels), reversed(inverses), strict=True):
            rows[:, panel] = (rows[:, panel] - rows[:, panel.stop :] @ lower[panel.stop :, panel]) @ inverse.T

    return solve


def _inverse(upper: NDArray[Any]) -> NDArray[Any]:
    """Of a triangle [n, n] as LAPACK has it."""
    (invert,) = get_lapack_funcs(("trtri",), (upper,))
    inverse, failed = invert(upper, lower=0)
    assert not failed
    return np.triu(inverse)
