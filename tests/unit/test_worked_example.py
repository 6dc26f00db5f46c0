"""docs/add_an_algorithm.md is executed: its files, its lines, its test and its commands, in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

PAGE = "docs/add_an_algorithm.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """(what the fence says, content) of every fenced block."""
    return [(token.info, token.content) for token in MarkdownIt().parse(text) if token.type == "fence"]


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory) -> Path:
    """The package with what the page adds to it."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("ms_pangu_quant", "configs"):
        shutil.copytree(root / name, folder / name, ignore=ignored)
    (folder / "ms_pangu_quant/assets").symlink_to(root / "ms_pangu_quant/assets")
    shutil.copy(root / "pyproject.toml", folder)
    for info, content in blocks((root / PAGE).read_text(encoding="utf-8")):
        what, _, file = info.partition(" ")[2].partition("=")
        path = folder / file
        if what == "title":
            assert not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        if what == "lines":
            path.write_text(with_lines(path.read_text(encoding="utf-8"), content), encoding="utf-8")
    return folder


def with_lines(source: str, lines: str) -> str:
    """An import is put before the first of the package's own, an assignment in the place of the one to the same name."""
    for line in filter(None, lines.splitlines()):
        if line.startswith("from "):
            source = source.replace("from ms_pangu_quant.", f"{line}\nfrom ms_pangu_quant.", 1)
            continue
        name = re.escape(line.partition(":")[0])
        source, count = re.subn(rf"(?m)^{name}: .*$", lambda match, line=line: line, source)
        assert count == 1, f"{line}: found {count} assignments to replace"
    return source


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_pages_test_passes_and_the_linter_has_no_word_to_say(copy):
    done = run(copy, "pytest", "-p", "no:cacheprovider", "tests/unit/test_refit.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d+ passed", done.stdout)
    added = ["ms_pangu_quant/quantizers/refit.py", "tests/unit/test_refit.py"]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = run(copy, "ruff", *command, *added)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_pages_test_would_notice_a_slip(copy):
    """The example's tests are held to what the page asks of tests."""
    path = copy / "ms_pangu_quant/quantizers/refit.py"
    source = path.read_text(encoding="utf-8")
    try:
        for right, wrong in (("(q * q).sum(axis=2)", "(w * w).sum(axis=2)"), ("np.where(gains, ", "np.where(True, ")):
            assert right in source
            path.write_text(source.replace(right, wrong), encoding="utf-8")
            assert run(copy, "pytest", "-x", "-p", "no:cacheprovider", "tests/unit/test_refit.py").returncode == 1, wrong
    finally:
        path.write_text(source, encoding="utf-8")


def test_the_pages_commands_quantize_the_embedded_checkpoint_with_less_error_in_every_layer(copy, root):
    text = (root / PAGE).read_text(encoding="utf-8")
    commands = [line for info, content in blocks(text) if info == "bash" for line in content.splitlines()]
    quantizes = [line.split() for line in commands if line.startswith("pangu-quant quantize")]
    assert len(quantizes) == 2
    errors = {}
    for command in quantizes:
        done = run(copy, "ms_pangu_quant", *command[1:])
        assert done.returncode == 0, done.stderr
        output = command[command.index("--output") + 1]
        report = json.loads((copy / output / "quantization_report.json").read_text(encoding="utf-8"))
        errors[output] = [block["weight_error"] for block in report["blocks"]]
    assert errors["refit"]
    for refit, rtn in zip(errors["refit"], errors["rtn"], strict=True):
        assert refit
        assert all(refit[site] < rtn[site] for site in rtn)
