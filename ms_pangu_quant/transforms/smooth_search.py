"""SmoothQuant with searched exponents: for each input the scale that costs its layers the least output error.

How it works. A rounding step of width d moves a value by an error of variance d^2 / 12, independent of everything else.
With x / s rounded in the layer's activation scheme and W * s in its weight scheme, the squared output error of the layers
that read x, summed over tokens, is then

    1/12 sum over rows r and groups g  dW[r,g]^2 * (sum over j in g  G_jj / s_j^2)        the weights' rounding
  + 1/12 sum over tokens t  dx[t]^2 * (sum over r, j  W_rj^2 s_j^2)                       the activations' rounding

with G_jj the sum of x_j^2, dW = max over the group |W s| / divisor and dx = max |x / s| / divisor. All of it follows from
statistics, so hundreds of scales are tried without running the block. The scales tried are s = x^a / w^b, x the channel's
largest or root mean square activation, w its largest weight: b = 1 - a is SmoothQuant (Xiao et al. 2022, arXiv:2211.10438),
b = 0 is AWQ's family (Lin et al. 2023, arXiv:2306.00978), a and b apart the two-exponent form; a runs up to 1.

What it does not do: see clipping, weights smaller than half a step (they err by less), correlation between inputs, or what
GPTQ makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.layout import INPUT_NAMES, sites_reading
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.threads import one_thread
from ms_pangu_quant.recipe.scheme import QuantScheme
from ms_pangu_quant.recipe.settings import check_types
from ms_pangu_quant.transforms.fold import expand_to_input, fold_changes, fold_scale, reduce_to_producer
from ms_pangu_quant.transforms.smooth import check_inputs, input_absmax

_ROWS = 512  # output channels of a layer that stand for all of them
_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothSearch:
    """Settings. step of both exponents' grids; two_exponents False keeps b = 1 - a; inputs as for smooth.

    Downstream inputs are searched first, so that a producer is scaled before its own input is.
    """

    step: float = 0.1
    two_exponents: bool = True
    inputs: Sequence[str] = INPUT_NAMES

    @property
    def needs(self) -> Needs:
        return Needs(data=True, rows=512)

    def __post_init__(self) -> None:
        check_types(self, "smooth_search")
        if not 0.01 <= self.step <= 1:
            raise RecipeError(f"smooth_search.step: got {self.step}, wanted a number from 0.01 to 1")
        check_inputs("smooth_search", self.inputs)

    def changes(self, name: str, schemes: Mapping[str, QuantScheme | None]) -> bool:
        """Whether it rewrites this tensor of a block whose layers have these schemes."""
        return fold_changes([input_name for input_name, _ in self._searched(schemes)], name)

    def _searched(self, schemes: Mapping[str, QuantScheme | None]) -> Iterator[tuple[str, QuantScheme]]:
        """Inputs in the order of the search, with their layers' scheme; those whose layers stay float are left alone."""
        for input_name in reversed([name for name in INPUT_NAMES if name in self.inputs]):
            scheme = schemes[sites_reading(input_name)[0].name]
            if scheme is not None:
                yield input_name, scheme

    def __call__(
        self, block: Block, stats: Mapping[str, InputStats], schemes: Mapping[str, QuantScheme | None]
    ) -> tuple[Block, dict[str, InputStats]]:
        for input_name, scheme in self._searched(schemes):
            sites, seen = sites_reading(input_name), stats[input_name]
            cost = OutputCost([block.weight(site) for site in sites], seen, scheme)
            best, least = None, np.inf
            for s in self._candidates(block, input_name, seen):
                with one_thread():
                    error = cost(expand_to_input(block, input_name, s))
                if error < least:
                    best, least = s, error
            if best is not None:
                block, stats = fold_scale(block, stats, input_name, best)
        return block, dict(stats)

    def _candidates(self, block: Block, input_name: str, seen: InputStats) -> Iterator[NDArray[np.float32]]:
        """Scales [scale_channels] to try, the first one all ones."""
        assert seen.squares is not None
        absmax_w = np.maximum.reduce([input_absmax(block.weight(site)) for site in sites_reading(input_name)])
        rms = np.sqrt(seen.squares / max(seen.tokens, 1)).astype(np.float32)
        w = reduce_to_producer(block, input_name, absmax_w)
        yield np.ones_like(w)
        exponents = np.linspace(0, 1, round(1 / self.step) + 1)
        for size in (seen.absmax, rms):
            x = reduce_to_producer(block, input_name, size)
            usable = (x > 0) & (w > 0)
            log_x, log_w = (np.log(np.maximum(values.astype(np.float64), _SMALLEST)) for values in (x, w))
            for a in exponents:
                for b in exponents if self.two_exponents else (1 - a,):
                    log_s = np.where(usable, a * log_x - b * log_w, 0.0)
                    log_s -= log_s[usable].mean() if usable.any() else 0.0  # a common factor changes nothing
                    yield np.where(usable, np.exp(log_s), 1.0).astype(np.float32)


class OutputCost:
    """The sum above as a function of the scale s [in], over the calibration tokens and _ROWS channels of each layer.

    weights  [out_i, in] float32, the layers that read the input.
    A sampled channel counts as often as its layer has channels for each sampled one: the sum is that over whole layers.
    The largest activation of every channel counts as one more row of the sample: an outlier that the sample missed must not
    look cheap.
    """

    def __init__(self, weights: Sequence[NDArray[np.float32]], seen: InputStats, scheme: QuantScheme) -> None:
        assert seen.squares is not None
        assert seen.sample is not None
        self._scheme, self._tokens, self._squares = scheme, seen.tokens, seen.squares
        rows, stand_for = zip(*map(_sampled_rows, weights), strict=True)
        self._weight, self._stand_for = np.abs(np.concatenate(rows)), np.concatenate(stand_for)
        self._columns = np.einsum("ri,ri->i", self._weight, self._stand_for * self._weight, dtype=np.float64)
        self._rows = np.abs(np.vstack([seen.sample.rows, seen.absmax]))

    def __call__(self, s: NDArray[np.float32]) -> float:
        square, groups = s.astype(np.float64) ** 2, self._scheme.weight.groups(len(s))
        steps_w = np.square((self._weight * s).reshape(-1, groups, len(s) // groups).max(axis=2), dtype=np.float64)
        rounded_w = (self._stand_for * steps_w).sum(axis=0) @ (self._squares / square).reshape(groups, -1).sum(axis=1)
        largest = (self._rows * (1 / s).astype(np.float32)).max(axis=1).astype(np.float64)
        steps_x = np.square(largest).mean() if self._scheme.activation.dynamic else np.square(largest.max())
        rounded_x = self._tokens * steps_x * (self._columns @ square)
        return float(rounded_w / self._scheme.weight.divisor**2 + rounded_x / self._scheme.activation.divisor**2) / 12


def _sampled_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Of a layer [out, in] up to _ROWS rows, evenly spread, and how many of its rows each stands for [sampled, 1]."""
    rows = weight[:: -(-len(weight) // _ROWS)]
    return rows, np.full((len(rows), 1), len(weight) / len(rows))
