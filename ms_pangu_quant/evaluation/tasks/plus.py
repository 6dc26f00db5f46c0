"""HumanEval+ and MBPP+ (Liu et al. 2023, arXiv:2305.01210): the same problems with about 80 times as many tests.

A row has no expected values: the tester runs the canonical solution and compares, with EvalPlus' tolerances and its
exceptions for problems that allow several answers. All of its tests must pass, the base ones and the added ones.

Differs from EvalPlus in the limit of time (one for the whole sample instead of one for each input) and in that the
arguments are copies, so that an answer that changes its arguments cannot spoil the expected values.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from operator import itemgetter
from typing import Any

from ms_pangu_quant.evaluation.tasks import humaneval, mbpp
from ms_pangu_quant.evaluation.tasks.task import Row, Statement, Task
from ms_pangu_quant.evaluation.verdict import Program


def humaneval_program(row: Row, code: str) -> Program:
    return _program(row, humaneval.after_prompt(row["prompt"], code), row["prompt"] + row["canonical_solution"])


def mbpp_statement(row: Row) -> Statement:
    lines = row["prompt"].strip().strip('"').strip().splitlines()
    tests = tuple(line for line in lines if line.startswith("assert "))
    return Statement(text="\n".join(line for line in lines if not line.startswith("assert ")), tests=tests)


def _program(row: Row, source: str, canonical: str) -> Program:
    entry = row["entry_point"]
    case: dict[str, Any] = {
        "task_id": row["task_id"],
        "entry_point": entry,
        "canonical": canonical,
        "atol": row["atol"],
        "inputs": [*row["base_input"], *row["plus_input"]],
    }
    return Program(
        source=source,
        preamble=f"import json\n_case = json.loads({json.dumps(case)!r})\n_oracle = {{}}\nexec({_oracle()!r}, _oracle)\n",
        test=f"_oracle['check'](_case, {entry})",
        names=(entry,),
        cpu_factor=4,
    )


@lru_cache(maxsize=1)
def _oracle() -> str:
    return (files("ms_pangu_quant") / "evaluation" / "guest" / "plus_oracle.py").read_text(encoding="utf-8")


HUMANEVAL_PLUS = Task(
    name="humaneval_plus",
    title="HumanEval+",
    file="benchmarks/HumanEvalPlus.jsonl.gz",
    sha256="272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101",
    fields=("prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol"),
    statement=humaneval.statement,
    entry_point=itemgetter("entry_point"),
    program=humaneval_program,
    reference=humaneval.reference,
    solution=humaneval.solution,
    prefix="HumanEval/",
)
MBPP_PLUS = Task(
    name="mbpp_plus",
    title="MBPP+",
    file="benchmarks/MbppPlus.jsonl.gz",
    sha256="af43697e8791c4c149bdfd6b489d8b5412507551ac20e28a439f650b8225db63",
    fields=("prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol"),
    statement=mbpp_statement,
    entry_point=itemgetter("entry_point"),
    program=lambda row, code: _program(row, code, row["canonical_solution"]),
    reference=itemgetter("canonical_solution"),
    solution=lambda row: mbpp.down_to_def(row["canonical_solution"]),
    prefix="Mbpp/",
)
