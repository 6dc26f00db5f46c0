"""Imports flow one way, and the numeric core works where MindSpore cannot be installed. Checked on the source.

    errors, kernels <- recipe.scheme <- checkpoint, recipe.plan, calibration, transforms, quantizers, formats
           <- mixed.budget <- recipe, pipeline.estimate, mixed.sensitivity <- network, backends
           <- calibration.stream <- pipeline, inference, mixed.measure <- evaluation <- chats <- report <- tune
           <- api <- cli

A new module is put on a level in LEVELS; until then the first test names it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import pytest

PACKAGE = "ms_pangu_quant"
LEVELS = (  # a name stands for the module and all below it; the longest that fits decides
    ("errors", "suggestion", "installation", "kernels"),
    ("recipe.scheme", "recipe.settings", "job.arguments", "evaluation.verdict", "evaluation.tasks"),
    ("checkpoint", "recipe.plan", "calibration", "transforms", "quantizers", "formats", "job.share"),
    ("mixed.budget",),
    ("recipe", "pipeline.estimate", "report.roofline", "mixed"),
    ("network", "backends", "job.ranks"),
    ("calibration.runner", "calibration.stream", "calibration.gradients"),
    ("pipeline", "inference", "mixed.measure", "serving"),
    ("evaluation",),
    ("chats",),
    ("report",),
    ("tune",),
    ("api",),
    ("cli", "__main__", "job"),
)
CORE = (  # the numeric core, which needs no framework
    "errors",
    "suggestion",
    "installation",
    "kernels",
    "recipe",
    "job.arguments",
    "job.share",
    "checkpoint",
    "calibration.data",
    "calibration.overlap",
    "calibration.ranges",
    "calibration.statistics",
    "transforms",
    "quantizers",
    "formats",
    "mixed.budget",
    "mixed.sensitivity",
    "pipeline.estimate",
    "report.roofline",
)
MAY_IMPORT = {
    "mindspore": ("network", "backends", "calibration.runner", "calibration.gradients", "inference", "job.ranks"),
    "mindformers": ("network", "backends"),
}


@dataclass(frozen=True)
class Import:
    """`target` is a module of the package without its name, or the top-level name of another one ("numpy")."""

    target: str
    line: int
    kind: str  # "module", "function" or "typing"


def below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def level(module: str) -> int | None:
    found = [(len(name), number) for number, names in enumerate(LEVELS) for name in names if below(module, name)]
    return max(found)[1] if found else None


def imports(source: str, module: str, modules: set[str], is_package: bool) -> Iterator[Import]:
    """Every import statement of a module, wherever it stands."""

    def visit(node: ast.AST, kind: str) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, "typing")
            for child in node.orelse:
                yield from visit(child, kind)
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            kind = "function"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from resolve(alias.name, [], node.lineno, kind)
        if isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                path = f"{PACKAGE}.{module}".split(".")
                base = path[: len(path) - node.level + is_package]
                start = ".".join([*base, *([node.module] if node.module else [])])
            yield from resolve(start, [alias.name for alias in node.names], node.lineno, kind)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, kind)

    def resolve(start: str, names: list[str], line: int, kind: str) -> Iterator[Import]:
        if not below(start, PACKAGE):
            yield Import(start.split(".")[0], line, kind)
            return
        inside = start[len(PACKAGE) + 1 :]
        targets = {f"{inside}.{name}".strip(".") for name in names} & modules
        for target in targets or {inside}:
            yield Import(target or "__init__", line, kind)

    yield from visit(ast.parse(source), "module")


def graph(sources: Mapping[str, str]) -> dict[str, list[Import]]:
    """Module -> its imports; a package is known by its own name and has its __init__.py's imports."""
    packages = {name.rpartition(".")[0] for name in sources}
    return {module: list(imports(source, module, set(sources), module in packages)) for module, source in sources.items()}


def complaints(sources: Mapping[str, str]) -> list[str]:
    """What breaks the law, a line each; empty for a lawful package."""
    found = []
    known = graph(sources)
    for module, imported in known.items():
        own = level(module)
        if own is None and module != "__init__":
            found.append(f"{module}: is on no level; put it into LEVELS")
        for each in imported:
            where = f"{module}:{each.line} ({each.kind} level): imports {each.target}"
            inside = each.target in sources or each.target == "__init__"
            target = level(each.target) if inside else None
            if own is not None and target is not None and target > own:
                found.append(f"{where}, which is above it")
            if own is not None and each.target == "__init__":
                found.append(f"{where}: the public names are for users")
            allowed = MAY_IMPORT.get(each.target)
            if allowed is not None and not any(below(module, name) for name in allowed):
                found.append(f"{where}; only {', '.join(allowed)} may")
            if module == "__init__" and each.kind == "module" and inside and target:
                found.append(f"{where} at once; only errors may be, the rest on first use")
    at_once = {
        module: {each.target for each in imported if each.kind == "module" and each.target in sources}
        for module, imported in known.items()
    }
    order = TopologicalSorter(at_once)
    try:
        order.prepare()
    except CycleError as error:
        found.append(f"a cycle: {' <- '.join(error.args[1])}")
    return found


