"""Learned rounding: every weight's rounding and every scale's range moved by the signs of gradients (AutoRound's family).

How it works. A weight becomes s * clip(rint(w / s + v)), with v in [-1/2, 1/2] and s = scale * r learned: some steps along
the sign of the gradient of the layer's output error tr(E G E^T), E = weight - dequantized, G = sum over tokens of x x^T,
the rounding taken as the identity where it is differentiated; the step falls linearly to 0. Of all steps each output keeps
the codes with the least error, beginning with rounding to nearest, so it never does worse.

What it is not. AutoRound (Cheng et al. 2023, arXiv:2309.05516) minimises the error of a whole block's output and so needs
the block's gradient; here each layer is rounded for itself, from the same statistics as GPTQ. It is there to be compared
with GPTQ, which does better in a fraction of the time (docs/recipes.md); no shipped recipe has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.clip import ScaleChoice, choose_scale
from ms_pangu_quant.quantizers.gptq import checked_diagonal
from ms_pangu_quant.quantizers.grid import QuantizedWeight, round_to_grid, round_up_to_bfloat16, row_pieces
from ms_pangu_quant.quantizers.threads import LARGE, in_parallel
from ms_pangu_quant.recipe.scheme import TensorScheme
from ms_pangu_quant.recipe.settings import check_types

_ROWS = 512  # that one thread works on, whatever the machine
_LEAST_RANGE, _MOST_RANGE = 0.5, 1.5


@dataclass(frozen=True)
class SignRound:
    """Settings.

    steps  of the descent; the first moves v and r by 1 / steps, as AutoRound's does.
    scale  what it starts from: "absmax" or "mse" (clip.py, weighted by the gram's diagonal).
    """

    steps: int = 200
    scale: ScaleChoice = "mse"

    def __post_init__(self) -> None:
        check_types(self, "signround")
        if self.steps < 1:
            raise RecipeError(f"signround.steps: got {self.steps}, wanted a whole number of at least 1")

    @property
    def needs(self) -> Needs:
        return Needs(data=True, gram=True)

    def operations(self, outputs: int, inputs: int) -> float:
        return self.steps * float(outputs) * inputs**2

    def __call__(
        self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None, rows: slice = slice(None)
    ) -> QuantizedWeight:
        """Raises DataError if the gram is not that of any data (a negative or NaN diagonal)."""
        if stats is None or stats.gram is None:
            raise ValueError("signround needs the gram of the layer's input")
        weight = weight[rows]
        scale = choose_scale(weight, scheme, self.scale, checked_diagonal(stats.gram))
        codes = round_to_grid(weight, scale, scheme)
        gram = stats.gram.astype(np.float32, copy=False)

        def learn(rows: slice) -> None:
            codes[rows], scale[rows] = learned(weight[rows], codes[rows], scale[rows], scheme, gram, self.steps)

        in_parallel(learn, row_pieces(weight, _ROWS * weight.shape[1]), LARGE)
        return QuantizedWeight(codes, scale)


def learned(
    weight: NDArray[np.float32],
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    scheme: TensorScheme,
    gram: NDArray[np.float32],
    steps: int,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(codes int8 [out, in], scale float32 [out, groups]) with the least tr(E gram E^T) met on the way from the ones given,
    which are rounded to nearest."""
    shape = (len(weight), scale.shape[1], -1)
    grouped = weight.reshape(shape)
    best_codes, best_scale = codes.copy(), scale.copy()
    least = np.full(len(weight), np.inf)
    moved, ranges = np.zeros_like(grouped), np.ones_like(scale)
    for step in range(steps + 1):
        stepped = scale * ranges
        stored = round_up_to_bfloat16(stepped) if scheme.bfloat16_scale else stepped
        wide = stored[:, :, None]
        wanted = grouped / wide
        rounded = np.rint(wanted + moved)
        inside = (rounded >= scheme.code_min) & (rounded <= scheme.code_max)
        np.clip(rounded, scheme.code_min, scheme.code_max, out=rounded)
        error = (grouped - rounded * wide).reshape(weight.shape)
        pull = error @ gram
        total = np.einsum("oi,oi->o", error, pull, dtype=np.float64)
        better = total < least
        least = np.where(better, total, least)
        best_codes[better] = rounded.reshape(weight.shape)[better].astype(np.int8)
        best_scale[better] = stored[better]
        rate = np.float32((1 - step / steps) / steps)
        pull = pull.reshape(grouped.shape)
        along = pull * (rounded - np.where(inside, wanted, 0))  # the code moves as -w / s does, or not at all where clipped
        moved = np.clip(moved + rate * np.sign(pull) * inside, -0.5, 0.5).astype(np.float32)
        ranges = np.clip(ranges + rate * np.sign(along.sum(axis=2)), _LEAST_RANGE, _MOST_RANGE).astype(np.float32)
    return best_codes, best_scale
