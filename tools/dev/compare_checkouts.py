#!/usr/bin/env python3
"""Do two checkouts write the same bytes? For changes that are meant to keep them.

Every shipped recipe of BEFORE is run by the code of both checkouts, through the command line alone: on the two embedded
checkpoints, and on a tiny random one in float32, whose widths some recipes refuse. A few outputs are exported to the other
formats, and back. Every file of both sides is then compared byte by byte; of JSON and safetensors files that differ, the
values and tensors are named that do. Recipes go by name (each checkout reads its own file); all other inputs are BEFORE's.

A recipe with a budget measures its sensitivities first, on few tokens; that file is compared too.

What BEFORE wrote is kept in WORK by its commit, so only AFTER is run the next time. One run at a time, even where several
of these scripts share WORK. What AFTER wrote stays in WORK/after where it differs.

exit code  0 all is the same or refused alike, 1 something differs or fails, 2 the request cannot be done
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = {"mini": "openpangu-mini", "tied": "openpangu-mini-tied", "tiny": None}  # name -> folder in assets
EXPORTED = ("w8a8_static", "w4a8_g128", "w8a8_kv8")
EXPORTS = {"ascend": "", "compressed-tensors": "", "mindformers": "ascend"}  # format -> the format it is exported from
REFUSED = 2  # pangu-quant's exit code for what a user can mend
REPORT = "quantization_report.json"
TOKENS = "512"
SHOWN = 6
EXAMPLE = """\
Example:
  python tools/dev/compare_checkouts.py ../before . --recipes w8a8 w4a8_mixed --checkpoints mini --work /tmp/bytes
