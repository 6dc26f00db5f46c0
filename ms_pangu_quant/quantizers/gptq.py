"""GPTQ: rounds one input channel after another and lets the channels still to come make up for the error.

How it works. The output error of a layer is tr(E G E^T), E = weight - dequantized, G = sum over tokens of x x^T. With
G = L L^T, L lower triangular and the channels in reverse order of rounding, it is ||E L||^2, and channel j, once those
behind it are rounded, costs least at

    w_j + sum over i > j of E_i L_ij / L_jj

rounded to the nearest code. That is GPTQ (Frantar et al. 2022, arXiv:2210.17323) written as Babai's nearest plane (Chen et
al. 2025, arXiv:2507.18553): the same codes without the inverse of G, so one Cholesky factorisation in place is all the
algebra there is. Channels are taken in blocks, a block's sums over all earlier blocks in one matrix product; the block size
changes the order of additions and nothing else. They are float32, as everywhere where GPTQ is run; in float64 the codes are
the paper's, integer for integer, and cost twice the time and memory (docs/recipes.md has what differs).

All layers that read one input are rounded together, as one weight: they share its factors.

What it sees. G is that of the float block's inputs when everything before the block is rounded: the layer is brought near
its float output on the inputs it will really get. With `correct`, layers are rounded in the order they are computed, G is
that of the inputs as the quantized layers before them make them, and the layer is brought near the output it has in the
float model, on the float model's own inputs: what earlier layers lost is made up for as far as a linear layer can (Li et
al. 2025, GPTAQ, arXiv:2504.02692; Zhang et al. 2025, Qronos, arXiv:2505.11695).

What it fits. A layer has as many unknowns for each output as inputs, and few tokens determine them badly: what is gained on
the calibration texts can be lost on others. How far to go is therefore not a constant. With "auto" the strength of the
correction and the damping for an input are those with the least output error on rows of texts that are held out of the
statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.quantizers.cholesky import cholesky, solver
from ms_pangu_quant.quantizers.clip import ScaleChoice, choose_scale
from ms_pangu_quant.quantizers.grid import QuantizedWeight, row_pieces
from ms_pangu_quant.quantizers.products import Products, Rows, product
from ms_pangu_quant.quantizers.refine import refine
from ms_pangu_quant.quantizers.threads import LARGE, by_element, in_parallel, pieces
from ms_pangu_quant.recipe.scheme import TensorScheme
from ms_pangu_quant.recipe.settings import check_types

BLOCK = 128
PRECISION: type[np.floating[Any]] = np.float32  # of the factors, and of the errors that they carry on
_LARGEST_DAMPING = 1.0
_RIDGE = 0.03
_DAMPINGS = (0.003, 0.01, _RIDGE, 0.1, 0.3)
_FACTORS = 3.5  # that a search among them takes, of those one is the ridge's
_HELD_OUT, _TRIED = 2048, 256  # rows of x that a choice is tried on, and outputs that stand for all
_PIECE_ELEMENTS = 1 << 22  # of a working copy: 16 MiB
_LARGE_PIECE = 1 << 26  # of one that all cores work on
_COPIED, _SOLVED = 32, 512  # rows that a thread copies, and divides by a factor, at a time


@dataclass(frozen=True)
class Gptq:
    """Settings.

    damping    added to the gram's diagonal, relative to its mean; ten times as much while the gram is not positive
               definite, and then said in QuantizedWeight.note. "auto": of _DAMPINGS, by held-out error.
    act_order  round the channels with the largest inputs first. Groups keep their channels and their scales, which are
               chosen beforehand ("static groups"), so the stored layout is the ordinary one.
    scale      "absmax" or "mse" (clip.py, weighted by the gram's diagonal).
    sweeps     afterwards, so often: the scales that fit the codes best, then every code once more (refine.py).
    correct    aim at the float model's outputs; more than twice the passes over the data, and another gram in memory.
    strength   the part of the correction that is made, 0 to 1: on few tokens for many inputs all of it fits what is theirs
               alone (Arai and Ichikawa 2025, QEP, arXiv:2504.09629, have such a factor). "auto": by held-out error.
    temper     from 0, all errors count as they are, to 1, relative to the size of the token in the residual stream: for
               models with massive activations, where a few tokens are else all that o_proj and down_proj are fitted to.
    products   "bfloat16": grams, drifts, what is carried from block to block, the correction and the float model's layers
               are products of numbers rounded so, twice as fast where the CPU can (products.py). Factors and what is solved
               with them stay float32.
    """

    damping: float | Literal["auto"] = 0.01
    act_order: bool = True
    scale: ScaleChoice = "mse"
    sweeps: int = 0
    correct: bool = False
    strength: float | Literal["auto"] = 1.0
    temper: float = 0.0
    products: Products = "float32"

    @property
    def _bfloat16(self) -> bool:
        return self.products == "bfloat16"

    @property
    def _chooses(self) -> bool:
        return self.damping == "auto" or (self.correct and self.strength == "auto")

    @property
    def needs(self) -> Needs:
        held_out = _HELD_OUT if self._chooses else 0
        return Needs(
            data=True, gram=True, drift=self.correct, temper=self.temper, held_out=held_out, bfloat16=self._bfloat16
        )

    def operations(self, outputs: int, inputs: int) -> float:
        """Factors, then 1 for GPTQ's sums, 4 for the correction, 2 for sweeps and 3 for each."""
        each = 1 + 4 * self.correct + (2 + 3 * self.sweeps if self.sweeps else 0)
        factors = _FACTORS if self.damping == "auto" else 1 + self.correct
        return factors * inputs**3 / 3 + each * float(outputs) * inputs**2

    def __post_init__(self) -> None:
        check_types(self, "gptq")
        for name, largest in (("damping", _LARGEST_DAMPING), ("strength", 1), ("temper", 1)):
            value = getattr(self, name)
            if value != "auto" and not 0 <= value <= largest:
                raise RecipeError(f"gptq.{name}: got {value}, wanted a number from 0 to {largest:g}")
        if self.sweeps < 0:
            raise RecipeError(f"gptq.sweeps: got {self.sweeps}, wanted a whole number of at least 0")

    def __call__(
        self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None, rows: slice = slice(None)
    ) -> QuantizedWeight:
        """Raises DataError if the gram is not that of any data (a negative or NaN diagonal, far from semidefinite), or if
        something is to be chosen on texts that are held out and there are none."""
        if stats is None or stats.gram is None:
            raise ValueError("gptq needs the gram of the layer's input")
        diagonal = checked_diagonal(stats.gram)
        order = np.argsort(-diagonal, kind="stable") if self.act_order else np.arange(len(diagonal))
        held_out = HeldOut(weight, stats) if self._chooses else None
        factors = Factors(stats.gram, order)
        target, tried = self._targets(weight, rows, stats, factors, held_out)
        scale = choose_scale(target, scheme, self.scale, diagonal)
        if held_out is not None and self.damping == "auto":
            grid = choose_scale(tried, scheme, self.scale, diagonal)
            factor, damping = held_out.damped(tried, grid, scheme, factors, bfloat16=self._bfloat16)
            wanted = damping
        else:
            wanted = float(self.damping)
            factor, damping = factors.of(wanted)
        codes = gptq_codes(target, scale, scheme, factor, order, bfloat16=self._bfloat16)
        del factor
        note = "" if damping == wanted else f"damping raised from {wanted:g} to {damping:g}"
        rounded = QuantizedWeight(codes, scale, note)
        if not self.sweeps:
            return rounded
        return refine(target, rounded, scheme, stats.gram, damping * float(diagonal.mean()), self.sweeps)

    def _targets(
        self, weight: NDArray[np.float32], rows: slice, stats: InputStats, factors: Factors, held_out: HeldOut | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What is to be rounded: of weight these rows, and of the outputs that held_out tries."""
        own, tried = weight[rows], weight[:0] if held_out is None else held_out.tried
        if stats.drift is None and stats.output_drift is None:
            return own, tried
        ridged, damping = factors.kept(_RIDGE)
        if damping != _RIDGE:
            raise _indefinite()
        if stats.drift is not None:
            step, small = (
                correction(each, stats.drift, ridged, factors.order, bfloat16=self._bfloat16) for each in (own, tried)
            )
        else:
            assert stats.output_drift is not None
            drifts = stats.output_drift[rows], stats.output_drift[slice(0) if held_out is None else tried_rows(len(weight))]
            step, small = (solved(each, ridged, factors.order) for each in drifts)
        asked = self.strength
        strength = np.float32(held_out.strength(small) if asked == "auto" and held_out is not None else asked)
        step *= strength
        step += own
        return step, tried + strength * small


Factor = tuple[NDArray[Any], float]  # of factorise, and the damping


class Factors:
    """Those of one gram; one of 12800 inputs is 0.66 GB. order [in]: the channels as they are rounded, first one first."""

    def __init__(self, gram: NDArray[np.float32], order: NDArray[np.intp]) -> None:
        self.order, self._gram = order, gram
        self._kept: dict[float, Factor] = {}

    def kept(self, damping: float) -> Factor:
        """Kept until it is asked for again."""
        self._kept[damping] = self.of(damping)
        return self._kept[damping]

    def of(self, damping: float) -> Factor:
        return self._kept.pop(damping, None) or factorise(self._gram, self.order[::-1], damping)


def tried_rows(outputs: int) -> slice:
    """Of so many outputs up to _TRIED, evenly spread."""
    return slice(None, None, -(-outputs // _TRIED))


class HeldOut:
    """The output error on rows of texts that are in no gram; of up to _TRIED of the outputs, evenly spread.

    weight  [out, in] float32, of all layers that read the input; what they should compute on the float model's.
    tried   the rows of it that are.
    """

    def __init__(self, weight: NDArray[np.float32], stats: InputStats) -> None:
        if stats.held_out is None or not len(stats.held_out.rows):
            raise DataError(
                "gptq: a strength or damping of auto is chosen on texts that are held out of the calibration data, and "
                "there are none: give more texts, or raise calibration.held_out, or give numbers"
            )
        self.tried = np.ascontiguousarray(weight[tried_rows(len(weight))])
        self._rows, drift = stats.held_out.rows, stats.held_out_drift
        shape = len(self._rows), len(self.tried)
        self._missing = np.zeros(shape, np.float32) if drift is None else drift.rows @ self.tried.T
        self._wanted = self._rows @ self.tried.T + self._missing

    def strength(self, step: NDArray[np.float32]) -> float:
        """The share of this step of the outputs tried, 0 to 1, with the least error: a quadratic has one minimum."""
        moved = self._rows @ step.T
        square = float(np.vdot(moved, moved))
        return float(np.clip(np.vdot(moved, self._missing) / square, 0, 1)) if square else 1.0

    def damped(
        self,
        target: NDArray[np.float32],
        scale: NDArray[np.float32],
        scheme: TensorScheme,
        factors: Factors,
        *,
        bfloat16: bool = False,
    ) -> Factor:
        """The factor with that of _DAMPINGS with which `target`, of the outputs tried, is rounded with the least error."""

        def error(factor: Factor) -> float:
            codes = gptq_codes(target, scale, scheme, factor[0], factors.order, bfloat16=bfloat16)
            rounded = QuantizedWeight(codes, scale).dequantize()
            return float(np.square(self._rows @ rounded.T - self._wanted, dtype=np.float64).sum())

        return _least(factors.of, error)


def _least(make: Callable[[float], Factor], cost: Callable[[Factor], float]) -> Factor:
    """The factor of one of _DAMPINGS with the least cost, downhill from _RIDGE on: two of them in memory."""
    best = make(_RIDGE)
    least, start = cost(best), _DAMPINGS.index(_RIDGE)
    for way in (_DAMPINGS[:start][::-1], _DAMPINGS[start + 1 :]):
        before = least
        for damping in way:
            other = make(damping)
            found = cost(other)
            if found >= least:
                break
            best, least = other, found
        if least < before:
            break
    return best


def checked_diagonal(gram: NDArray[np.float32]) -> NDArray[np.float64]:
    """The diagonal [in]. Raises DataError if it has a NaN, an infinity or a negative value."""
    diagonal = np.diagonal(gram)
    bad = np.flatnonzero(~(np.isfinite(diagonal) & (diagonal >= 0)))
    if bad.size:
        raise DataError(
            f"gram of a layer's input: {bad.size} of {diagonal.size} diagonal values are negative or not finite (first: "
            f"channel {bad[0]}, {diagonal[bad[0]]}); a sum of squares is neither: the statistics are damaged"
        )
    return diagonal.astype(np.float64)


def factorise(gram: NDArray[np.float32], columns: NDArray[np.intp], damping: float) -> Factor:
    """(L, damping used): gram with rows and columns in this order, damped, is L L^T.

    gram  [in, in], symmetric positive semidefinite. A channel that was never active has a row of zeros; it is given a one
          on the diagonal, which makes it be rounded to nearest and leaves the others alone.
    L     [in, in], lower triangular; what stands above the diagonal is not defined.
    Raises DataError if not even a damping of 1 makes the gram positive definite.
    """
    mean = float(np.diagonal(gram).mean(dtype=np.float64))
    while True:
        for precision in dict.fromkeys((PRECISION, np.float64)):  # a gram that float32 finds indefinite may not be so
            lower = _damped(gram, columns, damping * mean, precision)
            if cholesky(lower):
                return lower, damping
            del lower
        if damping >= _LARGEST_DAMPING:
            raise _indefinite()
        damping = min(max(10 * damping, 1e-6), _LARGEST_DAMPING)


def _damped(gram: NDArray[np.float32], columns: NDArray[np.intp], added: float, precision: Any) -> NDArray[Any]:
    lower = np.zeros(gram.shape, precision)  # what nothing is written to, nearly half of it, takes no memory

    def copy(rows: slice) -> None:
        for row in range(rows.start, rows.stop):
            own = slice(row + 1)
            near = gram[columns[row]].copy()  # read in order, then picked from in the cache
            lower[row, own] = near.take(columns[own], mode="clip")

    by_element(copy, list(pieces(0, len(lower), _COPIED)))
    diagonal = np.einsum("ii->i", lower)
    diagonal += added
    diagonal[diagonal == 0] = 1.0
    return lower


def _indefinite() -> DataError:
    return DataError(
        "gram of a layer's input: not semidefinite, even when damped; a sum of x x^T is, so the statistics are damaged"
    )


def solved(rows: NDArray[np.float32], factor: NDArray[Any], order: NDArray[np.intp]) -> NDArray[np.float32]:
    """rows [count, in] (L L^T)^-1; factor L of factorise for order[::-1]."""
    columns = order[::-1]
    back = np.argsort(columns)
    result, solve = np.empty_like(rows), solver(factor)

    def divide(part: slice) -> None:
        there = np.take(rows[part], columns, axis=1, mode="clip").astype(factor.dtype, copy=False)
        solve(there)
        result[part] = np.take(there, back, axis=1, mode="clip")

    in_parallel(divide, pieces(0, len(rows), _SOLVED), LARGE)
    return result


def correction(
    weight: NDArray[np.float32],
    drift: NDArray[np.float32],
    factor: NDArray[Any],
    order: NDArray[np.intp],
    *,
    bfloat16: bool = False,
) -> NDArray[np.float32]:
    """What is to be added to `weight` for it to come, on the inputs x the layer gets, closest to what `weight` makes of the
    float model's y; [out, in].

    Least squares with a ridge that holds it to `weight`: weight drift (gram + r I)^-1, r = _RIDGE times the mean diagonal
    of the gram. All in float32: the ridge bounds the condition number by inputs / _RIDGE, 4e5 for 12800, and it is a
    correction whose third digit does not matter.
    factor  of factorise with the damping _RIDGE, for order[::-1].
    """
    if len(weight) <= len(drift):
        return solved(product(weight, drift, bfloat16=bfloat16), factor, order)
    return product(weight, solved(drift, factor, order), bfloat16=bfloat16)  # fewer rows to solve for


def gptq_codes(
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    scheme: TensorScheme,
    factor: NDArray[Any],
    order: NDArray[np.intp],
    block: int = BLOCK,
    *,
    bfloat16: bool = False,
) -> NDArray[np.int8]:
    """Codes int8 [out, in] of weight [out, in] on the grid of scale [out, groups].

    factor  of factorise for order[::-1]; order [in], the channels as they are rounded, first one first.
    block   channels, an even number of them with bfloat16.
    """
    codes = np.empty(weight.shape, np.int8)
    columns = order[::-1]  # the factor's order: rounded from the last to the first
    back = np.argsort(columns)
    group = columns // (weight.shape[1] // scale.shape[1])
    pivots = np.einsum("ii->i", factor)

    def round_rows(rows: slice) -> None:
        target, rounded = _turned(weight[rows], columns), np.empty((len(columns), len(weight[rows])), np.int8)
        steps = np.ascontiguousarray(scale[rows].T)
        error = Rows(*target.shape, dtype=factor.dtype, bfloat16=bfloat16)
        for stop in range(len(columns), 0, -block):
            start = max(stop - block, 0)
            own = slice(start, stop)
            carried = error.times(factor[stop:, own].T, stop) / pivots[own, None]
            inside = (factor[own, own] / pivots[own]).T.copy()
            lost = round_block(target[own], carried, inside, steps, group[own], scheme, rounded[own])
            error.put(start, lost)
        _turn_back(rounded, back, codes[rows])

    if bfloat16 and factor.dtype == np.float32:  # the products and what is inside a block take all cores
        for rows in row_pieces(weight, _LARGE_PIECE):
            round_rows(rows)
    else:
        in_parallel(round_rows, row_pieces(weight, _PIECE_ELEMENTS), LARGE)
    return codes


def round_block(
    target: NDArray[np.float32],
    carried: NDArray[Any],
    inside: NDArray[Any],
    steps: NDArray[np.float32],
    group: NDArray[np.intp],
    scheme: TensorScheme,
    codes: NDArray[np.int8],
) -> NDArray[Any]:
    """The channels of a block, the last first, into codes [channels, rows]; what is lost, [channels, rows].

    target [channels, rows]; carried, the same, what those rounded before add to it; inside [channels, channels], what is
    lost in one adds to another, by column; steps [groups, rows]; group [channels]. carried is used up.
    """
    error = np.empty(target.shape, carried.dtype)
    kernels = library() if carried.dtype == np.float32 else None
    if kernels is not None:
        group = group.astype(np.int64)
        read = [array.ctypes.data for array in (target, carried, inside, steps, group)]
        kernels.functions.pangu_gptq_block(
            *read, scheme.code_min, scheme.code_max, *target.shape, codes.ctypes.data, error.ctypes.data
        )
        return error
    for j in range(len(target) - 1, -1, -1):
        wanted = (target[j] + carried[j]).astype(np.float32)  # as float32, so that ties fall as in RTN
        code = np.clip(np.rint(wanted / steps[group[j]]), scheme.code_min, scheme.code_max)
        error[j] = target[j] - code.astype(carried.dtype) * steps[group[j]]
        codes[j] = code
        carried[:j] += inside[:j, j, None] * error[j]
    return error


def _turned(weight: NDArray[np.float32], columns: NDArray[np.intp]) -> NDArray[np.float32]:
    """weight [out, in] as [in, out], its channels in this order."""
    target = np.empty((weight.shape[1], len(weight)), np.float32)

    def turn(part: slice) -> None:
        target[:, part] = np.take(weight[part], columns, axis=1, mode="clip").T

    by_element(turn, row_pieces(weight))
    return target


def _turn_back(rounded: NDArray[np.int8], back: NDArray[np.intp], codes: NDArray[np.int8]) -> None:
    def turn(part: slice) -> None:
        codes[part] = rounded[:, part][back].T

    by_element(turn, row_pieces(codes))
