"""Large matrix products, in float32 or of numbers rounded to bfloat16 and added up in float32; their bits do not depend on
the number of threads.

Bfloat16 is twice as fast where the CPU has instructions for it (kernels/bfloat16.cc). Elsewhere the numbers are rounded all
the same, so that every machine computes nearly the same. Two factors err by a thousandth each, where the activations err by
a hundredth when they are rounded to int8.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.kernels.library import Library, library
from ms_pangu_quant.quantizers.threads import by_element, in_parallel, pieces

Products = Literal["float32", "bfloat16"]
_STRIP = 1024


def add_product(
    total: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32], *, bfloat16: bool, lower: bool = False
) -> None:
    """total [m, n] += a [m, k] @ b [k, n]; with `lower` what stands above the diagonal may be left as it is."""
    fast = _fast(bfloat16)
    if not total.size:
        return
    if fast is not None:
        _multiply(fast, a, Rows(len(b), b.shape[1], fast=fast).filled(b), total, adds=True, lower=lower)
        return
    if bfloat16:
        a, b = rounded(a), rounded(b)

    def add(strip: slice) -> None:
        if lower:
            total[strip.start :, strip] += a[strip.start :] @ b[:, strip]
        else:
            total[strip] += a[strip] @ b

    in_parallel(add, pieces(0, total.shape[1] if lower else len(total), _STRIP))


def product(a: NDArray[np.float32], b: NDArray[np.float32], *, bfloat16: bool) -> NDArray[np.float32]:
    """a [m, k] @ b [k, n]."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    add_product(total, a, b, bfloat16=bfloat16)
    return total


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """To bfloat16, as float32."""
    result = np.empty(values.shape, np.float32)

    def convert(rows: slice) -> None:
        result[rows] = values[rows].astype(ml_dtypes.bfloat16)

    by_element(convert, list(pieces(0, len(values), 128)))
    return result


class Rows:
    """A matrix [k, n] that is given some rows at a time, to be multiplied by while it grows.

    dtype  of what is not bfloat16.  fast  the library, where it has the products.
    """

    def __init__(
        self, height: int, width: int, *, dtype: Any = np.float32, bfloat16: bool = False, fast: Library | None = None
    ) -> None:
        self._fast, self._bfloat16 = fast or (_fast(bfloat16) if dtype == np.float32 else None), bfloat16
        self._odd = height % 2  # rows are packed in pairs, of which the last is a whole one
        self.shape, self.pairs = (height, width), (height + 1) // 2
        packed = self._fast is not None
        self._rows: NDArray[Any] = np.empty(self.pairs * width, np.uint32) if packed else np.empty(self.shape, dtype)

    def put(self, start: int, rows: NDArray[Any]) -> None:
        """From row `start` on, which has an even number of rows from it to the end, but in filled."""
        if self._fast is None:
            self._rows[start : start + len(rows)] = rounded(rows) if self._bfloat16 else rows
        else:
            self._pack(rows, (start + self._odd) // 2)

    def filled(self, rows: NDArray[np.float32]) -> Rows:
        self._odd = 0
        self._pack(rows, 0)
        return self

    def times(self, a: NDArray[Any], start: int) -> NDArray[Any]:
        """a [m, k - start] @ the rows from `start` on."""
        if self._fast is None:
            product: NDArray[Any] = (rounded(a) if self._bfloat16 else a) @ self._rows[start:]
            return product
        result = np.empty((len(a), self.shape[1]), np.float32)
        _multiply(self._fast, a, self, result, begin=(start + self._odd) // 2)
        return result

    def _pack(self, rows: NDArray[np.float32], begin: int) -> None:
        assert self._fast is not None
        beside, step = _layout(rows.T)
        self._fast.functions.pangu_bfloat16_columns(
            rows.ctypes.data, step, beside, *rows.shape, self.pairs, begin, self._rows.ctypes.data
        )


def _fast(bfloat16: bool) -> Library | None:
    found = library() if bfloat16 else None
    return found if found is not None and found.bfloat16 else None


def _multiply(
    fast: Library,
    a: NDArray[np.float32],
    b: Rows,
    y: NDArray[np.float32],
    *,
    begin: int = 0,
    adds: bool = False,
    lower: bool = False,
) -> None:
    """y (+)= a times b from pair `begin` on."""
    beside, step = _layout(a)
    assert a.dtype == y.dtype == np.float32
    assert y.strides[1] == y.itemsize
    fast.functions.pangu_bfloat16_product(
        *(a.ctypes.data, step, beside, a.shape[1], len(a)),
        *(b._rows.ctypes.data, b.shape[1], b.pairs, begin),
        *(y.ctypes.data, y.strides[0] // y.itemsize, adds, lower),
    )


def _layout(a: NDArray[np.float32]) -> tuple[bool, int]:
    """(whether the last axis lies in memory without gaps, elements from one of the other axis to the next)."""
    beside = a.strides[1] == a.itemsize
    assert beside or a.strides[0] == a.itemsize, "neither rows nor columns lie in memory without gaps"
    return beside, a.strides[0 if beside else 1] // a.itemsize
