"""Each run against the reference on the problems both have: scores, flips, retention, lengths, and answers that loop or
think without end.

Cell by cell, and over all cells that were drawn alike: there a problem's value is the mean of its answers in all of them,
and the problem stays the unit that is resampled, since its answers in two modes depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ms_pangu_quant.evaluation import statistics
from ms_pangu_quant.evaluation.samples import Record
from ms_pangu_quant.evaluation.statistics import LEVEL, Flips, Interval, Retention
from ms_pangu_quant.evaluation.summary import FAULTS, Told, passes, scores
from ms_pangu_quant.report.results import Cell, Run


@dataclass(frozen=True)
class Paired:
    """A share of both runs' answers: how many of how many, the difference with its interval, p of "no difference" (p_holm:
    adjusted for the same share in the report's other comparisons). flips: None where a problem has several answers."""

    reference: tuple[int, int]
    new: tuple[int, int]
    difference: Interval
    flips: Flips | None
    p: float
    p_holm: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """cell has neither task nor mode where it is about all cells of its decoding.

    problems        that both have answered.
    passed, faults  pass@1, and the shares of answers that loop or whose thought does not end, by summary.FAULTS; None where
                    it is not known of any problem.
    retention_holm  the retention's p, adjusted as p_holm is.
    needed          problems that the test of the retention takes, as of statistics.problems_needed() at the strictest level
                    that Holm's adjustment may ask for here.
    tokens          new length - reference length of a problem's answers, thought included; None where they are not known.
    scores          of both, by problem.
    """

    cell: Cell
    run: Run
    problems: int
    passed: Paired
    faults: Mapping[str, Paired | None]
    retention: Retention | None
    tokens: Interval | None
    scores: tuple[Sequence[float], Sequence[float]]
    retention_holm: float | None = None
    needed: int | None = None

    @property
    def difference(self) -> Interval:
        return self.passed.difference

    @property
    def flips(self) -> Flips | None:
        return self.passed.flips

    @property
    def p(self) -> float:
        return self.passed.p

    @property
    def p_holm(self) -> float:
        return self.passed.p_holm


def compare(runs: Sequence[Run], wanted: float) -> list[Comparison]:
    """The runs after the first against the first, cell by cell; wanted is the retention that is tested for."""
    reference = runs[0]
    found = [
        _compare(cell, run, reference.results[cell], run.results[cell], wanted)
        for cell in reference.entries
        for run in runs[1:]
        if cell in run.entries
    ]
    return _adjusted([each for each in found if each is not None], wanted)


def compare_together(runs: Sequence[Run], wanted: float) -> list[Comparison]:
    """The same over all cells of a decoding, on what both runs have answered of each."""
    reference = runs[0]
    found = []
    for decoding in dict.fromkeys(cell.decoding for cell in reference.entries):
        for run in runs[1:]:
            shared = [cell for cell in reference.entries if cell in run.entries and cell.decoding == decoding]
            both = [_on_shared_problems(reference, run, cell) for cell in shared]
            left, right = ([line for part in both for line in part[side]] for side in (0, 1))
            found.append(_compare(Cell("", "", decoding), run, left, right, wanted))
    return _adjusted([each for each in found if each is not None], wanted)


def _on_shared_problems(reference: Run, run: Run, cell: Cell) -> tuple[list[Record], list[Record]]:
    sides = (reference.results[cell], run.results[cell])
    ids = scores(sides[0]).keys() & scores(sides[1]).keys()
    left, right = ([line for line in side if str(line["task_id"]) in ids] for side in sides)
    return left, right


def _compare(cell: Cell, run: Run, reference: Sequence[Record], new: Sequence[Record], wanted: float) -> Comparison | None:
    """None where the two have no problem in common."""
    passed = _paired(reference, new, passes)
    if passed is None:
        return None
    left, right = scores(reference), scores(new)
    shared = [task_id for task_id in left if task_id in right]
    pairs = [left[task_id] for task_id in shared], [right[task_id] for task_id in shared]
    return Comparison(
        cell,
        run,
        len(shared),
        passed,
        {name: _paired(reference, new, told) for name, told in FAULTS.items()},
        statistics.retention(*pairs, wanted),
        _length_difference(shared, reference, new),
        pairs,
    )


def _paired(reference: Sequence[Record], new: Sequence[Record], told: Told) -> Paired | None:
    """None where no problem has it of both."""
    left, right = scores(reference, told), scores(new, told)
    shared = [task_id for task_id in left if task_id in right]
    if not shared:
        return None
    a, b = [left[task_id] for task_id in shared], [right[task_id] for task_id in shared]
    single = all(value in (0.0, 1.0) for value in (*a, *b)) and len(reference) == len(left) and len(new) == len(right)
    is_true = ({task_id: side[task_id] == 1 for task_id in shared} for side in (left, right))
    flips = statistics.flips(*is_true) if single else None
    counts = [_count(side, {*shared}, told) for side in (reference, new)]
    p = flips.p if flips else statistics.sign_flip(a, b)
    return Paired(counts[0], counts[1], statistics.score_difference(a, b), flips, p)


def _count(results: Sequence[Record], shared: set[str], told: Told) -> tuple[int, int]:
    found = [told(result) for result in results if str(result["task_id"]) in shared]
    return sum(bool(each) for each in found), sum(each is not None for each in found)


def _adjusted(found: Sequence[Comparison], wanted: float) -> list[Comparison]:
    """With each kind of p adjusted over all that were compared, and the problems that are needed."""
    tested = [index for index, each in enumerate(found) if each.retention is not None]
    retention = dict(zip(tested, statistics.holm([found[index].retention.p for index in tested]), strict=True))  # type: ignore[union-attr]
    holm_of_passed = statistics.holm([each.p for each in found])
    faults = {name: _with_holm([each.faults[name] for each in found]) for name in FAULTS}
    return [
        replace(
            each,
            passed=replace(each.passed, p_holm=holm_of_passed[index]),
            faults={name: faults[name][index] for name in FAULTS},
            retention_holm=retention.get(index),
            needed=statistics.problems_needed(*each.scores, wanted, level=LEVEL / max(1, len(tested))),
        )
        for index, each in enumerate(found)
    ]


def _with_holm(found: Sequence[Paired | None]) -> list[Paired | None]:
    adjusted = iter(statistics.holm([each.p for each in found if each is not None]))
    return [None if each is None else replace(each, p_holm=next(adjusted)) for each in found]


def _length_difference(shared: Sequence[str], reference: Sequence[Record], new: Sequence[Record]) -> Interval | None:
    left, right = _mean_tokens(reference), _mean_tokens(new)
    known = [task_id for task_id in shared if task_id in left and task_id in right]
    if not known:
        return None
    return statistics.difference([left[task_id] for task_id in known], [right[task_id] for task_id in known])


def _mean_tokens(results: Sequence[Record]) -> Mapping[str, float]:
    lengths: dict[str, list[int]] = {}
    for result in results:
        if result.get("tokens") is not None:
            lengths.setdefault(str(result["task_id"]), []).append(result["tokens"])
    return {task_id: sum(values) / len(values) for task_id, values in lengths.items()}
