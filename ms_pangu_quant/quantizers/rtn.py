"""Round to nearest: every weight goes to the closest code of its channel's or group's grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.clip import ScaleChoice, choose_scale
from ms_pangu_quant.quantizers.grid import QuantizedWeight, round_to_grid
from ms_pangu_quant.recipe.scheme import TensorScheme
from ms_pangu_quant.recipe.settings import check_types


@dataclass(frozen=True)
class RoundToNearest:
    """Settings.

    scale     "absmax": the grid spans the largest |w|, so |w - dequantized| <= scale / 2 for every weight.
              "mse": the grid with the least squared error (clip.py), the largest weights may be clipped.
    weighted  with "mse": errors count by the mean square of the input they are multiplied with; needs calibration.
    """

    scale: ScaleChoice = "absmax"
    weighted: bool = False

    def __post_init__(self) -> None:
        check_types(self, "rtn")
        if self.weighted and self.scale != "mse":
            raise RecipeError("rtn.weighted: is for scale: mse; with absmax no error is weighed")

    @property
    def needs(self) -> Needs:
        return Needs(data=self.weighted)

    def operations(self, outputs: int, inputs: int) -> float:
        return float(outputs * inputs)

    def __call__(
        self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None, rows: slice = slice(None)
    ) -> QuantizedWeight:
        weight = weight[rows]
        importance = stats.squares if self.weighted and stats is not None else None
        scale = choose_scale(weight, scheme, self.scale, importance)
        return QuantizedWeight(round_to_grid(weight, scale, scheme), scale)
