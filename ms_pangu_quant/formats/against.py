"""Whether quantized weights are the rounding of a float checkpoint's: the half-step law, as far as it can be known.

A weight rounded to the nearest code lies within half a step of what was rounded. That is not the checkpoint's W[o, i] but
W[o, i] * s[i] * t[o]: smoothing multiplied the layer's inputs by a scale s and divided the rows of the layer that produces
them by it (t = 1 / s of the next layer's input). Neither is stored. What is known of them:

  q, k, v, gate, up   read a norm: s is the norm's weight in the checkpoint over the stored one, exact to a float32 rounding
  v                   its bias was scaled with its rows: t is the stored bias over the checkpoint's, where that is not zero
  up, v without bias  t is a number for each row. Every weight of the row allows an interval of t, and the law holds for
                      some t if and only if all of them meet.
  o, down             s is 1 / t of v, of up: again an interval for each input, which must meet the column's

So q, k, gate and v with a bias are checked weight by weight; the others up to one free number for each row or column, which
a fault would have to imitate. What is not checkable so is said in a note: weights rounded by anything but plain "rtn" (GPTQ
moves a weight by more than half a step on purpose, a searched scale clips: there the relative error is computed again and
compared with the report's), weights that another transform mixed (nothing is compared), and a directory without a
report (its weights must only be near). A rotation is known, so the checkpoint is rotated alike and takes the place of W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.writer import REPORT_FILE
from ms_pangu_quant.errors import CheckpointError, RecipeError
from ms_pangu_quant.quantizers.grid import relative_weight_error, row_pieces
from ms_pangu_quant.transforms.fold import expand_to_input
from ms_pangu_quant.transforms.rotate import REWRITES, Rotate

SCALING_TRANSFORMS = ("smooth", "smooth_search")  # transforms that only multiply input channels and divide producers
_SLACK = 2.0**-18  # relative: a few float32 roundings of weight, scale and quotient
_UNRELATED = 0.5  # relative weight error beyond which a layer is not the checkpoint's at all


@dataclass(frozen=True)
class Bounds:
    """low <= x <= high for each of n positive unknowns; low = high where it is known."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def exactly(cls, values: NDArray[Any]) -> Bounds:
        wide = values.astype(np.float64)
        return cls(wide * (1 - _SLACK), wide * (1 + _SLACK))

    def inverse(self) -> Bounds:
        with np.errstate(divide="ignore"):
            return Bounds(1 / self.high, 1 / self.low)

    @property
    def middle(self) -> NDArray[np.float64]:
        return (self.low + self.high) / 2

    @property
    def known(self) -> bool:
        """To a few float32 roundings, every one."""
        return bool((self.high <= self.low * (1 + 4 * _SLACK)).all())

    @property
    def empty(self) -> NDArray[np.bool_]:
        return np.asarray((self.low > self.high * (1 + 4 * _SLACK)) | np.isinf(self.low), np.bool_)


@dataclass(frozen=True)
class Law:
    """What must hold of the weights, by the recipe in the directory's report.

    rewrites   what was done to the checkpoint before a block was read.
    half_step  every weight is within half a step;  errors  the relative error that the report has, by block and site name;
    near       the relative error is at most _UNRELATED. All False: nothing is known. notes: what is not checked, and why.
    """

    rewrites: tuple[Rotate, ...] = ()
    half_step: bool = False
    errors: tuple[Mapping[str, float], ...] = ()
    near: bool = False
    notes: tuple[str, ...] = ()


