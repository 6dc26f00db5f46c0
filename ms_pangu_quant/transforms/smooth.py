"""SmoothQuant: divide hard-to-round activation channels by a scale that the weights absorb.

Every input of the block can be smoothed, not only those behind a norm: the outliers in front of o_proj and down_proj,
which tools that fold into norms alone leave in place, go into v_proj and up_proj.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.layout import INPUT_NAMES, sites_reading
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.grid import row_pieces
from ms_pangu_quant.quantizers.threads import by_element
from ms_pangu_quant.recipe.scheme import QuantScheme
from ms_pangu_quant.recipe.settings import check_types
from ms_pangu_quant.transforms.fold import fold_changes, fold_scale, reduce_to_producer

_SMALLEST = np.float32(1e-5)


def smooth_scale(absmax_x: NDArray[np.float32], absmax_w: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """Scale s so that x/s and W*s are both easy to round; (x/s)(W*s)^T == xW^T.

    absmax_x  [in], max |x| over calibration tokens.
    absmax_w  [in], max |w| over the outputs of every layer that reads x.
    alpha     0 leaves activations alone (s follows the weights), 1 moves all difficulty into the weights.
    Returns   [in] float32, > 0; 1.0 where a channel was never active or no weight reads it.
    Source    Xiao et al. 2022, arXiv:2211.10438, eq. 4.
    """
    x, w = np.maximum(absmax_x, _SMALLEST), np.maximum(absmax_w, _SMALLEST)
    s = x ** np.float32(alpha) / w ** np.float32(1 - alpha)
    s = np.where((absmax_x > 0) & (absmax_w > 0), s, 1.0)
    return np.maximum(s, _SMALLEST).astype(np.float32)


def input_absmax(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest |w| of each input of weight [out, in], over the outputs; [in]."""
    pieces = row_pieces(weight)
    found = np.empty((len(pieces), weight.shape[1]), np.float32)

    def take(rows: slice) -> None:
        piece = weight[rows]
        np.maximum(piece.max(axis=0), -piece.min(axis=0), out=found[pieces.index(rows)])

    by_element(take, pieces)
    largest: NDArray[np.float32] = np.abs(found.max(axis=0))
    return largest


@dataclass(frozen=True)
class SmoothQuant:
    """alpha for the block inputs in `inputs`, downstream inputs first, so that a producer is scaled before it is read."""

    alpha: float = 0.5
    inputs: Sequence[str] = INPUT_NAMES

    @property
    def needs(self) -> Needs:
        return Needs(data=True)

    def __post_init__(self) -> None:
        check_types(self, "smooth")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"smooth.alpha: got {self.alpha}, wanted a number from 0 to 1")
        check_inputs("smooth", self.inputs)

    def changes(self, name: str, schemes: Mapping[str, QuantScheme | None]) -> bool:
        """Whether it rewrites this tensor of a block; inputs of float layers are smoothed too."""
        return fold_changes(self.inputs, name)

    def __call__(
        self, block: Block, stats: Mapping[str, InputStats], schemes: Mapping[str, QuantScheme | None] | None = None
    ) -> tuple[Block, dict[str, InputStats]]:
        for input_name in reversed([name for name in INPUT_NAMES if name in self.inputs]):
            absmax_w = np.maximum.reduce([input_absmax(block.weight(site)) for site in sites_reading(input_name)])
            s = smooth_scale(
                reduce_to_producer(block, input_name, stats[input_name].absmax),
                reduce_to_producer(block, input_name, absmax_w),
                self.alpha,
            )
            block, stats = fold_scale(block, stats, input_name, s)
        return block, dict(stats)


def check_inputs(where: str, inputs: Sequence[str]) -> None:
    unknown = sorted(set(inputs) - set(INPUT_NAMES))
    if unknown or not inputs:
        raise RecipeError(f"{where}.inputs: got {list(inputs)}, wanted some of {', '.join(INPUT_NAMES)}")
