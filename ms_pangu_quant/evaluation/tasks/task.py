"""What a benchmark is: a file of problems and three small functions of one problem."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ms_pangu_quant.errors import DataError
from ms_pangu_quant.evaluation.verdict import Program
from ms_pangu_quant.suggestion import did_you_mean_path

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Statement:
    """What a prompt may show. stub is the beginning of the program that an answer may continue, "" where there is none."""

    text: str
    tests: tuple[str, ...] = ()
    stub: str = ""


@dataclass(frozen=True)
class Task:
    """file is relative to the package's assets, sha256 that of its bytes; fields must be in every row.

    ids          keeps the rows whose number lies in it; None keeps all.
    statement    row -> what a prompt may show.
    entry_point  row -> the function that an answer must define.
    program      (row, code) -> the program to judge; code defines the entry point.
    reference    row -> a solution that passes, None where the row has none.
    solution     row -> (lines down to its `def`, body) of that solution without the prompt's prose, None likewise.
    kept_out     calibration data may not hold its problems: calibration/overlap.py searches for statement and solution.
    """

    name: str
    title: str
    file: str
    sha256: str
    fields: tuple[str, ...]
    statement: Callable[[Row], Statement]
    entry_point: Callable[[Row], str]
    program: Callable[[Row, str], Program]
    reference: Callable[[Row], str | None]
    solution: Callable[[Row], tuple[str, str] | None]
    ids: range | None = None
    prefix: str = ""
    kept_out: bool = True


@dataclass(frozen=True)
class Problem:
    """A row of a task. task_id is its name in the benchmark, such as HumanEval/53 or MBPP/11."""

    task: Task
    task_id: str
    row: Row

    @property
    def statement(self) -> Statement:
        return self.task.statement(self.row)

    @property
    def entry_point(self) -> str:
        return self.task.entry_point(self.row)

    @property
    def reference(self) -> str | None:
        return self.task.reference(self.row)

    @property
    def solution(self) -> tuple[str, str] | None:
        return self.task.solution(self.row)

    def program(self, code: str) -> Program:
        return self.task.program(self.row, code)


@dataclass(frozen=True)
class Problems:
    """The problems of a task by id, in the file's order; sha256 is that of the file's bytes."""

    task: Task
    sha256: str
    by_id: Mapping[str, Problem]


def load_problems(task: Task, own_file: Path | None = None) -> Problems:
    """The problems of the shipped file, or of a user's own in the same form.

    Raises DataError where a file is missing, malformed, or (the shipped one) not the one that was pinned.
    """
    if own_file is None:
        content = (files("ms_pangu_quant") / "assets" / task.file).read_bytes()
    else:
        try:
            content = own_file.read_bytes()
        except OSError as error:
            raise DataError(f"{own_file}: cannot read ({error.strerror}){did_you_mean_path(own_file)}") from None
    digest = hashlib.sha256(content).hexdigest()
    if own_file is None and digest != task.sha256:
        raise DataError(f"{task.file}: has sha256 {digest[:16]}, wanted {task.sha256[:16]}; install the package again")
    where = str(own_file or task.file)
    problems: dict[str, Problem] = {}
    for number, row in enumerate(_rows(content, where), 1):
        problem = _problem(task, row, f"{where}: problem {number}")
        if task.ids is not None and int(problem.task_id.rpartition("/")[2]) not in task.ids:
            continue
        if problem.task_id in problems:
            raise DataError(f"{where}: problem {number}: task_id {problem.task_id} is there twice")
        problems[problem.task_id] = problem
    if not problems:
        raise DataError(f"{where}: holds no problems")
    return Problems(task, digest, problems)


def find_problem(problems: Problems, task_id: object) -> Problem | None:
    """By the benchmark's id, or by the number alone, or with another prefix ("Mbpp/11", "11" and 11 are MBPP/11)."""
    found = problems.by_id.get(str(task_id))
    if found is None and problems.task.prefix:
        found = problems.by_id.get(problems.task.prefix + str(task_id).rpartition("/")[2])
    return found


def _rows(content: bytes, where: str) -> list[Any]:
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{where}: not JSON or JSON lines ({error})") from None


def _problem(task: Task, row: Any, where: str) -> Problem:
    missing = [field for field in ("task_id", *task.fields) if not isinstance(row, dict) or field not in row]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}, which {task.name} problems have")
    task_id = str(row["task_id"])
    if task.prefix and not task_id.startswith(task.prefix):
        task_id = task.prefix + task_id.rpartition("/")[2]
    try:
        problem = Problem(task, task_id, row)
        program = problem.program("")
        for text in (problem.entry_point, problem.statement.text, program.test):
            if not isinstance(text, str) or not text.strip():
                raise TypeError("an empty field")
    except (TypeError, ValueError, KeyError, AttributeError, SyntaxError) as error:
        raise DataError(f"{where} ({task_id}): is not a {task.name} problem ({error})") from None
    return problem
