"""Evaluates the embedded checkpoint for a long time, and sees whether memory grows or anything is left behind."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from scipy.stats import theilslopes

MODEL = Path(__file__).resolve().parents[2] / "ms_pangu_quant/assets/openpangu-mini"
GROWTH = 0.05
EVERY = 2.0  # seconds between two looks


def memory(process: int) -> float:
    """MiB resident."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def marked(mark: str) -> list[int]:
    """Processes that were given this environment variable, or have it from their parent, and live."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def watch(process: subprocess.Popen[bytes], deadline: float) -> list[tuple[float, int]]:
    """(memory, open files) of it at every look until it ends, or is stopped at the deadline."""
    seen = []
    while process.poll() is None:
        time.sleep(EVERY)
        try:
            seen.append((memory(process.pid), files(process.pid)))
        except OSError:
            continue
        if time.monotonic() > deadline:
            process.terminate()
            process.wait(60)
    return seen


def main(
    minutes: Annotated[float, typer.Option(min=0, help="How long.")] = 30.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each of the held-out problems in one process.")] = 24,
) -> None:
    """Evaluate again and again, each time many answers in one process, until the time is over.

    After a tenth of its time, in which it loads and compiles, a process may not grow by over 5 %: neither from its first
    quarter to its last, nor along a line through all that was seen. Fails also if it opens more and more files, or leaves
    a process or a temporary file behind.

    Example: python tools/dev/soak.py --minutes 30
    """
    begun = time.monotonic()
    faults: list[str] = []
    while time.monotonic() - begun < 60 * minutes and not faults:
        with tempfile.TemporaryDirectory(prefix="pangu-soak-") as folder:
            scratch = Path(folder, "tmp")
            scratch.mkdir()
            arguments = ["--tasks", "mini", "--modes", "slow_think,no_think", "--max-new-tokens", "230"]
            arguments += ["--n", str(samples), "--temperature", "0.8", "--output", str(Path(folder, "results"))]
            process = subprocess.Popen(
                [sys.executable, "-m", "ms_pangu_quant", "evaluate", str(MODEL), *arguments],
                env={**os.environ, "TMPDIR": str(scratch), "PANGU_SOAK": folder},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            seen = watch(process, begun + 60 * minutes)
            time.sleep(1)
            faults = [*judge(seen), *left(folder, scratch)]
            if process.returncode not in (0, 143):
                faults.append(f"it ended with exit code {process.returncode}")
    for fault in faults:
        print(f"soak: {fault}", file=sys.stderr)
    raise typer.Exit(1 if faults else 0)


def judge(seen: list[tuple[float, int]]) -> list[str]:
    """What is wrong with one process, and a line for the reader."""
    settled = seen[len(seen) // 10 :]
    part = max(1, len(settled) // 4)
    (first, some), (last, more) = (
        (statistics.median(each[0] for each in quarter), max(each[1] for each in quarter))
        for quarter in (settled[:part], settled[-part:])
    )
    slope = rise([each[0] for each in settled])
    print(
        f"{len(seen) * EVERY / 60:.1f} minutes: {first:.0f} MiB in the first quarter, {last:.0f} MiB in the last "
        f"({last / first - 1:+.1%}), {slope:+.0f} MiB along a line through all; {some} open files, then {more}",
        flush=True,
    )
    faults = []
    if max(last - first, slope) > GROWTH * first:
        faults.append(f"memory grew from {first:.0f} to {last:.0f} MiB, {slope:+.0f} MiB along a line")
    sandbox = 6 * (os.cpu_count() or 1)  # a worker has two servers, and a channel between them
    return faults + ([f"open files grew from {some} to {more}"] if more > some + sandbox else [])


def rise(values: list[float]) -> float:
    """By how much the straight line through them (Theil and Sen's, which a peak does not tilt) rises from first to last."""
    if len(values) < 2:
        return 0.0
    return float(theilslopes(values).slope) * (len(values) - 1)


def left(folder: str, scratch: Path) -> list[str]:
    processes, temporary = marked(f"PANGU_SOAK={folder}"), sorted(path.name for path in scratch.iterdir())
    return [
        *([f"processes {processes} are left"] if processes else []),
        *([f"temporary files are left: {', '.join(temporary)}"] if temporary else []),
    ]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(epilog="Example: python tools/dev/soak.py --minutes 30")(main)
    app()
