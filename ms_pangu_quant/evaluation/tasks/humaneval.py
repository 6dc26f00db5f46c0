"""HumanEval (Chen et al. 2021, arXiv:2107.03374), and the embedded checkpoint's own problems in the same form.

A row has task_id, prompt (imports, helpers, the signature and docstring), entry_point, test (defines `check(candidate)`)
and canonical_solution (a body).
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter

from ms_pangu_quant.evaluation.tasks.task import Row, Statement, Task
from ms_pangu_quant.evaluation.verdict import Program


def statement(row: Row) -> Statement:
    return Statement(text=row["prompt"], stub=row["prompt"])


def program(row: Row, code: str) -> Program:
    """The prompt stands before the answer, and before the test: answers leave out its imports, tests use its helpers."""
    prompt = as_module(row["prompt"])
    return Program(
        source=after_prompt(prompt, code),
        preamble=prompt,
        test=f"{row['test']}\ncheck({row['entry_point']})\n",
        names=(row["entry_point"],),
    )


def reference(row: Row) -> str | None:
    return row["prompt"] + row["canonical_solution"] if "canonical_solution" in row else None


def solution(row: Row) -> tuple[str, str] | None:
    """The `def` line of the prompt, without its docstring, and the body."""
    if "canonical_solution" not in row:
        return None
    prompt: str = row["prompt"]
    start = prompt.rindex(f"def {row['entry_point']}")
    return re.split(r"\"\"\"|'''", prompt[start:], maxsplit=1)[0], row["canonical_solution"]


@lru_cache(maxsize=4096)
def as_module(prompt: str) -> str:
    """A prompt as a program: HumanEval's are one, a bare signature gets a body, and prose gives nothing."""
    for source in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        try:
            ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        return source
    return ""


def after_prompt(prompt: str, code: str) -> str:
    """The prompt, then the code; `from __future__` lines must stay the first."""
    future = [line for line in code.splitlines() if line.startswith("from __future__ ")]
    return "\n".join(
        [*future, prompt, code.replace("from __future__ ", "pass  # from __future__ ") if future else code, ""]
    )


HUMANEVAL = Task(
    name="humaneval",
    title="HumanEval",
    file="benchmarks/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    fields=("prompt", "entry_point", "test"),
    statement=statement,
    entry_point=itemgetter("entry_point"),
    program=program,
    reference=reference,
    solution=solution,
    prefix="HumanEval/",
)
MINI = replace(
    HUMANEVAL,
    name="mini",
    title="Mini",
    file="heldout.jsonl",
    sha256="1cb117cf26ba8df0857f3ceb9b2b4b1173096d7aaeb57809d5a4656b979a1788",
    prefix="",
    kept_out=False,  # the embedded calibration data is the same generator's: other problems, often in the same words
)
MINI_VALIDATION = replace(
    MINI,
    name="mini_validation",
    title="Mini, validation",
    file="validation_problems.jsonl",
    sha256="dc064c77f495e5c9328a2df3192df992a4d8b3e929ec79d6af493bad841f2153",
)
