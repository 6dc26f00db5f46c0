"""Puts the slips of tests/slips.yaml into a copy of the package, one by one; the tests named for a slip must go red.

A slip that passes is a hole in the tests. Before that, the same tests must be green without any slip.
"""

from __future__ import annotations

import compileall
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
import yaml
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, SLIPS = "ms_pangu_quant", "tests/slips.yaml"
SECONDS = 240  # a slip that makes the tests hang is one they caught
RED, GREEN = 1, 0  # pytest's exit codes; any other is an error of the slip
_clock = itertools.count(int(time.time()))


@dataclass(frozen=True)
class Slip:
    """edits: pairs of a text that is in the file once, and what it becomes."""

    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """Raises ValueError where the text has changed since the slip was written, or the result is no Python."""
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{PACKAGE}/{self.file} has {text.count(old)} times, wanted once: {old!r}")
            text = text.replace(old, new)
        compile(text, self.file, "exec")
        return text


def load_slips(path: Path) -> list[Slip]:
    return [
        Slip(
            entry["what"],
            entry["file"],
            ((entry["from"], entry["to"]), *(tuple(pair) for pair in entry.get("also", ()))),
            tuple(f"tests/unit/{name}" for name in entry["tests"]),
        )
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


class Tree:
    """A copy of the project in which files are changed, so that nothing is left behind wherever this is stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("assets", "__pycache__"))
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / PACKAGE / "assets").symlink_to(ROOT / PACKAGE / "assets")
        for name in ("configs", "tools", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        compileall.compile_dir(folder / PACKAGE, quiet=1)

    def test(self, files: Sequence[str]) -> tuple[int, str]:
        """pytest's exit code, RED where it did not end, and what it printed last."""
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(self._folder)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *files]
        try:
            ended = subprocess.run(
                command, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return RED, "the tests did not end"
        return ended.returncode, (ended.stdout + ended.stderr).strip()

    def test_with(self, slip: Slip) -> tuple[int, str]:
        path = self._folder / PACKAGE / slip.file
        original = path.read_text(encoding="utf-8")
        try:
            changed = slip.applied(original)
        except (ValueError, SyntaxError) as error:
            return -1, str(error)
        try:
            self._write(path, changed)
            return self.test(slip.tests)
        finally:
            self._write(path, original)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        moment = next(_clock)
        os.utime(path, (moment, moment))  # compiled code is found by size and second: no two versions may share them


def run(slips: Sequence[Slip], workers: int) -> int:
    """Prints a line for every slip that is not caught; returns how many those are."""
    with tempfile.TemporaryDirectory(prefix="pangu-mutate-") as scratch, ThreadPoolExecutor(workers) as pool:
        free: SimpleQueue[Tree] = SimpleQueue()

        def with_tree(act):
            tree = free.get()
            try:
                return act(tree)
            finally:
                free.put(tree)

        for number in range(workers):
            free.put(Tree(Path(scratch) / str(number)))
        wanted = sorted({name for slip in slips for name in slip.tests})
        for name, (code, text) in zip(
            wanted, pool.map(lambda name: with_tree(lambda tree: tree.test([name])), wanted), strict=True
        ):
            if code != GREEN:
                print(text, f"mutate: {name} is not green without a slip; mend that first", sep="\n", file=sys.stderr)
                return len(slips)
        missed = 0
        outcomes = pool.map(lambda slip: with_tree(lambda tree: tree.test_with(slip)), slips)
        for slip, (code, text) in zip(
            track(slips, "slips", total=len(slips), transient=True, disable=not sys.stderr.isatty()), outcomes, strict=True
        ):
            if code != RED:
                missed += 1
                why = "not caught" if code == GREEN else f"cannot be tried: {text.splitlines()[-1] if text else code}"
                print(f"{slip.file}: {slip.what}: {why}")
        return missed


def main(
    match: Annotated[str, typer.Option(help="Only slips whose file or description holds this text.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Slips at once.")] = os.cpu_count() or 1,
) -> None:
    """Check the tests: put seeded slips into a copy of the package one by one, and see that tests go red for each."""
    slips = [slip for slip in load_slips(ROOT / SLIPS) if match in slip.file or match in slip.what]
    if not slips:
        print(f"mutate: no slip of {SLIPS} holds {match!r}", file=sys.stderr)
        raise typer.Exit(2)
    missed = run(slips, workers)
    print(f"{len(slips) - missed} passed, {missed} failed")
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(epilog="Example: python tools/dev/mutate.py --match gptq")(main)
    app()
