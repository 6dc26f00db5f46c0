"""What a budget of tokens buys: pass@1 if every answer were given up that has not ended within B tokens.

One run has the whole curve: under a smaller limit an answer is the beginning of the same answer, drawn ones too, since each
has a stream of random numbers of its own. An answer that has not ended within B counts as failed there, although code may
be complete in it already, and costs B tokens; thoughts count as tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.evaluation.samples import Record
from ms_pangu_quant.evaluation.summary import passes
from ms_pangu_quant.report.results import Cell, Run, cells


@dataclass(frozen=True)
class Curve:
    """Of each answer its tokens, whether it passes, and its weight in the mean over problems, each [answers]."""

    tokens: NDArray[np.int64]
    passed: NDArray[np.bool_]
    weights: NDArray[np.float64]

    def at(self, budget: int) -> tuple[float, float]:
        """(mean of min(tokens, budget), pass@1 within it)."""
        spent = float(self.weights @ np.minimum(self.tokens, budget))
        return spent, float(self.weights @ (self.passed & (self.tokens <= budget)))

    def points(self) -> list[tuple[float, float]]:
        """at() of every budget where it changes, from the smallest on; the last has the run's own mean and pass@1."""
        return [self.at(int(budget)) for budget in np.unique(self.tokens)]


def curve(results: Sequence[Record]) -> Curve | None:
    """None where the length of a judged answer is not known in tokens, or nothing was judged."""
    judged = [
        (str(result["task_id"]), result.get("tokens"), found) for result in results if (found := passes(result)) is not None
    ]
    if not judged or any(not isinstance(tokens, int) for _, tokens, _ in judged):
        return None
    many = Counter(task_id for task_id, _, _ in judged)
    weights = np.array([1 / (many[task_id] * len(many)) for task_id, _, _ in judged])
    tokens, passed = (np.array([each[place] for each in judged]) for place in (1, 2))
    return Curve(tokens.astype(np.int64), passed.astype(bool), weights)


def curves(runs: Sequence[Run]) -> dict[Cell, dict[str, Curve]]:
    """cell -> run -> curve, of those that have one."""
    found = {
        cell: {run.name: each for run in runs if cell in run.results and (each := curve(run.results[cell])) is not None}
        for cell in cells(runs)
    }
    return {cell: of for cell, of in found.items() if of}


def budgets_of(found: dict[Cell, dict[str, Curve]], most: int = 5) -> list[int]:
    """For a table: the longest answer's tokens, and powers of two below it."""
    longest = max(int(each.tokens.max()) for of in found.values() for each in of.values())
    powers = [1 << power for power in range(longest.bit_length()) if 1 << power < longest]
    return [*powers[-(most - 1) :], longest]
