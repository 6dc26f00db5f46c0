"""The benchmarks by name. Adding one is a file that defines a Task, and a line here.

Below calibration, which searches its data for them (calibration/overlap.py).
"""

from __future__ import annotations

from ms_pangu_quant.evaluation.tasks import humaneval, mbpp, plus
from ms_pangu_quant.evaluation.tasks.task import Problem, Statement, Task, find_problem, load_problems

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

__all__ = ["TASKS", "Problem", "Statement", "Task", "find_problem", "load_problems"]
