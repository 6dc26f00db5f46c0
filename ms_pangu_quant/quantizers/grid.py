"""The integer grid: scales, codes, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.quantizers.threads import by_element, in_parallel
from ms_pangu_quant.recipe.scheme import TensorScheme

_PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class QuantizedWeight:
    """codes int8 [out, in]; scale float32 [out, groups], > 0. The weight is codes * scale of each code's group.

    note  what the user should know of how it was rounded, "" if nothing; it goes into the report, not into the checkpoint.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    note: str = ""

    def dequantize(self) -> NDArray[np.float32]:
        """[out, in] float32."""
        weight = np.empty(self.codes.shape, np.float32)

        def multiply(rows: slice) -> None:
            grouped = self.codes[rows].reshape(-1, self.scale.shape[1], weight.shape[1] // self.scale.shape[1])
            np.multiply(grouped, self.scale[rows, :, None], out=weight[rows].reshape(grouped.shape))

        by_element(multiply, row_pieces(weight))
        return weight


def weight_scale(weight: NDArray[np.float32], scheme: TensorScheme) -> NDArray[np.float32]:
    """Scale [out, groups] of weight [out, in] from the largest |w| of each channel or group; 1.0 where all are zero."""
    groups = scheme.groups(weight.shape[1])
    absmax = np.empty((len(weight), groups), np.float32)

    def take(rows: slice) -> None:
        grouped = weight[rows].reshape(-1, groups, weight.shape[1] // groups)
        absmax[rows] = np.abs(grouped).max(axis=2)

    by_element(take, row_pieces(weight))
    return scale_from_absmax(absmax, scheme)


def scale_from_absmax(absmax: NDArray[np.float32], scheme: TensorScheme) -> NDArray[np.float32]:
    """absmax / divisor, float32, rounded up to a bfloat16 value where the scheme says so; 1.0 where absmax is 0."""
    scale = (absmax / np.float32(scheme.divisor)).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    if scheme.bfloat16_scale:
        scale = round_up_to_bfloat16(scale)
    return np.where(absmax > 0, scale, np.float32(1.0)).astype(np.float32)


def round_up_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest bfloat16 value >= each positive finite value, as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def round_down_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest bfloat16 value <= each positive finite value, as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def as_divisor(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is multiplied by where 1 / factor is held in bfloat16 and inverted in it: of 128 factors in a row 22 come out as
    another, 0.5 % away, no two of them neighbours. vllm-ascend does so, and MindFormers with msModelSlim's files."""
    divisors = (np.float32(1) / factors).astype(ml_dtypes.bfloat16).astype(np.float32)
    return (np.float32(1) / divisors).astype(ml_dtypes.bfloat16).astype(np.float32)


def is_bfloat16(values: NDArray[np.float32]) -> bool:
    return bool((values.astype(ml_dtypes.bfloat16).astype(np.float32) == values).all())


def round_to_grid(weight: NDArray[np.float32], scale: NDArray[np.float32], scheme: TensorScheme) -> NDArray[np.int8]:
    """Codes int8 [out, in]: weight [out, in] over scale [out, groups], half to even, clipped to the scheme's codes."""
    codes = np.empty(weight.shape, np.int8)

    def round_rows(rows: slice) -> None:
        piece = weight[rows]
        grouped = piece.reshape(len(piece), scale.shape[1], -1) / scale[rows, :, None]
        np.rint(grouped, out=grouped)
        np.clip(grouped, scheme.code_min, scheme.code_max, out=grouped)
        codes[rows] = grouped.reshape(piece.shape)

    by_element(round_rows, row_pieces(weight))
    return codes


def relative_weight_error(quantized: QuantizedWeight, weight: NDArray[np.float32]) -> float:
    """||dequantized - weight|| / ||weight||, Frobenius; 0 for a weight of zeros."""
    squares: dict[int, tuple[float, float]] = {}

    def add(rows: slice) -> None:
        rounded = QuantizedWeight(quantized.codes[rows], quantized.scale[rows]).dequantize()
        rounded -= weight[rows]
        squares[rows.start] = float(np.vdot(rounded, rounded)), float(np.vdot(weight[rows], weight[rows]))

    in_parallel(add, row_pieces(weight))
    difference, norm = (sum(squares[start][place] for start in sorted(squares)) for place in (0, 1))
    return float(np.sqrt(difference / norm)) if norm else 0.0


def row_pieces(weight: NDArray[Any], elements: int | None = None) -> list[slice]:
    """Slices of rows, each of so many elements or of a MiB, whatever the machine: temporaries stay small and in cache."""
    step = max(1, (elements or _PIECE_ELEMENTS) // max(weight.shape[1], 1))
    return [slice(start, start + step) for start in range(0, len(weight), step)]
