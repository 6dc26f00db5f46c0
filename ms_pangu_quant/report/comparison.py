"""Each run against the reference on the problems both have: scores, flips, retention, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ms_pangu_quant.evaluation import statistics
from ms_pangu_quant.evaluation.samples import Record
from ms_pangu_quant.evaluation.statistics import Flips, Interval, Retention
from ms_pangu_quant.evaluation.summary import scores
from ms_pangu_quant.report.results import Cell, Run


@dataclass(frozen=True)
class Comparison:
    """p is two-sided, of "no difference"; p_holm is p, and retention_holm the retention's p, adjusted over the report.

    tokens  new length - reference length of a problem's answers, thought included; None where they are not known.
    """

    cell: Cell
    run: Run
    problems: int
    difference: Interval
    retention: Retention | None
    flips: Flips | None
    p: float
    tokens: Interval | None
    p_holm: float = 1.0
    retention_holm: float | None = None


def compare(runs: Sequence[Run], wanted: float) -> list[Comparison]:
    """The runs after the first against the first, cell by cell; wanted is the retention that is tested for."""
    reference = runs[0]
    compared = [
        _compare(cell, reference.results[cell], run, wanted)
        for cell in reference.entries
        for run in runs[1:]
        if cell in run.entries
    ]
    found = [each for each in compared if each is not None]
    p_holm = statistics.holm([each.p for each in found])
    tested = [index for index, each in enumerate(found) if each.retention is not None]
    adjusted = dict(zip(tested, statistics.holm([found[index].retention.p for index in tested]), strict=True))  # type: ignore[union-attr]
    return [replace(each, p_holm=p_holm[index], retention_holm=adjusted.get(index)) for index, each in enumerate(found)]


def _compare(cell: Cell, reference: Sequence[Record], run: Run, wanted: float) -> Comparison | None:
    """None where the two have no problem in common."""
    new = run.results[cell]
    left, right = scores(reference), scores(new)
    shared = [task_id for task_id in left if task_id in right]
    if not shared:
        return None
    a, b = [left[task_id] for task_id in shared], [right[task_id] for task_id in shared]
    single = all(value in (0.0, 1.0) for value in (*a, *b)) and len(reference) == len(left) and len(new) == len(right)
    passed = ({task_id: side[task_id] == 1 for task_id in shared} for side in (left, right))
    flips = statistics.flips(*passed) if single else None
    return Comparison(
        cell,
        run,
        len(shared),
        statistics.score_difference(a, b),
        statistics.retention(a, b, wanted),
        flips,
        flips.p if flips else statistics.sign_flip(a, b),
        _length_difference(shared, reference, new),
    )


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
