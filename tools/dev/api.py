#!/usr/bin/env python3
"""Make the API reference from the docstrings: docs/api.md of the public names, build/api/ of every module (pdoc).

Docstrings are shown as they are written, in columns; pdoc's Markdown would run their lines together. Modules are imported
to be read, so the machine needs what the package needs.
"""

from __future__ import annotations

import html
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc
import pdoc.doc
import pdoc.render
from markupsafe import Markup

import ms_pangu_quant
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.network import runtime

ROOT = Path(__file__).parents[2]
PACKAGE = "ms_pangu_quant"
GUEST = f"{PACKAGE}.evaluation.guest"  # scripts for the sandbox, which run when they are imported
_FUNCTIONS = (
    *("calibrate", "quantize", "estimate", "sensitivity", "sensitivity_cost", "export"),
    *("compare", "compare_served", "observe", "evaluate", "answer", "score", "report"),
)
PUBLIC = (  # heading, module, and the names shown; a class with its own public members
    ("Functions", f"{PACKAGE}.api", _FUNCTIONS),
    ("What is asked for", f"{PACKAGE}.api", ("CalibrationRequest", "EvaluationRequest", "Endpoint", "Judging")),
    ("", f"{PACKAGE}.api", ("GenerationSettings", "ReportRequest")),
    ("Loading and generating", f"{PACKAGE}.inference.model", ("load", "Model.logits", "Model.generate", "Generation")),
    ("Results", f"{PACKAGE}.pipeline.report", ("QuantizeResult", "BlockReport", "Progress")),
    ("", f"{PACKAGE}.chats.job", ("Chats",)),
    ("", f"{PACKAGE}.inference.compare", ("Comparison", "ServedComparison")),
    ("What observe returns", f"{PACKAGE}.checkpoint.block", ("Block",)),
    ("", f"{PACKAGE}.calibration.statistics", ("InputStats", "RowSample")),
    ("Extending it", f"{PACKAGE}.recipe.recipe", ("Transform", "Rewrite", "WeightQuantizer")),
    ("", f"{PACKAGE}.calibration.statistics", ("Needs",)),
    ("", f"{PACKAGE}.recipe.scheme", ("TensorScheme", "QuantScheme")),
    ("", f"{PACKAGE}.quantizers.grid", ("QuantizedWeight",)),
    ("", f"{PACKAGE}.checkpoint.layout", ("LinearSite",)),
)


class _Preformatted(Markup):
    toc_html = None  # pdoc asks for a table of contents


def as_written(docstring: str) -> _Preformatted:
    """HTML of a docstring that keeps its lines and columns; `names` become code."""
    text = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(docstring))
    return _Preformatted(f"<pre>{text}</pre>")


def modules() -> list[str]:
    """Names of the package and all modules below it."""
    below = (module.name for module in pkgutil.walk_packages(ms_pangu_quant.__path__, f"{PACKAGE}."))
    return [PACKAGE, *(name for name in below if not name.startswith(GUEST) and not name.endswith("__main__"))]


def write_html(folder: Path) -> None:
    """A page for each module, an index and a search."""
    runtime.start("cpu")  # before anything imports the frameworks: it keeps them quiet
    for name in ms_pangu_quant.__all__:
        setattr(ms_pangu_quant, name, getattr(ms_pangu_quant, name))  # pdoc does not see what is imported on first use
    pdoc.render.configure(show_source=False)
    pdoc.render.env.filters.update(to_markdown=lambda docstring: docstring, to_html=as_written)
    with warnings.catch_warnings():
        # A package is named with its modules, and so are they: one with __all__ would hide them.
        warnings.filterwarnings("ignore", message=".*a module with this name has already been added")
        warnings.filterwarnings("ignore", message="Error parsing type annotation")  # shown as it is written
        pdoc.pdoc(*modules(), f"!{GUEST}", output_directory=folder)


def markdown() -> str:
    """docs/api.md."""
    lines = [
        "# Python API",
        "",
        "Made from the docstrings by `make api`, which also writes a page for every module into `build/api/`.",
        "",
        "`calibrate`, `quantize`, `compare`, `observe`, `evaluate`, their requests, and `load` are names of the package:",
        "`from ms_pangu_quant import quantize`. So are `ASSETS`, the folder of the embedded checkpoint and its data, and",
        "`PanguQuantError`, which is raised for everything that a user can cause and mend.",
    ]
    for heading, module, names in PUBLIC:
        documented = pdoc.doc.Module(importlib.import_module(module))
        lines += ["", f"## {heading}"] if heading else []
        for name in names:
            entry: Any = documented
            for part in name.split("."):
                entry = entry.get(part)
            lines += ["", f"### {name}", "", f"`{module}`", "", "```python", _signature(entry), "```"]
            text = inspect.getdoc(entry.obj) or ""
            if text and not text.startswith(f"{name}("):  # a dataclass without words has its signature there
                lines += ["", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def _signature(entry: Any) -> str:
    if isinstance(entry, pdoc.doc.Function):
        text = re.sub(r"= \w+\([^()]*<function [^()]*\)", "= ...", f"def {entry.name}{entry.signature}")
        return _without_modules(text)
    annotations = inspect.get_annotations(entry.obj)
    fields = [
        f"    {field.name}: {_annotation(field) if isinstance(field, pdoc.doc.Variable) else annotations[field.name]}"
        for field in entry.own_members
        if (isinstance(field, pdoc.doc.Variable) or field.name in annotations) and not field.name.startswith("_")
    ]
    call = entry.obj.__dict__.get("__call__")
    if call is not None:  # a protocol's whole point; pdoc leaves it out
        fields.append(f"    def __call__{str(inspect.signature(call)).replace(chr(39), '')}")
    return "\n".join([f"class {entry.name}:", *(fields or ["    ..."])])


def _annotation(field: Any) -> str:
    return _without_modules(str(field.annotation_str).removeprefix(": "))


def _without_modules(text: str) -> str:
    """Types by their own names."""
    text = re.sub(r"numpy\.ndarray\[[^\[\]]+(?:\[[^\[\]]*\])?, numpy\.dtype\[numpy\.(\w+)\]\]", r"NDArray[\1]", text)
    text = text.replace("'", '"')
    return re.sub(r"\b(?:ms_pangu_quant\.[a-z_.]+|pathlib|typing|typing_extensions|collections\.abc)\.(?=[A-Z])", "", text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/dev/api.py --html build/api")
    parser.add_argument("--html", type=Path, default=ROOT / "build/api", help="folder of the pages")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/api.md", help="Markdown of the public names")
    chosen = parser.parse_args(arguments)
    write_html(chosen.html)
    chosen.page.write_text(markdown(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
