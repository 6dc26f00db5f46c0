"""GPTQ: rounds one input channel after another and lets the channels still to come make up for the error.

How it works. The output error of a layer is tr(E G E^T), E = weight - dequantized, G = sum over tokens of x x^T. With
G = L L^T, L lower triangular and the channels in reverse order of rounding, it is ||E L||^2, and channel j, once those
behind it are rounded, costs least at

    w_j + sum over i > j of E_i L_ij / L_jj

rounded to the nearest code. That is GPTQ (Frantar et al. 2022, arXiv:2210.17323) written as Babai's nearest plane (Chen et
al. 2025, arXiv:2507.18553): the same codes without the inverse of G, so one Cholesky factorisation in place is all the
algebra there is. Channels are taken in blocks, a block's sums over all earlier blocks in one matrix product; the block size
changes the order of float64 additions and nothing else.

What it sees. G is that of the float block's inputs when everything before the block is rounded: the layer is brought near
its float output on the inputs it will really get. With `correct`, layers are rounded in the order they are computed, G is
that of the inputs as the quantized layers before them make them, and the layer is brought near the output it has in the
float model, on the float model's own inputs: what earlier layers lost is made up for as far as a linear layer can (Li et
al. 2025, GPTAQ, arXiv:2504.02692; Zhang et al. 2025, Qronos, arXiv:2505.11695).

What it fits. A layer has as many unknowns for each output as inputs, and few tokens determine them badly: what is gained on
the calibration texts can be lost on others. How far to go is therefore not a constant. With "auto" the strength of the
correction and the damping of each layer are those with the least output error on rows of texts that are held out of the
statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.linalg.lapack import dpotrf

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.quantizers.clip import ScaleChoice, choose_scale
from ms_pangu_quant.quantizers.grid import QuantizedWeight, row_pieces
from ms_pangu_quant.quantizers.refine import refine
from ms_pangu_quant.quantizers.threads import in_parallel, one_thread
from ms_pangu_quant.recipe.scheme import TensorScheme
from ms_pangu_quant.recipe.settings import check_types

BLOCK = 128
_LARGEST_DAMPING = 1.0
_DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
_HELD_OUT, _TRIED = 2048, 128  # rows of x that a choice is tried on, and outputs that stand for all
_RIDGE = 0.03
_PIECE_ELEMENTS = 1 << 22  # of a float64 working copy: 32 MiB


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
    """

    damping: float | Literal["auto"] = 0.01
    act_order: bool = True
    scale: ScaleChoice = "mse"
    sweeps: int = 0
    correct: bool = False
    strength: float | Literal["auto"] = 1.0
    temper: float = 0.0

    @property
    def needs(self) -> Needs:
        chosen = self.damping == "auto" or (self.correct and self.strength == "auto")
        held_out = _HELD_OUT if chosen else 0
        return Needs(data=True, gram=True, drift=self.correct, temper=self.temper, held_out=held_out)

    def operations(self, outputs: int, inputs: int) -> float:
        """Float64 ones count twice: factors, then 2 for GPTQ's sums, 4 for the correction, 2 for sweeps and 3 for each."""
        each = 2 + 4 * self.correct + (2 + 3 * self.sweeps if self.sweeps else 0)
        factors = 2 * (len(_DAMPINGS) if self.damping == "auto" else 1) + self.correct
        return factors * inputs**3 / 3 + each * float(outputs) * inputs**2

    def __post_init__(self) -> None:
        check_types(self, "gptq")
        for name, largest in (("damping", _LARGEST_DAMPING), ("strength", 1), ("temper", 1)):
            value = getattr(self, name)
            if value != "auto" and not 0 <= value <= largest:
                raise RecipeError(f"gptq.{name}: got {value}, wanted a number from 0 to {largest:g}")
        if self.sweeps < 0:
            raise RecipeError(f"gptq.sweeps: got {self.sweeps}, wanted a whole number of at least 0")

    def __call__(self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None) -> QuantizedWeight:
        """Raises DataError if the gram is not that of any data (a negative or NaN diagonal, far from semidefinite), or if
        something is to be chosen on texts that are held out and there are none."""
        if stats is None or stats.gram is None:
            raise ValueError("gptq needs the gram of the layer's input")
        diagonal = checked_diagonal(stats.gram)
        asked = weight
        if stats.drift is not None:
            step = correction(weight, stats.gram, stats.drift)
            strength = HeldOut(asked, stats).strength(step) if self.strength == "auto" else self.strength
            weight = weight + np.float32(strength) * step
            del step
        scale = choose_scale(weight, scheme, self.scale, diagonal)
        order = np.argsort(-diagonal, kind="stable") if self.act_order else np.arange(len(diagonal))
        wanted = self.damping
        if wanted == "auto":
            wanted = HeldOut(asked, stats).damping(weight, scale, scheme, stats.gram, order)
        factor, damping = factorise(stats.gram, order[::-1], wanted)
        codes = gptq_codes(weight, scale, scheme, factor, order)
        del factor
        note = "" if damping == wanted else f"damping raised from {wanted:g} to {damping:g}"
        rounded = QuantizedWeight(codes, scale, note)
        return (
            refine(weight, rounded, scheme, stats.gram, damping * diagonal.mean(), self.sweeps) if self.sweeps else rounded
        )