@pytest.fixture(scope="module")
def sources(root) -> dict[str, str]:
    """Module without the package's name -> source; "__init__" is the package itself."""
    found = {}
    for file in sorted((root / PACKAGE).rglob("*.py")):
        parts = list(file.relative_to(root / PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = file.read_text(encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def core(sources) -> list[str]:
    modules = [module for module in sources if any(below(module, room) for room in CORE)]
    assert all(any(below(module, room) for module in modules) for room in CORE), "a room that is no longer there"
    return modules


def test_imports_flow_one_way_without_a_cycle(sources):
    assert complaints(sources) == []


def test_the_core_imports_no_framework_and_nothing_that_does(sources, core):
    """Wherever the import stands: in a function it would only fail later."""
    known, reached = graph(sources), set(core)
    waiting = list(core)
    while waiting:
        for each in known[waiting.pop()]:
            assert each.target not in MAY_IMPORT
            if each.target in known and each.target not in reached:
                reached.add(each.target)
                waiting.append(each.target)
    assert max(level(module) for module in reached) <= level("recipe")
    assert not any("import_module" in sources[module] or "__import__" in sources[module] for module in reached)


def test_the_core_and_the_scheduler_can_be_imported_where_mindspore_is_not_installed(root, core):
    names = [f"{PACKAGE}.{module}" for module in (*core, "inference.sampling", "inference.generate", "pipeline.loop")]
    absent = ["mindspore", "mindformers", "torch", "transformers"]
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None there makes the import fail
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


# --- the law is not blind -------------------------------------------------------------------------------------------


def code(*lines: str) -> str:
    return "\n".join(lines).replace("ours", PACKAGE)


TYPING = "from typing import TYPE_CHECKING", "if TYPE_CHECKING:"
LAWFUL = {
    "__init__": code("from ours.errors import PanguQuantError", "def __getattr__(name):", " from ours import pipeline"),
    "errors": "",
    "recipe": "",
    "recipe.scheme": code("from ours.errors import RecipeError"),
    "checkpoint": "",
    "checkpoint.config": "import json",
    "checkpoint.layout": code("from ours.checkpoint.config import ModelConfig"),
    "checkpoint.reader": code("from ours.checkpoint import layout"),
    "formats": "",
    "formats.packing": "import numpy as np",
    "recipe.recipe": "from ..formats import packing",
    "network": "",
    "network.pangu": "import mindformers.models",
    "backends": code("def current():", " from ours.backends.cpu import BACKEND"),
    "backends.cpu": "import mindspore as ms",
    "calibration": "",
    "calibration.stream": code("from ours.network.pangu import build"),
    "pipeline": code(*TYPING, " from ours.calibration.stream import Runner"),
    "inference": "",
    "inference.model": code("def f():", " from mindspore import Tensor"),
    "cli": code("import ours.pipeline"),
}
VIOLATIONS = {  # what is done wrong: (module, its source then, part of the complaint)
    "upward at module level": (
        "recipe.scheme",
        code("from ours.recipe.recipe import Recipe"),
        "recipe.scheme:1 (module level): imports recipe.recipe",
    ),
    "upward in a function": (
        "checkpoint.reader",
        code("def f():", " from ours.recipe.recipe import Recipe"),
        "checkpoint.reader:2 (function level): imports recipe.recipe",
    ),
    "upward in a method": (
        "formats.packing",
        code("class A:", " def f(self):", "  import ours.network.pangu"),
        "formats.packing:3 (function level): imports network.pangu",
    ),
    "upward for typing": (
        "recipe.recipe",
        code(*TYPING, " import ours.pipeline"),
        "recipe.recipe:3 (typing level): imports pipeline",
    ),
    "upward as part of a package": (
        "formats.packing",
        code("from ours.calibration import stream"),
        "imports calibration.stream, which is above",
    ),
    "upward and relative": (
        "formats.packing",
        "from ..inference.model import load",
        "imports inference.model, which is above",
    ),
    "upward from a package": ("checkpoint.config", "from .. import recipe", "imports recipe, which is above"),
    "the public names": ("pipeline", code("from ours import load"), "imports __init__"),
    "mindspore in the core": ("formats.packing", "import mindspore.ops", "imports mindspore; only network"),
    "mindspore in a function": (
        "recipe.recipe",
        code("def f():", " from mindspore import ops"),
        "recipe.recipe:2 (function level)",
    ),
    "mindspore in the command line": ("cli", "import mindspore", "imports mindspore; only network"),
    "mindformers in inference": ("inference.model", "from mindformers.tools import x", "imports mindformers; only network"),
    "a cycle": ("checkpoint.config", code("from ours.checkpoint import layout"), "a cycle:"),
    "the pipeline at once": ("__init__", code("from ours.pipeline import quantize"), "imports pipeline at once"),
    "an unknown module": ("utils", "", "utils: is on no level"),
    "an unknown folder": ("helpers.tensors", "", "helpers.tensors: is on no level"),
}


def test_a_lawful_package_gives_no_complaint():
    assert complaints(LAWFUL) == []


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_violation_gives_one_complaint_that_names_it(violation):
    module, source, said = VIOLATIONS[violation]
    found = complaints({**LAWFUL, module: source})
    assert len(found) == 1, found
    assert said in found[0]


def test_the_design_lists_every_name_of_mindformers_that_is_imported(sources, root):
    text = (root / "docs/DESIGN.md").read_text(encoding="utf-8")
    edge = text.partition("## The edge to MindFormers\n")[2].partition("\n## ")[0]
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mindformers" and not node.level:
                for alias in node.names:
                    assert f"{alias.name}`" in edge or f"{alias.name}." in edge, f"{module}: {node.module}.{alias.name}"
