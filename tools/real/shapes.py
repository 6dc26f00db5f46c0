"""A solution in the shapes that models give their answers: what extraction has to see through, and what must fail."""

from __future__ import annotations

import ast
from collections.abc import Callable
from textwrap import dedent, indent

from ms_pangu_quant.evaluation.tasks.task import Problem

NONE = "no_result"  # the one shape that no judge may pass
_OTHER: dict[type[ast.AST], Callable[[], ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def shapes(problem: Problem) -> dict[str, str]:
    """Name of the shape -> the answer. A body alone where the prompt has the signature, a change where one is found."""
    code, entry = str(problem.reference).replace("\r\n", "\n").strip("\n") + "\n", problem.entry_point
    signature, body = problem.solution or ("", "")
    lines = code.splitlines(keepends=True)
    more = (
        {"body": body, "fenced_body": fenced(body), "deep_body": indent(dedent(body), "     ")}
        if problem.statement.stub
        else {}
    )
    other = changed(code, entry)
    if other is not None:
        more["changed"] = fenced(other)
    return {
        "plain": code,
        "fenced": fenced(code),
        "windows": fenced(code).replace("\n", "\r\n"),
        "prose": f"Here is the function:\n\n{fenced(code)}\nIt is used so:\n\n{fenced(f'print({entry})')}\nThat is all.",
        "draft": f"{fenced(without_result(code, entry))}That does nothing yet. In full:\n{fenced(code)}",
        "unfenced": f"Here is the function, as you asked:\n\n{code}\nIt does what you asked, doesn't it?\n",
        "main": fenced(f"{code}\n\nif __name__ == '__main__':\n    print({entry})\n    raise SystemExit(1)\n"),
        "own_test": fenced(f"{code}\n\nassert {entry} is None, 'what an answer may say of itself'\n"),
        "glued": f"```python\n{code.rstrip()}```\nIt's so.\n",
        "glued_end": f"{code.rstrip()}```\nIt's so.\n",
        "indented": indent(code, "    "),
        "branch": fenced(f"if True:\n{indent(code, '    ')}"),
        "bom": "\ufeff" + fenced("\ufeff" + code),
        "bare": fenced(signature.rstrip() + "\n" + body),  # no imports, no helpers, no docstring
        "open": fenced(code).removesuffix("```\n"),
        "half": "```python\n" + "".join(lines[: len(lines) // 2]),
        "torn": "```python\n" + code[: len(code) // 2],
        "all_but_last": "```python\n" + "".join(lines[:-1]),
        NONE: fenced(without_result(code, entry)),
        **more,
    }


def fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```\n"


def without_result(code: str, entry: str) -> str:
    """The entry point returns None at once."""
    tree = ast.parse(code)
    _function(tree, entry).body.insert(0, ast.Return(ast.Constant(None)))
    return ast.unparse(ast.fix_missing_locations(tree))


def changed(code: str, entry: str) -> str | None:
    """The entry point's first operator becomes another, or its first whole number one larger; None where it has neither."""
    tree = ast.parse(code)
    nodes = [*ast.walk(_function(tree, entry))]
    for node in nodes:
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _OTHER:
            node.ops[0] = _OTHER[type(node.ops[0])]()
            return ast.unparse(tree)
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in _OTHER:
            node.op = _OTHER[type(node.op)]()
            return ast.unparse(tree)
    for node in nodes:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
            return ast.unparse(tree)
    return None


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The last of that name, which is the one that is called."""
    return next(node for node in reversed(tree.body) if isinstance(node, ast.FunctionDef) and node.name == name)