class HeldOut:
    """A layer's output error on rows of texts that are in no gram; of up to _TRIED of its outputs, evenly spread.

    weight  [out, in] float32, what the layer should compute on the float model's inputs.
    """

    def __init__(self, weight: NDArray[np.float32], stats: InputStats) -> None:
        if stats.held_out is None or not len(stats.held_out.rows):
            raise DataError(
                "gptq: a strength or damping of auto is chosen on texts that are held out of the calibration data, and "
                "there are none: give more texts, or raise calibration.held_out, or give numbers"
            )
        self._every = -(-len(weight) // _TRIED)
        self._rows, drift = stats.held_out.rows, stats.held_out_drift
        tried = weight[:: self._every]
        self._missing = np.zeros((len(self._rows), len(tried)), np.float32) if drift is None else drift.rows @ tried.T
        self._wanted = self._rows @ tried.T + self._missing

    def strength(self, step: NDArray[np.float32]) -> float:
        """The share of this step from the weight, 0 to 1, with the least error: a quadratic has one minimum."""
        moved = self._rows @ step[:: self._every].T
        square = float(np.vdot(moved, moved))
        return float(np.clip(np.vdot(moved, self._missing) / square, 0, 1)) if square else 1.0

    def damping(
        self,
        weight: NDArray[np.float32],
        scale: NDArray[np.float32],
        scheme: TensorScheme,
        gram: NDArray[np.float64],
        order: NDArray[np.intp],
    ) -> float:
        """Of _DAMPINGS the one with which `weight` is rounded with the least error."""
        weight, scale = weight[:: self._every], scale[:: self._every]
        errors = {}
        for damping in _DAMPINGS:
            factor, _ = factorise(gram, order[::-1], damping)
            rounded = QuantizedWeight(gptq_codes(weight, scale, scheme, factor, order), scale).dequantize()
            errors[damping] = float(np.square(self._rows @ rounded.T - self._wanted, dtype=np.float64).sum())
        return min(errors, key=errors.__getitem__)


def checked_diagonal(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The diagonal [in]. Raises DataError if it has a NaN, an infinity or a negative value."""
    diagonal = np.diagonal(gram)
    bad = np.flatnonzero(~(np.isfinite(diagonal) & (diagonal >= 0)))
    if bad.size:
        raise DataError(
            f"gram of a layer's input: {bad.size} of {diagonal.size} diagonal values are negative or not finite (first: "
            f"channel {bad[0]}, {diagonal[bad[0]]}); a sum of squares is neither: the statistics are damaged"
        )
    return np.array(diagonal)


def factorise(gram: NDArray[np.float64], order: NDArray[np.intp], damping: float) -> tuple[NDArray[np.float64], float]:
    """(M, damping used): gram with rows and columns in `order`, damped, is L L^T, and M_ij = L_ij / L_jj for i >= j.

    gram  [in, in], symmetric positive semidefinite. A channel that was never active has a row of zeros; it is given a one
          on the diagonal, which makes it be rounded to nearest and leaves the others alone.
    M     [in, in] float64, unit lower triangular; what stands above the diagonal is not defined.
    Raises DataError if not even a damping of 1 makes the gram positive definite.
    """
    mean = float(np.diagonal(gram).mean())
    while True:
        lower = gram[np.ix_(order, order)]
        diagonal = np.einsum("ii->i", lower)
        diagonal += damping * mean
        diagonal[diagonal == 0] = 1.0
        # LAPACK is column-major: the upper factor of the transpose is the lower factor of this array, in place.
        with one_thread():
            _, failed = dpotrf(lower.T, lower=0, clean=0, overwrite_a=1)
        if not failed:
            lower /= np.einsum("ii->i", lower).copy()
            return lower, damping
        del lower, diagonal
        if damping >= _LARGEST_DAMPING:
            raise _indefinite()
        damping = min(max(10 * damping, 1e-6), _LARGEST_DAMPING)


def _indefinite() -> DataError:
    return DataError(
        "gram of a layer's input: not semidefinite, even when damped; a sum of x x^T is, so the statistics are damaged"
    )


def correction(weight: NDArray[np.float32], gram: NDArray[np.float64], drift: NDArray[np.float64]) -> NDArray[np.float32]:
    """What is to be added to `weight` for it to come, on the inputs x the layer gets, closest to what `weight` makes of the
    float model's y; [out, in].

    Least squares with a ridge that holds it to `weight`: weight drift (gram + r I)^-1, r = _RIDGE times the mean diagonal
    of the gram. All in float32: the ridge bounds the condition number by inputs / _RIDGE, 4e5 for 12800, and it is a
    correction whose third digit does not matter. Raises DataError if the gram is not positive semidefinite.
    """
    damped = gram.astype(np.float32)
    diagonal = np.einsum("ii->i", damped)
    diagonal += _RIDGE * float(diagonal.mean()) or 1.0
    try:
        with one_thread():
            factor = cho_factor(damped.T, lower=True, overwrite_a=True, check_finite=False)  # column-major: in place
    except LinAlgError:
        raise _indefinite() from None
    result, narrow = np.empty_like(weight), drift.astype(np.float32, copy=False)

    def correct(rows: slice) -> None:
        wanted = weight[rows] @ narrow
        result[rows] = cho_solve(factor, wanted.T, overwrite_b=True, check_finite=False).T

    in_parallel(correct, row_pieces(weight, _PIECE_ELEMENTS))
    return result


def gptq_codes(
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    scheme: TensorScheme,
    factor: NDArray[np.float64],
    order: NDArray[np.intp],
    block: int = BLOCK,
) -> NDArray[np.int8]:
    """Codes int8 [out, in] of weight [out, in] on the grid of scale [out, groups].

    factor  of factorise for order[::-1]; order [in], the channels as they are rounded, first one first.
    """
    codes = np.empty(weight.shape, np.int8)
    columns = order[::-1]  # the factor's order: rounded from the last to the first
    group = columns // (weight.shape[1] // scale.shape[1])

    def round_rows(rows: slice) -> None:
        target = weight[rows].T[columns]  # [in, rows] float32, contiguous
        steps = np.ascontiguousarray(scale[rows].T)
        rounded, error = np.empty(target.shape, np.int8), np.empty(target.shape, np.float64)
        for stop in range(len(columns), 0, -block):
            start = max(stop - block, 0)
            carried = factor[stop:, start:stop].T @ error[stop:]
            inside = np.ascontiguousarray(factor[start:stop, start:stop].T)
            for j in range(stop - 1, start - 1, -1):
                carried[j - start] += inside[j - start, j + 1 - start :] @ error[j + 1 : stop]
                wanted = (target[j] + carried[j - start]).astype(np.float32)  # as float32, so that ties fall as in RTN
                code = np.clip(np.rint(wanted / steps[group[j]]), scheme.code_min, scheme.code_max)
                error[j] = target[j] - code.astype(np.float64) * steps[group[j]]
                rounded[j] = code
        codes[rows] = rounded[np.argsort(columns)].T

    in_parallel(round_rows, row_pieces(weight, _PIECE_ELEMENTS))
    return codes
