"""What a benchmark is: a file of problems and three small functions of one problem."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ms_pangu_quant.errors import DataError
from ms_pangu_quant.evaluation.verdict import Program
from ms_pangu_quant.suggestion import did_you_mean_path

Row = Mapping[str, Any]
_ID = re.compile(r"(?:([A-Za-z][A-Za-z+_ -]*?)[/_: -]?)?([0-9]{1,9})")  # HumanEval/11, mbpp_11, 11


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
    prefix       of its ids, which a number follows; "" where a row's id is taken as it is.
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
        digits = problem.task_id.removeprefix(task.prefix)
        if task.ids is not None and digits.isdecimal() and int(digits) not in task.ids:
            continue
        if problem.task_id in problems:
            raise DataError(f"{where}: problem {number}: task_id {problem.task_id} is there twice")
        problems[problem.task_id] = problem
    if not problems:
        raise DataError(f"{where}: holds no problems")
    return Problems(task, digest, problems)


def find_problem(problems: Problems, task_id: object) -> Problem | None:
    """By its id as full_id() spells it; None for another benchmark's, and for one that is not there."""
    found = problems.by_id.get(str(task_id))
    return problems.by_id.get(full_id(problems.task, task_id)) if found is None else found


def full_id(task: Task, task_id: object) -> str:
    """The benchmark's spelling of an id: 11, "11", "Mbpp/11", "mbpp_11", "MBPP+/11" are MBPP/11, HumanEval/11 is not."""
    text = str(task_id).strip()
    found = _ID.fullmatch(text)
    if task.prefix and found and _spelling(found[1] or task.prefix) == _spelling(task.prefix):
        return f"{task.prefix}{int(found[2])}"
    return text if "/" in text else task.prefix + text


def _spelling(prefix: str) -> str:
    return re.sub("[^a-z]", "", prefix.lower()).removesuffix("plus")


def _rows(content: bytes, where: str) -> list[Any]:
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line.lstrip("\ufeff")) for line in text.split("\n") if line.strip("\ufeff \t\r")]
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(f"{where}: not JSON or JSON lines ({error})") from None


def _problem(task: Task, row: Any, where: str) -> Problem:
    missing = [field for field in ("task_id", *task.fields) if not isinstance(row, dict) or field not in row]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}, which {task.name} problems have")
    task_id = full_id(task, row["task_id"])
    try:
        problem = Problem(task, task_id, row)
        program = problem.program("")
        for text in (problem.entry_point, problem.statement.text, program.test):
            if not isinstance(text, str) or not text.strip():
                raise TypeError("an empty field")
    except (TypeError, ValueError, KeyError, AttributeError, SyntaxError) as error:
        raise DataError(f"{where} ({task_id}): is not a {task.name} problem ({error})") from None
    return problem
