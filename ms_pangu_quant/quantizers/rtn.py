"""Round to nearest: every weight goes to the closest code of a grid that spans the channel's or group's largest |w|."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.quantizers.grid import QuantizedWeight, round_to_grid, weight_scale
from ms_pangu_quant.scheme import TensorScheme


@dataclass(frozen=True)
class RoundToNearest:
    """|w - dequantized| <= scale / 2 for every weight. Statistics are not used."""

    needs_gram: bool = False

    def __call__(self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None) -> QuantizedWeight:
        scale = weight_scale(weight, scheme)
        return QuantizedWeight(round_to_grid(weight, scale, scheme), scale)
