"""What calibration remembers of the activations that enter a linear layer.

A monoid: statistics of two batches merge into the statistics of both, in any order and grouping, so batches, processes
and machines combine. Scaling is exact: the statistics of x / s follow from those of x, without seeing x again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.errors import DataError
from ms_pangu_quant.quantizers.products import add_product, product
from ms_pangu_quant.quantizers.threads import by_element, pieces

SAMPLE_TOKENS = 4096  # that tell how large an input is
PIECE_TOKENS = 4096  # rows gathered before their products are added: the gram is read and written once for so many
_STRIP = 1024
_PIECE_ROWS, _PIECE_COLUMNS = 128, 512  # 512 KiB in float64


@dataclass(frozen=True)
class Needs:
    """What an algorithm must be given of a layer's input; `one | other` is what both need.

    data   statistics at all, so calibration data.
    gram   the sum of x x^T, see InputStats.
    rows   so many rows of it.
    drift  gram and drift from the float model, of the input as the layers rounded before it make it: layers are then
           rounded one input after another, and the float model runs beside the quantized one.
    temper gram, drift and held-out rows of layers that write the residual stream are of rows that token_weights made even,
           with this exponent; 0 leaves them as they are.
    held_out  so many rows of texts that nothing else is of, and with drift their differences: what is fitted to the others
           can be tried on them.
    """

    data: bool = False
    gram: bool = False
    rows: int = 0
    drift: bool = False
    temper: float = 0.0
    held_out: int = 0
    bfloat16: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.data or other.data,
            self.gram or other.gram,
            max(self.rows, other.rows),
            self.drift or other.drift,
            max(self.temper, other.temper),
            max(self.held_out, other.held_out),
            self.bfloat16 or other.bfloat16,
        )


NOTHING = Needs()


def token_weights(states: NDArray[np.float32], temper: float) -> NDArray[np.float32]:
    """What each token's row is multiplied by [tokens, 1]: its rms in states [tokens, hidden] to the power of -temper.

    What reads the residual stream normalises it first, so an error there matters relative to the token's size: temper 1.
    But the few tokens that are a thousand times as large as others (Sun et al. 2024, arXiv:2402.17762) are what all others
    attend to, so theirs matter more: temper 0 counts errors as they are. A token of zeros is left alone.
    """
    square = np.einsum("ti,ti->t", states, states, dtype=np.float64) / states.shape[1]
    weights: NDArray[np.float32] = (np.where(square > 0, square, 1.0) ** (-temper / 2)).astype(np.float32)[:, None]
    return weights


@dataclass(frozen=True)
class RowSample:
    """A uniform sample of rows: of all rows seen, the `size` whose keys are smallest.

    A key is a hash of the row's place in the calibration data, so which rows are kept does not depend on how they came in.

    rows  [kept, in] float32, kept <= size.   keys  [kept] uint64, ascending, all different.
    """

    size: int
    rows: NDArray[np.float32]
    keys: NDArray[np.uint64]

    @classmethod
    def draw(cls, x: NDArray[np.float32], size: int, start: int) -> RowSample:
        """From x [tokens, in], whose first row is row `start` of the calibration data."""
        return cls(size, x, row_keys(start, len(x)))._smallest()

    def merge(self, other: RowSample) -> RowSample:
        rows, keys = np.concatenate([self.rows, other.rows]), np.concatenate([self.keys, other.keys])
        return RowSample(self.size, rows, keys)._smallest()

    def scaled(self, s: NDArray[np.float32]) -> RowSample:
        return RowSample(self.size, (self.rows / s).astype(np.float32), self.keys)

    def _smallest(self) -> RowSample:
        chosen = np.argsort(self.keys)[: self.size]
        return RowSample(self.size, self.rows[chosen], self.keys[chosen])


def row_keys(start: int, count: int) -> NDArray[np.uint64]:
    """splitmix64 of start, start + 1, ...: a bijection, so different rows have different keys."""
    z = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class InputStats:
    """Statistics of an input x [tokens, in].

    tokens   number of rows seen.
    absmax   [in] float32, max |x| over tokens, 0 where never active.
    gram     [in, in] float32, sum over tokens of x x^T; None unless asked for.
    sample   some rows of x; None unless asked for.
    drift    [in, in] float32, sum over tokens of (y - x) x^T, y what x is in the float model; None unless y was given.
    output_drift  [out, in] float32, W times the drift in its place, W the weight that reads x; the smaller one.
    squares  [in] float64, sum over tokens of x^2: the gram's diagonal, known without it. Where tokens are weighted
             (Needs.temper) they are so in gram, drift and held-out rows alone.
    held_out  rows of x that are in nothing else here, of other texts; None unless asked for.
    held_out_drift  y - x of the same rows; None unless y was given.
    """

    tokens: int
    absmax: NDArray[np.float32]
    gram: NDArray[np.float32] | None = None
    sample: RowSample | None = None
    drift: NDArray[np.float32] | None = None
    squares: NDArray[np.float64] | None = None
    held_out: RowSample | None = None
    held_out_drift: RowSample | None = None
    output_drift: NDArray[np.float32] | None = None

    @classmethod
    def observe(
        cls, x: NDArray[np.float32], *, gram: bool = False, rows: int = 0, start: int = 0, where: str = "activations"
    ) -> InputStats:
        """The statistics of x [tokens, in], rows start, start + 1, ... of the calibration data; keeps `rows` of them.

        Raises DataError if x has a NaN or an infinity: no scale made from it would mean anything.
        """
        absmax, squares = _extremes(x)
        if not np.isfinite(absmax).all():
            channels = np.flatnonzero(~np.isfinite(absmax))
            raise DataError(
                f"{where}: {channels.size} of {absmax.size} channels are NaN or infinite (first: "
                f"{channels[0]}); the checkpoint overflows on this calibration data"
            )
        sample = RowSample.draw(x, rows, start) if rows else None
        product = x.T @ x if gram else None
        return cls(len(x), absmax, product, sample, squares=squares)

    def merge(self, other: InputStats) -> InputStats:
        optional = [(getattr(self, name), getattr(other, name)) for name in (*_SUMS, *_SAMPLES)]
        if self.absmax.shape != other.absmax.shape or any((one is None) != (two is None) for one, two in optional):
            raise ValueError("statistics of different inputs do not merge")
        sums: dict[str, Any] = {name: _sum(getattr(self, name), getattr(other, name)) for name in _SUMS}
        samples: dict[str, Any] = {name: _merged(getattr(self, name), getattr(other, name)) for name in _SAMPLES}
        return InputStats(self.tokens + other.tokens, np.maximum(self.absmax, other.absmax), **sums, **samples)

    def scaled(self, s: NDArray[np.float32]) -> InputStats:
        """The statistics of x / s, s [in] > 0."""
        samples: dict[str, Any] = {name: _scaled(getattr(self, name), s) for name in _SAMPLES}
        absmax = (self.absmax / s).astype(np.float32)
        squares = None if self.squares is None else self.squares / s.astype(np.float64) ** 2
        products: dict[str, Any] = {name: _divided(getattr(self, name), s) for name in ("gram", "drift")}
        if self.output_drift is not None:  # the weight is multiplied by s
            products["output_drift"] = self.output_drift / s
        return InputStats(self.tokens, absmax, squares=squares, **products, **samples)


_SUMS, _SAMPLES = ("gram", "drift", "output_drift", "squares"), ("sample", "held_out", "held_out_drift")


def _extremes(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """(absmax, squares) of x [tokens, in], a piece that stays in the cache at a time; rows are added one after another."""
    absmax, squares = np.zeros(x.shape[1], np.float32), np.zeros(x.shape[1])

    def take(columns: slice) -> None:
        width = len(absmax[columns])
        room = np.empty((_PIECE_ROWS + 1, width))
        for start in range(0, len(x), _PIECE_ROWS):
            piece = x[start : start + _PIECE_ROWS, columns]
            for extreme in (piece.max(axis=0), -piece.min(axis=0)):
                np.maximum(absmax[columns], extreme, out=absmax[columns])
            sums = room[: len(piece) + 1]
            sums[0], sums[1:] = squares[columns], piece
            np.square(sums[1:], out=sums[1:])
            np.add.reduce(sums, axis=0, out=squares[columns])

    by_element(take, list(pieces(0, x.shape[1], _PIECE_COLUMNS)))
    return np.abs(absmax), squares  # no -0.0


def _sum(one: NDArray[Any] | None, two: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if one is None or two is None else one + two


def _scaled(rows: RowSample | None, s: NDArray[np.float32]) -> RowSample | None:
    return None if rows is None else rows.scaled(s)


def _merged(one: RowSample | None, two: RowSample | None) -> RowSample | None:
    return None if one is None or two is None else one.merge(two)


def _divided(product: NDArray[np.float32] | None, s: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """product / s s^T; one copy, divided in place: a gram of 12800 inputs is 0.66 GB."""
    if product is None:
        return None
    result = product / s[:, None]
    result /= s
    return result


class StatsBuilder:
    """Statistics of many batches in the memory of one: gathers rows, and adds their products to one gram in place.

    The same numbers as merging observe() of pieces of PIECE_TOKENS rows, but in the memory of one gram (0.66 GB for 12800
    inputs), and however the rows come in. Without products nothing is gathered.
    """

    def __init__(
        self,
        needs: Needs,
        where: str,
        *,
        start: int = 0,
        held_out_start: int = 0,
        weight: NDArray[np.float32] | None = None,
    ) -> None:
        """needs  of which gram, rows, held_out and bfloat16 are looked at.
        start, held_out_start  place of the first row, and of the first held-out one, in the calibration data.
        weight  [out, in] that reads the input: its output_drift is wanted in the place of the drift.
        """
        self._needs, self._where, self._weight = needs, where, weight
        self._held_out, self._held_out_seen = needs.held_out, held_out_start
        self._kept: tuple[RowSample, RowSample | None] | None = None
        self._pieces: list[NDArray[np.float32]] = []  # [PIECE_TOKENS, in], of x and of y - x, and the products of them
        self._products: list[NDArray[np.float32]] = []
        self._waiting = 0  # rows of them
        self._seen = start
        self._total: InputStats | None = None

    def add(
        self, x: NDArray[np.float32], y: NDArray[np.float32] | None = None, weights: NDArray[np.float32] | None = None
    ) -> None:
        """x [tokens, in], the rows that follow those of the last call; y the same in the float model, for the drift.

        weights [tokens, 1] of the rows in gram and drift; y and weights in all calls or in none.
        """
        self._see(x)
        if y is None and not self._needs.gram:
            return
        if not self._pieces:
            count, width = 1 + (y is not None), x.shape[1]
            self._pieces = [np.empty((PIECE_TOKENS, width), np.float32) for _ in range(count)]
            heights = (width, width if self._weight is None else len(self._weight))
            self._products = [np.zeros((height, width), np.float32) for height in heights[:count]]
        taken = 0
        while taken < len(x):
            rows = slice(taken, taken + min(len(x) - taken, PIECE_TOKENS - self._waiting))
            self._gather(x[rows], None if y is None else y[rows], None if weights is None else weights[rows])
            taken = rows.stop

    def hold_out(
        self, x: NDArray[np.float32], y: NDArray[np.float32] | None = None, weights: NDArray[np.float32] | None = None
    ) -> None:
        """As add, of texts that are held out; some of these rows are kept, if any were asked for."""
        if not self._held_out:
            return
        factor = np.float32(1) if weights is None else weights
        start, self._held_out_seen = self._held_out_seen, self._held_out_seen + len(x)
        rows = RowSample.draw(x * factor, self._held_out, start)
        drift = None if y is None else RowSample.draw((y - x) * factor, self._held_out, start)
        if self._kept is not None:
            rows, drift = self._kept[0].merge(rows), _merged(self._kept[1], drift)
        self._kept = rows, drift

    def finish(self) -> InputStats:
        """Raises ValueError if nothing was added."""
        self._flush()
        self._pieces = []
        if self._total is None:
            raise ValueError("no statistics to merge")
        gram, drift = ([*self._products, None, None])[:2]
        if gram is not None:
            _mirror(gram)
        drifts: dict[str, Any] = {"drift" if self._weight is None else "output_drift": drift}
        total = dataclasses.replace(self._total, gram=gram, **drifts)
        if not self._held_out:
            return total
        nothing = RowSample(self._held_out, np.empty((0, len(total.absmax)), np.float32), np.empty(0, np.uint64))
        rows, held_drift = self._kept or (nothing, None if drift is None else nothing)
        return dataclasses.replace(total, held_out=rows, held_out_drift=held_drift)

    def _gather(self, x: NDArray[np.float32], y: NDArray[np.float32] | None, weights: NDArray[np.float32] | None) -> None:
        """Into the pieces; x and what follows from it are never in memory as a whole."""
        places = [piece[self._waiting : self._waiting + len(x)] for piece in self._pieces]

        def copy(rows: slice) -> None:
            factor = np.float32(1) if weights is None else weights[rows]
            if y is not None:
                np.subtract(y[rows], x[rows], out=places[1][rows])
                places[1][rows] *= factor
            np.multiply(x[rows], factor, out=places[0][rows])

        by_element(copy, list(pieces(0, len(x), _PIECE_ROWS)))
        self._waiting += len(x)
        if self._waiting == PIECE_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        x, *differences = (piece[: self._waiting] for piece in self._pieces)
        self._waiting = 0
        bfloat16 = self._needs.bfloat16
        add_product(self._products[0], x.T, x, bfloat16=bfloat16, lower=True)
        for difference in differences:
            lost = difference if self._weight is None else product(difference, self._weight.T, bfloat16=bfloat16)
            add_product(self._products[1], lost.T, x, bfloat16=bfloat16)

    def _see(self, x: NDArray[np.float32]) -> None:
        seen = InputStats.observe(x, rows=self._needs.rows, start=self._seen, where=self._where)
        self._seen += len(x)
        self._total = seen if self._total is None else self._total.merge(seen)


def sums_output_drift(layers: int, outputs: int, inputs: int) -> bool:
    """Whether the drift of the outputs [outputs, inputs] takes less than that of the input, read by so many layers: for t
    tokens 4 t outputs inputs operations in the place of 2 t inputs^2."""
    return layers == 1 and 2 * outputs < inputs


def _mirror(total: NDArray[np.float32]) -> None:
    def mirror(strip: slice) -> None:
        total[strip, strip.stop :] = total[strip.stop :, strip].T
        own = np.tril(total[strip, strip])
        total[strip, strip] = own + np.tril(own, -1).T

    by_element(mirror, list(pieces(0, len(total), _STRIP)))
