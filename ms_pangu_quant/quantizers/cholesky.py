"""Cholesky's factorisation on all cores, in place, with bits that do not depend on how many there are; and what it solves.

LAPACK's own either runs on one core or splits its sums by the number of threads. Here panels of a fixed width are taken one
after another, left to right: what the panels before contribute is one matrix product for each piece of rows, and the pieces
are independent of each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from ms_pangu_quant.quantizers.threads import in_parallel, one_thread, pieces

_PANEL, _ROWS = 384, 1024


def cholesky(matrix: NDArray[Any]) -> bool:
    """The lower triangle of matrix [n, n], float32 or float64 and symmetric, becomes L, L L^T the matrix. What stands above
    the diagonal is neither read nor, but for the blocks on it, left alone. False if the matrix is not positive definite; it
    is then undefined."""
    (divide,), (factor,) = get_blas_funcs(("trsm",), (matrix,)), get_lapack_funcs(("potrf",), (matrix,))
    size = len(matrix)
    for panel in pieces(0, size, _PANEL):
        before = matrix[panel, : panel.start]

        def subtract(rows: slice, panel: slice = panel, before: NDArray[Any] = before) -> None:
            matrix[rows, panel] -= matrix[rows, : panel.start] @ before.T

        if panel.start:
            in_parallel(subtract, pieces(panel.start, size, _ROWS))
        with one_thread():
            upper, failed = factor(_upper(matrix, panel), lower=0, clean=1)
        if failed:
            return False
        matrix[panel, panel] = upper.T

        def scale(rows: slice, panel: slice = panel, upper: NDArray[Any] = upper) -> None:
            matrix[rows, panel] = divide(1.0, upper, np.asfortranarray(matrix[rows, panel].T), trans_a=1).T

        in_parallel(scale, pieces(panel.stop, size, _ROWS))
    return True


def solve(lower: NDArray[Any], rows: NDArray[Any]) -> None:
    """rows [count, n] become rows (L L^T)^-1, in place, on the thread it is called from; lower as cholesky leaves it."""
    (divide,) = get_blas_funcs(("trsm",), (lower,))
    panels = list(pieces(0, len(lower), _PANEL))
    for panel in panels:
        rows[:, panel] -= rows[:, : panel.start] @ lower[panel, : panel.start].T
        rows[:, panel] = divide(1.0, _upper(lower, panel), np.asfortranarray(rows[:, panel].T), trans_a=1).T
    for panel in reversed(panels):
        rows[:, panel] -= rows[:, panel.stop :] @ lower[panel.stop :, panel]
        rows[:, panel] = divide(1.0, _upper(lower, panel), np.asfortranarray(rows[:, panel].T)).T


def _upper(lower: NDArray[Any], panel: slice) -> NDArray[Any]:
    """The block of L^T on the diagonal, as BLAS has its matrices."""
    return np.asfortranarray(lower[panel, panel].T)