"""


@dataclass(frozen=True)
class Checkout:
    root: Path
    python: Path

    def commit(self) -> str:
        return self._git("rev-parse", "--short=12", "HEAD")

    def is_changed(self) -> bool:
        return bool(self._git("status", "--porcelain", "--", "ms_pangu_quant", "configs"))

    def _git(self, *arguments: str) -> str:
        return subprocess.check_output(["git", "-C", str(self.root), *arguments], text=True).strip()


@dataclass(frozen=True)
class Case:
    """One recipe on one checkpoint, or the export of what it wrote."""

    checkpoint: str
    recipe: str
    to: str = ""

    @property
    def folder(self) -> str:
        return f"{self.checkpoint}/{self.recipe}" + (f"@{self.to}" if self.to else "")

    @property
    def source(self) -> Case:
        return Case(self.checkpoint, self.recipe, EXPORTS[self.to])

    def __str__(self) -> str:
        return f"{self.recipe:<20} {self.checkpoint:<5}" + (f" -> {self.to}" if self.to else "")


@dataclass(frozen=True)
class Ran:
    """What a run left: its exit code, the line that it refused or failed with, and the folder of its files."""

    code: int
    message: str
    files: Path


class Bench:
    """Runs cases with the code of either checkout; what BEFORE wrote is kept."""

    def __init__(self, before: Checkout, after: Checkout, work: Path) -> None:
        self.before, self.after, self.work = before, after, work
        self.kept = work / before.commit()
        self.changed = work / "after" / str(after.root).strip("/").replace("/", "+")
        self.inputs = work / "inputs" / before.commit()

    def cases(self, recipes: list[str], checkpoints: list[str]) -> list[Case]:
        every = [Case(checkpoint, recipe) for recipe in recipes for checkpoint in checkpoints]
        exports = [Case(each.checkpoint, each.recipe, to) for each in every if each.recipe in EXPORTED for to in EXPORTS]
        return every + [each for each in exports if each.checkpoint != "tiny"]

    def old(self, case: Case) -> Ran:
        kept = self.kept / case.folder
        if case.to:
            self.old(case.source)
        with alone(self.work):
            return kept_run(kept) or self._run(self.before, case, kept)

    def new(self, case: Case) -> Ran:
        with alone(self.work):
            return self._run(self.after, case, self.changed / case.folder)

    def forget(self, case: Case) -> None:
        shutil.rmtree(self.changed / case.folder, ignore_errors=True)

    def _run(self, checkout: Checkout, case: Case, into: Path) -> Ran:
        shutil.rmtree(into, ignore_errors=True)
        (into / "files").mkdir(parents=True)
        code, message = 0, ""
        for arguments in self._commands(case, into / "files"):
            code, message = pangu_quant(checkout, arguments, into)
            if code:
                break
        (into / "ran.json").write_text(json.dumps({"code": code, "message": message}))
        return Ran(code, message, into / "files")

    def _commands(self, case: Case, files: Path) -> Iterator[list[str]]:
        output = ["--output", str(files / "output")]
        if case.to:  # from BEFORE's output on both sides: what differs there is told by its own line
            source = self.kept / case.source.folder / "files/output"
            yield ["export", str(source), "--format", case.to, *output, "--allow-unserved"]
            return
        checkpoint, calibration = self._inputs(case.checkpoint)
        request = [str(checkpoint), "--recipe", case.recipe, "--calibration", str(calibration)]
        spending = []
        if has_budget(self.before.root / f"configs/{case.recipe}.yaml"):
            measured = str(files / "sensitivity.json")
            yield ["sensitivity", *request, "--output", measured, "--tokens", TOKENS]
            spending = ["--sensitivity", measured]
        yield ["quantize", *request, *output, *spending, "--allow-unserved"]

    def _inputs(self, checkpoint: str) -> tuple[Path, Path]:
        assets, folder = self.before.root / "ms_pangu_quant/assets", CHECKPOINTS[checkpoint]
        if folder is not None:
            return assets / folder, assets / "calibration.jsonl"
        if not (self.inputs / "tiny/config.json").exists():
            make_tiny(self.before, self.inputs)
        return self.inputs / "tiny", self.inputs / "token_ids.jsonl"


def kept_run(kept: Path) -> Ran | None:
    """None where there is none, or one that was killed or ran out of memory, which says nothing about the code."""
    if not (kept / "ran.json").exists():
        return None
    ran = Ran(**json.loads((kept / "ran.json").read_text()), files=kept / "files")
    return ran if ran.code in (0, REFUSED) else None


@contextmanager
def alone(work: Path) -> Iterator[None]:
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_tiny(checkout: Checkout, into: Path) -> None:
    """A random float32 checkpoint of two layers, and token ids to calibrate it with: it has no tokenizer."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    drawn = random.Random(0)
    rows = [[drawn.randrange(3, 96) for _ in range(drawn.randrange(24, 120))] for _ in range(160)]
    (into / "token_ids.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in rows))
    tool = next(checkout.root.glob("tools/**/make_checkpoint.py"))
    request = ["--shape", "tiny", "--dtype", "float32", "--output", str(into / "tiny")]
    subprocess.run([checkout.python, tool, *request], check=True, stdout=subprocess.DEVNULL)


def has_budget(recipe: Path) -> bool:
    return any(re.match(r"\s*[^#]*\bbudget:", line) for line in recipe.read_text().splitlines())


def pangu_quant(checkout: Checkout, arguments: list[str], into: Path) -> tuple[int, str]:
    """The exit code of a command, and its last line where that is not 0, without the folders of this side."""
    command = [str(checkout.python), "-m", "ms_pangu_quant", *arguments]
    environment = {**os.environ, "COLUMNS": "1000", "NO_COLOR": "1"}
    ran = subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, text=True, check=False)
    lines = (ran.stderr or ran.stdout).strip().splitlines()
    message = lines[-1] if ran.returncode and lines else ""
    return ran.returncode, message.replace(str(into), "WORK").replace(str(checkout.root), "CHECKOUT")


def differences(before: Path, after: Path) -> dict[str, list[str]]:
    """File -> what differs in it; only files that differ."""
    names = {str(path.relative_to(root)) for root in (before, after) for path in root.rglob("*") if path.is_file()}
    found = {name: file_differences(before / name, after / name) for name in sorted(names)}
    return {name: parts for name, parts in found.items() if parts}


def file_differences(before: Path, after: Path) -> list[str]:
    for path, told in ((before, "only AFTER writes it"), (after, "only BEFORE writes it")):
        if not path.is_file():
            return [told]
    old, new = before.read_bytes(), after.read_bytes()
    return [] if old == new else parts_that_differ(before.name, old, new) or ["the same values in other bytes"]


def parts_that_differ(name: str, old: bytes, new: bytes) -> list[str]:
    if name == "SHA256SUMS":
        changed = set(old.decode().splitlines()) ^ set(new.decode().splitlines())
        return sorted({line.split(maxsplit=1)[1] for line in changed})
    if name.endswith(".json"):
        return list(json_differences(json.loads(old), json.loads(new)))
    if name.endswith(".safetensors"):
        left, right = tensors(old), tensors(new)
        return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
    return ["its bytes"]


def json_differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Paths, like blocks.0.output_error, of what is not the same in both."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = (dict(enumerate(each)) for each in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new or type(old) is not type(new):
            yield at or "all of it"
        return
    for key in [*old, *(key for key in new if key not in old)]:
        here = f"{at}.{key}" if at else str(key)
        if key in old and key in new:
            yield from json_differences(old[key], new[key], here)
        else:
            yield f"{here} ({'gone' if key in old else 'new'})"


