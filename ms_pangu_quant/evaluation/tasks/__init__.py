"""The benchmarks by name. Adding one is a file that defines a Task, and a line here (docs/extend.md).

Below calibration, which searches its data for them (calibration/overlap.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.tasks import humaneval, mbpp, plus
from ms_pangu_quant.evaluation.tasks.task import Problems, Task, load_problems
from ms_pangu_quant.suggestion import did_you_mean

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        humaneval.HUMANEVAL,
        mbpp.MBPP,
        mbpp.MBPP_SANITIZED,
        mbpp.MBPP_TEST,
        mbpp.MBPP_FULL,
        plus.HUMANEVAL_PLUS,
        plus.MBPP_PLUS,
        humaneval.MINI,
        humaneval.MINI_VALIDATION,
    )
}


def load_tasks(names: Sequence[str], own_files: Mapping[str, str | Path]) -> dict[str, Problems]:
    """The problems of benchmarks by name; own_files: benchmark -> a user's own problems. Raises RequestError, DataError."""
    check_tasks(names, own_files)
    return {name: load_problems(TASKS[name], Path(own_files[name]) if name in own_files else None) for name in names}


def check_tasks(names: Sequence[str], own_files: Collection[str]) -> None:
    """Raises RequestError where a benchmark does not exist, none is asked for, or own problems are for another."""
    for name in (*names, *own_files):
        if name not in TASKS:
            raise RequestError(f"unknown benchmark {name!r}{did_you_mean(name, TASKS)}, wanted some of {', '.join(TASKS)}")
    if not names or set(own_files) - set(names):
        raise RequestError(f"tasks: got {', '.join(names) or 'none'}, wanted some of {', '.join(TASKS)}, and those of data")
