"""SmoothQuant with the best scales: for each input those that cost its layers the least output error.

How it works. A rounding step of width d moves a value by an error of variance d^2 / 12, independent of everything else.
With x / s rounded in the layer's activation scheme and W * s in its weight scheme, the squared output error of the layers
that read x, summed over tokens, is then

    1/12 sum over rows r and groups g  dW[r,g]^2 * (sum over j in g  G_jj / s_j^2)        the weights' rounding
  + 1/12 sum over tokens t  dx[t]^2 * (sum over r, j  W_rj^2 s_j^2)                       the activations' rounding

with G_jj the sum of x_j^2, dW = max over the group |W s| / divisor and dx = max |x / s| / divisor. All of it follows from
statistics, without running the block. It is a sum of products of maxima and sums of powers of s, a generalized posynomial:
its logarithm is convex in log s (Boyd et al. 2007, A tutorial on geometric programming, sec. 5), so that there is one
minimum, and L-BFGS finds it in a few dozen steps, the maxima taken as power means. SmoothQuant's scales x^a / w^(1-a) (Xiao
et al. 2022, arXiv:2211.10438) and AWQ's x^a (Lin et al. 2023, arXiv:2306.00978) cost more.

What it does not do: see clipping, weights smaller than half a step (they err by less), correlation between inputs, or what
GPTQ makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ms_pangu_quant.calibration.statistics import InputStats, Needs
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.layout import INPUT_NAMES, sites_reading
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.quantizers.threads import one_thread
from ms_pangu_quant.recipe.scheme import QuantScheme
from ms_pangu_quant.recipe.settings import check_types
from ms_pangu_quant.transforms.fold import expand_to_input, fold_changes, fold_scale, reduce_to_producer
from ms_pangu_quant.transforms.smooth import check_inputs

_ROWS = 512  # output channels of a layer that stand for all of them
_WIDEST = np.log(1e5)  # a channel's scale, either way
_POWER = 4  # squarings that make a value of a row what it weighs in the row's power mean
_PIECE = 16  # rows whose shares are summed one after another
_STEPS = {"maxiter": 100, "maxcor": 20}


@dataclass(frozen=True)
class SmoothSearch:
    """inputs as for smooth. Downstream ones are searched first, so that a producer is scaled before its own input is."""

    inputs: Sequence[str] = INPUT_NAMES

    @property
    def needs(self) -> Needs:
        return Needs(data=True, rows=512)

    def __post_init__(self) -> None:
        check_types(self, "smooth_search")
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
            cost = OutputCost([block.weight(site) for site in sites_reading(input_name)], stats[input_name], scheme)
            with one_thread():
                best = best_scale(block, input_name, cost)
            block, stats = fold_scale(block, stats, input_name, best)
        return block, dict(stats)


def best_scale(block: Block, input_name: str, cost: OutputCost) -> NDArray[np.float32]:
    """[scale_channels] float32; 1 where a channel was never active or no weight reads it."""
    used = reduce_to_producer(block, input_name, cost.used.astype(np.float32)) > 0
    start = np.zeros(len(used))

    def logarithm(log_s: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, gradient = cost.smooth(expand_to_input(block, input_name, np.exp(log_s)))
        gradient = reduce_to_producer(block, input_name, gradient, np.add)
        return float(np.log(value)), np.where(used, gradient, 0) / value

    if not used.any():
        return start.astype(np.float32) + 1
    found = minimize(
        logarithm, start, jac=True, method="L-BFGS-B", bounds=[(-_WIDEST, _WIDEST)] * len(used), options=_STEPS
    )
    log_s = np.where(used, found.x - found.x[used].mean(), 0)  # a common factor changes nothing
    scales = [np.exp(log_s).astype(np.float32), np.ones(len(used), np.float32)]
    return min(scales, key=lambda s: cost(expand_to_input(block, input_name, s)))


class OutputCost:
    """The sum above as a function of the scale s [in], over the calibration tokens and _ROWS channels of each layer.

    weights  [out_i, in] float32, the layers that read the input.
    used     channels that are active and read by a weight.
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
        self.used = (seen.absmax > 0) & (self._columns > 0)  # [in]

    def __call__(self, s: NDArray[np.float32]) -> float:
        square, groups = s.astype(np.float64) ** 2, self._scheme.weight.groups(len(s))
        steps_w = np.square((self._weight * s).reshape(-1, groups, len(s) // groups).max(axis=2), dtype=np.float64)
        rounded_w = (self._stand_for * steps_w).sum(axis=0) @ (self._squares / square).reshape(groups, -1).sum(axis=1)
        largest = (self._rows * (1 / s).astype(np.float32)).max(axis=1).astype(np.float64)
        steps_x = np.square(largest).mean() if self._scheme.activation.dynamic else np.square(largest.max())
        rounded_x = self._tokens * steps_x * (self._columns @ square)
        return float(rounded_w / self._scheme.weight.divisor**2 + rounded_x / self._scheme.activation.divisor**2) / 12

    def smooth(self, s: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The sum with power means for the maxima, which makes it larger, and its gradient over log s [in]."""
        square, groups = s**2, self._scheme.weight.groups(len(s))
        steps, slope_w = weighed_means(self._weight, s, self._stand_for[:, 0], groups)
        spread = (self._squares / square).reshape(groups, -1)
        rounded_w = steps.sum(axis=0) @ spread.sum(axis=1)
        slope_w = slope_w.reshape(groups, -1) * spread.sum(axis=1)[:, None] - steps.sum(axis=0)[:, None] * spread
        rows = self._rows if self._scheme.activation.dynamic else self._rows.reshape(1, -1)  # else one step for all
        stand_for = np.full(len(rows), self._tokens / len(rows))
        each, slope_x = weighed_means(rows, np.resize(1 / s, rows.shape[1]), stand_for, 1)
        columns = self._columns * square
        slope_x = each.sum() * columns - columns.sum() * slope_x.reshape(-1, len(s)).sum(axis=0)
        w, x = self._scheme.weight.divisor**2, self._scheme.activation.divisor**2
        gradient = (slope_w.reshape(-1) / w + slope_x / x) / 6
        return float(rounded_w / w + each.sum() * columns.sum() / x) / 12, gradient


def weighed_means(
    values: NDArray[np.float32], factor: NDArray[np.float64], weight: NDArray[np.float64], groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """v = values [rows, in] >= 0 times factor [in]. Of each group of a row's channels the square of its power mean
    (sum of v^p)^(1/p), p = 2^_POWER, times weight [rows]: [rows, groups]. And of each channel its part of these squares, as
    its part of the power sums, summed over rows: [in]."""
    kernels = library()
    if kernels is not None:
        squares, parts = np.empty((len(values), groups)), np.empty((-(-len(values) // _PIECE), values.shape[1]))
        given = [np.ascontiguousarray(each) for each in (values, factor, weight)]
        read = [each.ctypes.data for each in given]
        sizes = (len(values), groups, values.shape[1] // groups, _POWER, _PIECE)
        kernels.functions.pangu_power_means(*read, *sizes, squares.ctypes.data, parts.ctypes.data)
        return squares, parts.sum(axis=0)
    scaled = (values * factor).reshape(len(values), groups, -1)
    largest = scaled.max(axis=-1)
    shares = scaled / np.where(largest > 0, largest, 1)[..., None]
    for _ in range(_POWER):
        np.square(shares, out=shares)
    total = shares.sum(axis=-1)
    shares /= np.where(total > 0, total, 1)[..., None]
    squares = weight[:, None] * np.square(largest * total ** (0.5**_POWER))
    return squares, np.einsum("rg,rgj->gj", squares, shares).reshape(-1)


def _sampled_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Of a layer [out, in] up to _ROWS rows, evenly spread, and how many of its rows each stands for [sampled, 1]."""
    rows = weight[:: -(-len(weight) // _ROWS)]
    return rows, np.full((len(rows), 1), len(weight) / len(rows))