def tensors(data: bytes) -> dict[str, tuple[str, str, bytes]]:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            str(entry["shape"]),
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def without_meant(found: dict[str, list[str]], meant: list[str]) -> dict[str, list[str]]:
    """Less the values of the report that are meant to differ, and its line in SHA256SUMS if nothing else of it differs."""
    kept = {}
    for name, parts in found.items():
        of_report = Path(name).name == REPORT
        kept[name] = [part for part in parts if not (of_report and part.split(" (")[0] in meant)]
    if not any(kept.get(name) for name in kept if Path(name).name == REPORT):
        for name in [name for name in kept if Path(name).name == "SHA256SUMS"]:
            kept[name] = [part for part in kept[name] if part != REPORT]
    return {name: parts for name, parts in kept.items() if parts}


def verdict(old: Ran, new: Ran, meant: list[str]) -> tuple[bool, str]:
    """Whether both sides did the same, and the line that says so."""
    if (old.code, old.message) != (new.code, new.message):
        return False, f"differs: exit code {old.code} ({old.message}) became {new.code} ({new.message})"
    if old.code == REFUSED:
        return True, f"refused alike: {old.message}"
    if old.code:
        return False, f"fails on both sides, exit code {old.code}: {old.message}"
    found = differences(old.files, new.files)
    if left := without_meant(found, meant):
        return False, "differs: " + "; ".join(f"{name}: {shortened(parts)}" for name, parts in left.items())
    return True, "same" + (f" but for what is meant: {shortened(next(iter(found.values())))}" if found else "")


def shortened(parts: list[str]) -> str:
    return ", ".join(parts[:SHOWN]) + (f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else "")


def fill(bench: Bench, cases: list[Case]) -> int:
    for case in cases:
        began = time.monotonic()
        ran = bench.old(case)
        print(f"{case}  {'written' if not ran.code else ran.message}  {time.monotonic() - began:.0f} s", flush=True)
    return 0


def compare(bench: Bench, cases: list[Case], meant: list[str]) -> int:
    lines = []
    for case in cases:
        old, new = bench.old(case), bench.new(case)
        alike, line = verdict(old, new, meant)
        print(f"{case}  {line}", flush=True)
        lines.append((alike, line))
        if alike:
            bench.forget(case)
    differing = sum(not alike for alike, _ in lines)
    refused = sum(line.startswith("refused") for _, line in lines)
    print(f"{len(lines) - differing - refused} same, {refused} refused alike, {differing} differ")
    return 1 if differing else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="checkout whose bytes are to be kept; committed")
    parser.add_argument("after", type=Path, metavar="AFTER", help="checkout with the change")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="of BEFORE's configs/ (default: all)")
    parser.add_argument("--checkpoints", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "compare_checkouts", metavar="DIR")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N cases, for a quick look")
    parser.add_argument("--no-exports", action="store_true", help="quantize only")
    parser.add_argument("--before-only", action="store_true", help="only write what is kept of BEFORE")
    parser.add_argument(
        "--meant",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"values of {REPORT} that may differ, like fingerprint.recipe",
    )
    parser.add_argument("--before-python", type=Path, help="default: BEFORE/.venv/bin/python")
    parser.add_argument("--after-python", type=Path, help="default: AFTER/.venv/bin/python")
    return parser.parse_args(arguments)


def checkout(root: Path, python: Path | None) -> Checkout:
    found = Checkout(root.resolve(), (python or root / ".venv/bin/python").absolute())
    if not found.python.exists():
        raise ValueError(f"{found.python}: there is no such Python")
    return found


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    try:
        before, after = checkout(chosen.before, chosen.before_python), checkout(chosen.after, chosen.after_python)
        if before.is_changed():
            raise ValueError(f"{before.root}: has changes that are not committed; what is kept goes by its commit")
        shipped = sorted(path.stem for path in (before.root / "configs").glob("*.yaml"))
        if unknown := set(chosen.recipes or []) - set(shipped):
            raise ValueError(f"{', '.join(sorted(unknown))}: not among {', '.join(shipped)}")
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"compare_checkouts: {error}", file=sys.stderr)
        return 2
    chosen.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(before, after, chosen.work.resolve())
    cases = [
        case for case in bench.cases(chosen.recipes or shipped, chosen.checkpoints) if not (case.to and chosen.no_exports)
    ]
    cases = cases[: chosen.limit]
    return fill(bench, cases) if chosen.before_only else compare(bench, cases, chosen.meant)


if __name__ == "__main__":
    sys.exit(main())
