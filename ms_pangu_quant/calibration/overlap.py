"""Finds the benchmarks' problems (HumanEval, MBPP, ...: every kept_out task of evaluation/tasks) in calibration text.

A text counts as a benchmark problem when it contains one of these word runs, compared as lower-case ASCII words
(letters, digits, underscore), so that layout, punctuation and Markdown do not matter:
  - of a prompt: 13 consecutive words (the length in GPT-3's decontamination, arXiv:2005.14165 appendix C), or the whole
    prompt where it is shorter; MBPP prompts are single sentences of 7 words and more;
  - of a solution: the whole function, its whole body from 13 words on, or 40 consecutive words. Code repeats itself:
    at 20 words every bubble sort is MBPP/101.
A run that is only a part of a text must hold four different real words, or every count from 1 to 13 would be HumanEval.

Not found: paraphrases, translations, renamed variables, and bodies under 13 words without their `def` line
(`return x + y` is HumanEval/53 and also half of all Python).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.evaluation.tasks.task import Problem, Task, load_problems

PROMPT_RUN = 13
SOLUTION_RUN = 40
SHORTEST_BODY = 13
REAL_WORDS = 4

_WORD = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class _Index:
    """runs: word run -> what it is a part of. heads: the first `head` words of each run -> the lengths to try there."""

    head: int
    heads: dict[tuple[str, ...], tuple[int, ...]]
    runs: dict[tuple[str, ...], str]


def find_benchmark(text: str) -> str | None:
    """The first benchmark text found, such as "HumanEval/53 prompt" or "MBPP/11 solution"; None where there is none."""
    index = _index(tuple(task for task in TASKS.values() if task.kept_out))
    words = _words(text)
    for start, head in enumerate(zip(*(words[offset:] for offset in range(index.head)), strict=False)):
        for length in index.heads.get(head, ()):
            name = index.runs.get(tuple(words[start : start + length]))
            if name is not None:
                return name
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@cache
def _index(tasks: tuple[Task, ...]) -> _Index:
    runs: dict[tuple[str, ...], str] = {}
    for name, text, longest in _texts(_problems(tasks)):
        for run in _runs(_words(text), longest):
            runs.setdefault(run, name)
    head = min(map(len, runs))
    lengths: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
    for run in runs:
        lengths[run[:head]].add(len(run))
    return _Index(head, {start: tuple(sorted(found)) for start, found in lengths.items()}, runs)


def _runs(words: list[str], longest: int) -> Iterator[tuple[str, ...]]:
    if len(words) <= longest:
        yield tuple(words)
        return
    real = {word for word in words if len(word) > 1 and word.isalpha()}
    for start in range(len(words) - longest + 1):
        run = words[start : start + longest]
        if len(real.intersection(run)) >= REAL_WORDS:
            yield tuple(run)


def _problems(tasks: Iterable[Task]) -> Iterator[Problem]:
    """Of whole files, whatever part a task reports on; the largest first, after which a text of several is called."""
    files = {(task.file, task.statement, task.solution): replace(task, ids=None) for task in tasks}
    for problems in sorted((load_problems(task).by_id.values() for task in files.values()), key=len, reverse=True):
        yield from problems


def _texts(problems: Iterable[Problem]) -> Iterator[tuple[str, str, int]]:
    """(name, text, longest run) of each text to look for."""
    for problem in problems:
        yield f"{problem.task_id} prompt", problem.statement.text, PROMPT_RUN
        if problem.solution is None:
            continue
        signature, body = problem.solution
        yield f"{problem.task_id} solution", signature + "\n" + body, SOLUTION_RUN
        if len(_words(body)) >= SHORTEST_BODY:
            yield f"{problem.task_id} solution", body, SOLUTION_RUN
