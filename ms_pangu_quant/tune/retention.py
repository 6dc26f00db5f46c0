"""Whether pass@1 is kept, and how many problems it takes to show that.

The test is the paired one-sided one of evaluation.statistics. What it needs is foreseen in two ways: exactly for a
candidate that loses nothing (the binomial test's least number, below which no answers can show it), and by the test's power
for one that goes on to lose and gain as in the problems seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ms_pangu_quant.evaluation import statistics
from ms_pangu_quant.evaluation.statistics import CONFIDENCE, POWER

Scores = Mapping[str, float]  # problem -> share of its answers that pass, over thinking modes and samples


@dataclass(frozen=True)
class Tested:
    """Of a candidate against the float model. ratio and p as in evaluation.statistics.Retention; None where the float
    model passes nothing. needed: problems for a test of the given POWER; None where so much is lost that no number does.
    needed_at_best: the same with one lost problem forgiven, since a few problems are a small sample."""

    problems: int
    lost: int
    gained: int
    ratio: float | None
    p: float | None
    needed: int | None
    needed_at_best: int | None

    @property
    def kept(self) -> bool:
        return self.p is not None and self.p <= 1 - CONFIDENCE

    def said(self, wanted: float) -> str:
        if self.ratio is None or self.p is None:
            return f"the float model passes none of {self.problems} problems"
        verdict = "shown" if self.kept else "not shown"
        return (
            f"keeps {self.ratio:.2%} of pass@1 on {self.problems} problems ({self.lost} lost, {self.gained} gained), "
            f"at least {wanted:.6g} {verdict} (p {self.p:.3g})"
        )


@dataclass(frozen=True)
class Power:
    """there: problems at hand. needed: as in Tested, seen on so many problems; None where no number would do, or where
    `seen` is None and needed is what a candidate takes that loses nothing."""

    there: int
    needed: int | None
    seen: int | None

    def said(self, wanted: float) -> str:
        if self.seen is None:
            return (
                f"{self.there} problems cannot show a retention of {wanted:g}: even a candidate that loses none takes "
                f"{self.needed} that the float model passes"
            )
        if self.needed is None:
            return (
                f"on {self.seen} problems more than 1 - {wanted:g} of pass@1 is lost: if that goes on, no number of them "
                "shows the target"
            )
        return (
            f"with as many lost and gained as on {self.seen} problems, showing a retention of {wanted:g} takes about "
            f"{self.needed} problems ({POWER:.0%} power); there are {self.there}"
        )


def least_problems(wanted: float) -> int:
    """That the float model must pass for a candidate that loses none of them to be shown to keep `wanted`."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(wanted))


def problems_needed(reference: Scores, new: Scores, wanted: float, forgiven: int = 0) -> int | None:
    """statistics.problems_needed() where so many lost problems are forgiven."""
    shared = [name for name in reference if name in new]
    a, b = (np.array([scores[name] for name in shared], np.float64) for scores in (reference, new))
    for place in np.argsort(b - a, kind="stable")[:forgiven]:
        b[place] = max(a[place], b[place])
    return statistics.problems_needed([*a], [*b], wanted)


def compared(reference: Scores, new: Scores, wanted: float) -> Tested:
    """On the problems that both have."""
    shared = [name for name in reference if name in new]
    a, b = ([scores[name] for name in shared] for scores in (reference, new))
    found = statistics.retention(a, b, wanted)
    return Tested(
        problems=len(shared),
        lost=sum(y < x for x, y in zip(a, b, strict=True)),
        gained=sum(y > x for x, y in zip(a, b, strict=True)),
        ratio=found and found.ratio.value,
        p=found and found.p,
        needed=problems_needed(reference, new, wanted),
        needed_at_best=problems_needed(reference, new, wanted, forgiven=1),
    )
