"""Finds HumanEval and MBPP problems hidden in calibration text.

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

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

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
    index = _index()
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
def _index() -> _Index:
    runs: dict[tuple[str, ...], str] = {}
    for name, text, longest in _texts():
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


def _texts() -> Iterator[tuple[str, str, int]]:
    """(name, text, longest run) of each text to look for."""
    folder = files("ms_pangu_quant") / "assets" / "benchmarks"
    for line in gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes()).splitlines():
        problem = json.loads(line)
        yield f"{problem['task_id']} prompt", problem["prompt"], PROMPT_RUN
        yield from _solution(problem["task_id"], _signature(problem), problem["canonical_solution"])
    problems = [json.loads(line) for line in (folder / "mbpp.jsonl").read_bytes().splitlines()]
    problems += json.loads((folder / "sanitized-mbpp.json").read_bytes())
    for problem in problems:
        task = f"MBPP/{problem['task_id']}"
        yield f"{task} prompt", problem.get("text") or problem["prompt"], PROMPT_RUN
        signature, newline, body = problem["code"].partition("\n")
        while newline and "def " not in signature:  # imports, constants and classes may stand before the function
            line, newline, body = body.partition("\n")
            signature += "\n" + line
        yield from _solution(task, signature, body)


def _solution(task: str, signature: str, body: str) -> Iterator[tuple[str, str, int]]:
    yield f"{task} solution", signature + "\n" + body, SOLUTION_RUN
    if len(_words(body)) >= SHORTEST_BODY:
        yield f"{task} solution", body, SOLUTION_RUN


def _signature(problem: dict[str, Any]) -> str:
    """The `def` line of a HumanEval prompt, without its docstring."""
    prompt: str = problem["prompt"]
    start = prompt.rindex("def " + problem["entry_point"])
    return re.split(r"\"\"\"|'''", prompt[start:], maxsplit=1)[0]