def law_of(directory: Path) -> Law:
    path = directory / REPORT_FILE
    if not path.exists():
        why = f"{REPORT_FILE}: not there, so the rounding is not known: only that the weights are near is checked"
        return Law(near=True, notes=(why,))
    try:
        report = read_json(path)
        recipe, errors = yaml.safe_load(report["recipe"]["text"]), [block["weight_error"] for block in report["blocks"]]
        items = recipe.get("transforms") or []
        named = [_name(item) for item in items]
        rewrites = tuple(REWRITES[_name(item)](**_settings(item)) for item in items if _name(item) in REWRITES)
    except (KeyError, TypeError, AttributeError, RecipeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: is not a report of pangu-quant ({type(error).__name__}: {error})") from None
    rounding = recipe.get("rounding", "rtn")
    mixing = [name for name in named if name not in SCALING_TRANSFORMS and name not in REWRITES]
    if mixing:
        why = f"weights are not compared: transform {mixing[0]!r} does more than scale channels"
        return Law(notes=(why,))
    if _name(rounding) != "rtn" or _settings(rounding).get("scale", "absmax") != "absmax":  # a searched scale clips
        why = f"the half-step law is not checked: {_name(rounding)!r} moves weights further; their errors are checked"
        return Law(rewrites, errors=tuple(errors), notes=(why,))
    return Law(rewrites, half_step=True)


def _name(item: Any) -> str:
    return item if isinstance(item, str) else str(next(iter(item)))


def _settings(item: Any) -> dict[str, Any]:
    return dict(item[_name(item)] or {}) if isinstance(item, dict) else {}


def check_block(
    index: int, original: Block, stored: Block, linears: Mapping[str, QuantizedLinear], law: Law
) -> Iterator[str]:
    """Faults of one block. original: the float checkpoint's block;  stored: the float tensors of the quantized one."""
    rows: dict[str, Bounds] = {}  # of v and up: 1 / scale of the next layer's input
    for site in layout.SITES:
        name = f"{layout.block_prefix(index)}{site.name}.weight"
        weight, linear = original.weight(site), linears.get(site.name)
        inputs = _input_scale(original, stored, site, rows)
        produces = any(other.producer == site.name for other in layout.SITES)
        if linear is None:
            if produces:
                rows[site.name] = _float_rows(weight, stored.weight(site), inputs)
            continue
        row = _bias_ratio(original, stored, site) if produces else Bounds.exactly(np.ones(len(weight)))
        if law.half_step:
            row, bad, lines = _half_step(weight, linear, inputs, row)
            if bad:
                yield (
                    f"{name}: {bad} of {weight.shape[lines == 'columns']} {lines} have weights more "
                    "than half a step from what was rounded; is --against another checkpoint, or were they changed?"
                )
        elif row.known and inputs.known:
            scaled = np.asarray(weight * row.middle[:, None] * inputs.middle, np.float32)
            error = relative_weight_error(linear.weight, scaled)
            if law.near and error > _UNRELATED:
                yield f"{name}: relative error {error:.3g}; this is not the rounding of the --against checkpoint's weight"
            recorded = law.errors[index].get(site.name) if index < len(law.errors) else None
            if recorded is not None and abs(error - recorded) > 0.01 * recorded:
                yield f"{name}: relative error {error:.4g}, but {REPORT_FILE} has {recorded:.4g}; was it changed?"
        if produces:
            rows[site.name] = row


def _input_scale(original: Block, stored: Block, site: layout.LinearSite, rows: Mapping[str, Bounds]) -> Bounds:
    if site.producer in layout.NORMS:
        before, after = original[f"{site.producer}.weight"], stored[f"{site.producer}.weight"]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where((before == 0) & (after == 0), 1.0, before.astype(np.float64) / after)
        return Bounds.exactly(np.where(np.isfinite(ratio) & (ratio > 0), ratio, 1.0))
    bounds = rows[site.producer].inverse()
    return Bounds(*(expand_to_input(original, site.input_name, each) for each in (bounds.low, bounds.high)))


def _bias_ratio(original: Block, stored: Block, site: layout.LinearSite) -> Bounds:
    """t of each row, from the bias that was scaled with it; anything where there is none."""
    before, after = original.bias(site), stored.bias(site)
    free = Bounds(np.zeros(len(original.weight(site))), np.full(len(original.weight(site)), np.inf))
    if before is None or after is None:
        return free
    known = (before != 0) & (after != 0) & (np.sign(before) == np.sign(after))
    ratio = Bounds.exactly(np.divide(after.astype(np.float64), before, out=np.ones(len(before)), where=known))
    return Bounds(np.where(known, ratio.low, free.low), np.where(known, ratio.high, free.high))


def _float_rows(weight: NDArray[np.float32], stored: NDArray[np.float32], inputs: Bounds) -> Bounds:
    """t of each row of a layer that stayed float: stored = weight * s * t. inputs is known there (a norm's)."""
    base = weight * inputs.middle
    largest = np.abs(base).argmax(axis=1)
    at = np.arange(len(base))
    denominator = base[at, largest]
    ratio = np.divide(stored[at, largest], denominator, out=np.ones(len(base)), where=denominator != 0)
    return Bounds.exactly(np.where(ratio > 0, ratio, 1.0))


def _half_step(
    weight: NDArray[np.float32], linear: QuantizedLinear, inputs: Bounds, rows: Bounds
) -> tuple[Bounds, int, str]:
    """(t of the rows, as far as it is then known; how many lines cannot obey the law; "rows" or "columns").

    Every weight allows an interval of u in |weight * u - code * scale| <= scale / 2. With s known, u / s is an interval of
    t for each row; with t known (1), u is one of s for each column.
    """
    by_row = rows.low.copy(), rows.high.copy()
    by_column = inputs.low.copy(), inputs.high.copy()
    size = weight.shape[1] // linear.weight.scale.shape[1]
    for piece in row_pieces(weight):
        step = np.repeat(linear.weight.scale[piece].astype(np.float64), size, axis=1)
        code, base = linear.weight.codes[piece].astype(np.float64), weight[piece].astype(np.float64)
        zero = base == 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = (code - 0.5) * step / base, (code + 0.5) * step / base
        low = np.where(zero, np.where(code == 0, 0.0, np.inf), np.minimum(*ends))  # a zero has code 0 whatever u is
        high = np.where(zero, np.inf, np.maximum(*ends))
        if not inputs.known:
            by_column = np.maximum(by_column[0], low.max(axis=0)), np.minimum(by_column[1], high.min(axis=0))
        else:
            s = inputs.middle
            by_row[0][piece] = np.maximum(by_row[0][piece], (low / s).max(axis=1))
            by_row[1][piece] = np.minimum(by_row[1][piece], (high / s).min(axis=1))
    if not inputs.known:
        return rows, int(Bounds(*by_column).empty.sum()), "columns"
    found = Bounds(*by_row)
    bad = found.empty
    free = Bounds(np.where(bad, 0.0, found.low), np.where(bad, np.inf, found.high))  # nothing follows from a bad row
    return free, int(bad.sum()), "rows"
