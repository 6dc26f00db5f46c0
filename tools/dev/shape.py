#!/usr/bin/env python3
"""The shape of the code in numbers: long functions, and how many files know a name that few should.

A file counts where its text has the word, docstrings and comments included: what explains itself with a name depends on it
as much as what computes with it. Beside it stands in how many of those files code has it (a name, or part of a string).
Python files only: the C++ ones have such words in the names of their own operators alone.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARAMETERS, LINES = 8, 60
WORDS = {
    "a quantization kind": ("W8A8_DYNAMIC", "W4A8_DYNAMIC"),
    "a quantization kind, the static ones too": ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8", "C8"),
    "int8_cache": ("int8_cache",),
    "a layer or an input": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("attention_input", "attention_output", "mlp_input", "mlp_hidden"),
    ),
    "a norm or one of MindFormers' layers": (
        *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        *("input_layernorm", "post_attention_layernorm"),
    ),
}
EXAMPLE = """\
Example:
  python tools/dev/shape.py --list
"""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    name: str
    text: str
    tree: ast.Module

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def modules(package: Path) -> list[Module]:
    found = ((str(path.relative_to(package)), path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py")))
    return [Module(name, text, ast.parse(text)) for name, text in found]


def parameters(function: Function) -> int:
    """Keyword-only ones too; without self or cls, * and **."""
    positional = [*function.args.posonlyargs, *function.args.args]
    bound = bool(positional) and positional[0].arg in ("self", "cls")
    return len(positional) - bound + len(function.args.kwonlyargs)


def lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def long_functions(found: list[Module], measure: Callable[[Function], int], least: int) -> list[str]:
    each = ((measure(function), module.name, function.name) for module in found for function in module.functions())
    return [f"{count:>3} {name} {function}" for count, name, function in sorted(each, reverse=True) if count >= least]


def docstrings(tree: ast.Module) -> set[int]:
    owners = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, Function)))
    first = (node.body[0] for node in owners if node.body)
    return {id(node.value) for node in first if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}


def code_words(tree: ast.Module) -> Iterator[str]:
    """Every name, and every string that is no docstring."""
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def spelling(found: list[Module], words: tuple[str, ...]) -> Mapping[str, bool]:
    """File that has one of the words in its text -> whether code has it."""
    wanted = re.compile(rf"\b({'|'.join(words)})\b")
    having = [module for module in found if wanted.search(module.text)]
    return {module.name: any(wanted.search(word) for word in code_words(module.tree)) for module in having}


def report(package: Path, listed: bool) -> Iterator[str]:
    found = modules(package)
    for title, rows in (
        (f"functions with {PARAMETERS} parameters or more", long_functions(found, parameters, PARAMETERS)),
        (f"functions over {LINES} lines", long_functions(found, lines, LINES + 1)),
    ):
        yield f"{len(rows):>6} {title}"
        yield from (f"       {row}" for row in rows if listed)
    for title, words in WORDS.items():
        spelt = spelling(found, words)
        yield f"{len(spelt):>6} files spell {title} ({sum(spelt.values())} in code)"
        yield from (f"         {name}" + ("" if in_code else " (not in code)") for name, in_code in spelt.items() if listed)
    native = [path for kind in ("*.cc", "*.h") for path in package.rglob(kind)]
    yield f"{len(list(package.glob('*.py'))):>6} modules at the top, __init__ and __main__ included"
    yield f"{sum(len(module.text.splitlines()) for module in found):>6} lines of Python in {len(found)} files"
    yield f"{sum(len(path.read_text().splitlines()) for path in native):>6} lines of C++ in {len(native)} files"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, nargs="?", default=ROOT / "ms_pangu_quant", help="of another checkout")
    parser.add_argument("--list", action="store_true", help="the functions and files too")
    chosen = parser.parse_args(arguments)
    print("\n".join(report(chosen.package, chosen.list)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
