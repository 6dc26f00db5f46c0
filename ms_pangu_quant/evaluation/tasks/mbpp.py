"""MBPP (Austin et al. 2021, arXiv:2108.07732): the full set and the sanitized one, and the parts that are reported on.

`mbpp` is the sanitized set's test part, 257 problems: every published openPangu-Embedded figure is a multiple of 1/257.
Numbers 1 to 10 are the few-shot prompts', 11 to 510 the test part, 511 to 600 validation, 601 to 974 training.

A row has task_id (a number), text or prompt, code, test_list (assert statements), and test_imports or test_setup_code.
The set-up uses classes of the solution, so it runs after it; three problems' tests need the solution's classes at hand and
are therefore judged in its process.
"""

from __future__ import annotations

import ast
import builtins
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import TypeGuard

from ms_pangu_quant.evaluation.tasks.task import Row, Statement, Task
from ms_pangu_quant.evaluation.verdict import Program

TEST_PART = range(11, 511)


def statement(row: Row) -> Statement:
    return Statement(text=row["text"] if "text" in row else row["prompt"], tests=tuple(row["test_list"]))


def entry_point(row: Row) -> str:
    return _interface(_test(row), row["code"], row.get("test_setup_code", ""))[0]


def program(row: Row, code: str) -> Program:
    setup = row.get("test_setup_code", "")
    entry, functions, in_process = _interface(_test(row), row["code"], setup)
    return Program(
        source=f"{code}\n{setup}",
        preamble="\n".join([*row.get("test_imports", ()), *_imports(row["code"])]),
        test=_test(row),
        names=(entry, *functions),
        in_process=in_process,
    )


def down_to_def(code: str) -> tuple[str, str]:
    """A program cut behind its first `def`; imports, constants and classes may stand before the function."""
    signature, newline, body = code.partition("\n")
    while newline and "def " not in signature:
        line, newline, body = body.partition("\n")
        signature += "\n" + line
    return signature, body


def _test(row: Row) -> str:
    return "\n".join(row["test_list"])


@lru_cache(maxsize=4096)
def _interface(test: str, code: str, setup: str) -> tuple[str, tuple[str, ...], bool]:
    """(entry point, other functions the test calls, whether the test needs more of the solution than its functions)."""
    tree = ast.parse(code)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    functions |= {
        target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if _is_name(target)
    }
    used = [node.id for node in ast.walk(ast.parse(test)) if _is_name(node)]
    called = [node.func.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call) and _is_name(node.func)]
    wanted = list(dict.fromkeys(name for name in called if name in functions))
    if not wanted:
        raise ValueError("its tests call no function of its code")
    others = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    others |= {node.id for node in ast.walk(ast.parse(setup)) if _is_name(node) and isinstance(node.ctx, ast.Store)}
    in_process = any(name in others and not hasattr(builtins, name) for name in used)
    return wanted[0], tuple(wanted[1:]), in_process


@lru_cache(maxsize=4096)
def _imports(code: str) -> tuple[str, ...]:
    """The solution's imports: a few tests use one (`sys.maxsize`) without having it."""
    return tuple(ast.unparse(node) for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom)))


def _is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


MBPP_FULL = Task(
    name="mbpp_full",
    title="MBPP (all)",
    file="benchmarks/mbpp.jsonl",
    sha256="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    fields=("code", "test_list"),
    statement=statement,
    entry_point=entry_point,
    program=program,
    reference=itemgetter("code"),
    solution=lambda row: down_to_def(row["code"]),
    prefix="MBPP/",
)
MBPP_TEST = replace(MBPP_FULL, name="mbpp_test", title="MBPP (test)", ids=TEST_PART)
MBPP_SANITIZED = replace(
    MBPP_FULL,
    name="mbpp_sanitized",
    title="MBPP sanitized (all)",
    file="benchmarks/sanitized-mbpp.json",
    sha256="ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9",
)
MBPP = replace(MBPP_SANITIZED, name="mbpp", title="MBPP", ids=TEST_PART)
