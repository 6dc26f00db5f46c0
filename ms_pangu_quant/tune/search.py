"""Which candidate is tried next, and when to stop. Pure: what is known of a candidate comes from a Measurer.

For a KL, the most accurate scheme is measured first: it says whether the target can be met at all, and what KL an error of
its blocks stands for, since KL is quadratic in small errors. Of the cheaper schemes, cheapest first, those are measured
whose blocks promise it; each on a few texts, and on all where these do not rule it out. Where a cheaper scheme fails and a
dearer one passes, layers are raised from the one to the other along the sensitivity curve: what that predicts and what was
measured make a straight line between two points in logarithms, and the next assignment is the one that this line puts just
below the target.

For a retention, candidates are tested from the most accurate down, each at the same level, until one is not shown to
keep enough: tests in a fixed order that stop at the first failure need no adjustment for their number.

What it does not do: mix from a second base scheme, or look at an assignment that the sensitivities do not propose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ms_pangu_quant.tune.retention import Power, Scores, compared, least_problems
from ms_pangu_quant.tune.target import Divergence

HOPELESS = 3.0  # times the target: block errors predict KL to within a factor of two or so
AIM = 0.97  # of the target, for the next assignment
MIXED = 5  # assignments that are quantized at most
RESOLUTION = 0.06  # bits per weight between the largest that fails and the smallest that passes
WORTH = 0.1  # bits per weight that mixing must promise to save
PILOT = 60  # problems on which a test's power is foreseen


class OutOfBudget(Exception):
    """The next step would take longer than what is left; the message says which."""


@dataclass(frozen=True)
class Option:
    """A candidate: bits per weight of its linear layers, bytes of all its tensors, seconds of a decode step on the device.

    block_error  as in pipeline.trial, of one scheme for all layers; None of a mixture.
    predicted    KL by the sensitivities, of a mixture.
    """

    name: str
    bits: float
    nbytes: int
    decode_seconds: float | None = None
    block_error: float | None = None
    predicted: float | None = None


class Curve(Protocol):
    """Mixtures of a base scheme and the most accurate one, by what the sensitivities predict.

    ends is (all layers in the base scheme, all in the other): predicted KL. at() is the cheapest mixture of at most so much
    predicted KL, within() the most accurate of at most so many bits; None where there is none.
    """

    @property
    def ends(self) -> tuple[float, float]: ...

    def at(self, kl: float) -> Option | None: ...

    def within(self, bits: float) -> Option | None: ...


class Measurer(Protocol):
    """Each answer may take long, and may be OutOfBudget instead."""

    def uniform(self) -> Sequence[Option]:
        """One scheme for all layers; their blocks tried."""

    def divergence(self, option: Option, *, few: bool) -> Divergence:
        """On a few of the texts for choosing, or on all of them, the few included."""

    def curve(self, base: Option) -> Curve: ...

    def problems(self) -> int:
        """Of the validation tasks."""

    def scores(self, option: Option | None, limit: int | None) -> Scores:
        """Of the first so many problems of each task; of the float model for no option."""

    def settled(self, kept: Option | None) -> None:
        """Files of candidates other than this are not wanted any more."""


@dataclass(frozen=True)
class Trial:
    """One candidate's evidence and what it came to: "meets", "fails", "undecided" (so many texts or problems cannot say) or
    "dropped" (not worth measuring)."""

    option: Option
    verdict: str
    why: str
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Outcome:
    """winner: the cheapest that was shown to meet the target. closest: else what came nearest, of those that were measured.
    stopped: why the search did not go on, where it was not done. power: of the last test of pass@1."""

    winner: Option | None
    closest: Trial | None
    trials: tuple[Trial, ...]
    stopped: str | None = None
    power: Power | None = None


class _Search:
    def __init__(self, measurer: Measurer, limit: float, cost: Callable[[Option], tuple[float, ...]]) -> None:
        self.measurer, self.limit, self.cost = measurer, limit, cost
        self.best: Option | None = None
        self.trials: list[Trial] = []
        self.stopped: str | None = None
        self.power: Power | None = None

    def outcome(self, search: Callable[[], None]) -> Outcome:
        try:
            search()
        except OutOfBudget as said:
            self.stopped = str(said)
        closest = None
        if self.best is None:
            measured = [each for each in self.trials if each.divergence is not None]
            closest = min(measured, key=lambda each: each.divergence.upper if each.divergence else 0.0, default=None)
        return Outcome(self.best, closest, tuple(self.trials), self.stopped, self.power)

    def met(self, option: Option) -> None:
        """It is cheaper than the best so far, or would not have been measured."""
        self.best = option
        self.measurer.settled(option)


def search_kl(measurer: Measurer, limit: float, cost: Callable[[Option], tuple[float, ...]]) -> Outcome:
    """The option of the least cost whose KL is at most `limit` with confidence."""
    search = _KlSearch(measurer, limit, cost)
    return search.outcome(search.run)


class _KlSearch(_Search):
    def run(self) -> None:
        options = sorted(self.measurer.uniform(), key=self.cost)
        first = min(options, key=lambda each: each.block_error or 0.0)
        measured = self.judge(first)
        if self.best is None:
            return
        expected = {each.name: _scaled(measured.mean, each, first) for each in options}
        expected[first.name] = measured.mean
        cheaper = [each for each in options if self.cost(each) < self.cost(first)]
        for each in cheaper:
            if expected[each.name] > HOPELESS * self.limit:
                why = f"blocks err {each.block_error:.4f}, which predicts a KL of {expected[each.name]:.3g}"
                self.trials.append(Trial(each, "dropped", why))
                continue
            expected[each.name] = self.judge(each).mean
            if self.best is each:
                break
        self.mix([each for each in cheaper if self.cost(each) < self.cost(self.best)], first, expected)

    def judge(self, option: Option) -> Divergence:
        few = self.measurer.divergence(option, few=True)
        if few.lower > self.limit:
            return self.settle(option, few, "fails")
        found = self.measurer.divergence(option, few=False)
        missed = "fails" if found.lower > self.limit else "undecided"
        return self.settle(option, found, "meets" if found.upper <= self.limit else missed)

    def settle(self, option: Option, found: Divergence, verdict: str) -> Divergence:
        bound = f"at least {found.lower:.3g}" if found.lower > self.limit else f"at most {found.upper:.3g}"
        why = f"KL {found.mean:.3g} on {len(found.sums)} texts, {bound} with 95 % confidence"
        self.trials.append(Trial(option, verdict, why, found))
        if verdict == "meets":
            self.met(option)
        else:
            self.measurer.settled(self.best)
        return found

    def mix(self, failed: Sequence[Option], dearer: Option, expected: Mapping[str, float]) -> None:
        """Raise layers of one of the cheaper schemes that failed."""
        assert self.best is not None
        promised = {each.name: self.promised_bits(each, dearer, expected) for each in failed}
        base = min(failed, key=lambda each: promised[each.name], default=None)
        if base is None or promised[base.name] > self.best.bits - WORTH:
            return
        curve = self.measurer.curve(base)
        low, high = ((kl, expected[each.name], each.bits) for kl, each in zip(curve.ends, (base, dearer), strict=True))
        known = {each.option.name for each in self.trials}
        failures = 0  # on end
        for _ in range(MIXED):
            option = self.next(curve, low, high, known, halve=failures >= 2)
            if option is None:
                return
            known.add(option.name)
            found = self.judge(option)
            assert option.predicted is not None
            point = option.predicted, found.mean, option.bits
            if self.trials[-1].verdict == "meets":
                high, failures = point, 0
            else:
                low, failures = point, failures + 1
            if high[2] - low[2] <= RESOLUTION:
                return

    def next(self, curve: Curve, low: _Point, high: _Point, known: set[str], *, halve: bool) -> Option | None:
        """What the line between a point that fails and one that passes puts just below the target, and below the best.

        halve  where the line has led to failures alone, what lies halfway in bits.
        """
        assert self.best is not None
        ceiling = self.best.bits - RESOLUTION / 2
        wanted = _on_line(low, high, self.margin() * self.limit)
        option = curve.at(wanted)
        if option is None or option.bits > ceiling:
            option = curve.within(ceiling)
            if option is None or option.predicted is None or option.predicted > HOPELESS / 2 * wanted:
                return None
        if halve or option.name in known:
            option = curve.within((low[2] + min(high[2], self.best.bits)) / 2)
        if option is None or option.name in known or self.cost(option) >= self.cost(self.best) or option.bits <= low[2]:
            return None
        return option

    def margin(self) -> float:
        """By how much a mean must be below the target for its bound to be: as it was with the last on all texts."""
        all_texts = max(len(each.divergence.sums) for each in self.trials if each.divergence)
        last = [each.divergence for each in self.trials if each.divergence and len(each.divergence.sums) == all_texts][-1]
        return AIM * last.mean / last.upper if last.upper else AIM

    def promised_bits(self, base: Option, dearer: Option, expected: Mapping[str, float]) -> float:
        """Where KL falls evenly, in logarithms, from one scheme's bits to the other's."""
        whole = math.log(max(expected[base.name], 1e-30) / max(expected[dearer.name], 1e-30))
        part = math.log(max(expected[base.name], 1e-30) / (self.margin() * self.limit))
        share = min(1.0, max(0.0, part / whole)) if whole > 0 else 1.0
        return base.bits + (dearer.bits - base.bits) * share


_Point = tuple[float, float, float]  # predicted KL, measured KL, bits


def _scaled(kl: float, option: Option, measured: Option) -> float:
    assert option.block_error is not None
    assert measured.block_error is not None
    return kl * (option.block_error / max(measured.block_error, 1e-30)) ** 2


def _on_line(low: _Point, high: _Point, wanted: float) -> float:
    """The predicted KL at which the line through two points, in logarithms, is at the wanted measured one."""
    xs, ys = ([math.log(max(point[axis], 1e-30)) for point in (low, high)] for axis in (0, 1))
    slope = (ys[0] - ys[1]) / (xs[0] - xs[1]) if xs[0] > xs[1] else 1.0
    step = (math.log(wanted) - ys[1]) / slope if slope > 0 else 0.0
    return math.exp(min(max(xs[1] + step, xs[1]), xs[0]))


def search_retention(measurer: Measurer, limit: float, cost: Callable[[Option], tuple[float, ...]]) -> Outcome:
    """The option of the least cost that is shown to keep `limit` of the float model's pass@1, tested from the most accurate
    down."""
    search = _RetentionSearch(measurer, limit, cost)
    return search.outcome(search.run)


class _RetentionSearch(_Search):
    def run(self) -> None:
        least, there = least_problems(self.limit), self.measurer.problems()
        if there < least:
            self.power = Power(there, least, None)
            self.stopped = f"{self.power.said(self.limit)}; nothing was answered"
            return
        options = sorted(self.measurer.uniform(), key=lambda each: each.block_error or 0.0)
        for each in self.sequence(options):
            if self.best is not None and self.cost(each) >= self.cost(self.best):
                continue
            found = self.measurer.divergence(each, few=True)
            if not self.test(each, found, there):
                self.measurer.settled(self.best)
                return
            self.met(each)

    def sequence(self, options: Sequence[Option]) -> Sequence[Option]:
        """The most accurate scheme, a mixture halfway to the cheapest, and the cheaper schemes, the most accurate first."""
        first, others = options[0], [each for each in options[1:] if self.cost(each) < self.cost(options[0])]
        yield first
        if others:
            cheapest = min(others, key=self.cost)
            halfway = self.measurer.curve(cheapest).within((first.bits + cheapest.bits) / 2)
            if halfway is not None and self.cost(halfway) < self.cost(first):
                yield halfway
        yield from others

    def test(self, option: Option, found: Divergence, there: int) -> bool:
        """Whether enough is shown to be kept; the power of the test is looked at before all problems are answered."""
        kept = False
        for limit in (PILOT, None) if there > 2 * PILOT else (None,):
            outcome = compared(self.measurer.scores(None, limit), self.measurer.scores(option, limit), self.limit)
            self.power = Power(there, outcome.needed, outcome.problems)
            kept = outcome.kept and limit is None
            if outcome.needed_at_best is None or outcome.needed_at_best > there:
                break
        missed = "fails" if outcome.needed is None else "undecided"
        self.trials.append(Trial(option, "meets" if kept else missed, outcome.said(self.limit), found))
        if not kept:
            self.stopped = self.power.said(self.limit)
        return kept
