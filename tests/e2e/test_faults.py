"""Faults from outside, with real processes: killed, short of memory, the output taken away, other seeds and threads."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ms_pangu_quant.evaluation.samples import read_records
from tests.conftest import ASSETS, MINI

KILLS = 30
DATA = ["--calibration", str(ASSETS / "calibration.jsonl")]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ms_pangu_quant", *map(str, arguments)]


def run(arguments: Sequence[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"}
    return subprocess.run(arguments, cwd=folder, env=environment | changes, capture_output=True, text=True, timeout=1500)


def contents(folder: Path) -> dict[str, bytes]:
    """Without what a run says of its own time and place."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def evaluate(output: Path, *more: str) -> list[str]:
    modes = ("--modes", "slow_think,no_think", "--limit", "10", "--max-new-tokens", "230")
    return command("evaluate", MINI, "--tasks", "mini", *modes, "--output", output, "--sandbox", "rlimits", *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A quantized checkpoint and a file of samples to begin from."""
    folder = tmp_path_factory.mktemp("place")
    assert run(command("quantize", MINI, "--recipe", "w8a8", "--output", "w8a8", *DATA), folder).returncode == 0
    assert run(evaluate(folder / "answers", "--samples-only"), folder).returncode == 0
    return folder


def scoring(place: Path, output: Path) -> list[str]:
    samples = ("--samples", place / "answers/samples.jsonl", "--output", output)
    return command("evaluate", "--score-only", "--tasks", "mini", "--sandbox", "rlimits", *samples)


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "quantize": lambda place, output: command("quantize", MINI, "--recipe", "w8a8", "--output", output, "--resume", *DATA),
    "generation": lambda place, output: evaluate(output, "--samples-only"),
    "scoring": scoring,
    "export": lambda place, output: command("export", place / "w8a8", "--format", "ascend", "--output", output, "--resume"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_thirty_random_moments_and_resumed_it_ends_in_the_same_bytes(name, place, tmp_path):
    chance = random.Random(name)
    whole, output = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert run(COMMANDS[name](place, whole), tmp_path).returncode == 0
    duration, kills = time.monotonic() - began, 0
    while kills < KILLS:
        with subprocess.Popen(
            COMMANDS[name](place, output), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                code = process.wait(timeout=chance.uniform(0, duration))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
                continue
        assert code == 0
        assert contents(output) == contents(whole)
        shutil.rmtree(output)
    result = run(COMMANDS[name](place, output), tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(output) == contents(whole)
    for journal in output.glob("*.jsonl"):
        keys = [(record["task_id"], record["sample_id"], record["mode"]) for _, record in read_records(journal)]
        assert len(set(keys)) == len(keys) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "a stray file"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8_g128"])
def test_threads_and_hash_seeds_change_no_byte(recipe, tmp_path):
    wanted = None
    for threads, seed in (("1", "0"), ("2", "1"), ("2", "2026")):
        output = tmp_path / f"{threads}-{seed}"
        environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        result = run(command("quantize", MINI, "--recipe", recipe, "--output", output, *DATA), tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        wanted = wanted or contents(output)
        assert contents(output) == wanted


@pytest.mark.parametrize("limit", [1 << 30, 2 << 30])
def test_too_little_address_space_is_one_line(limit, tmp_path):
    arguments = command("generate", MINI, "--prompt", "hello")
    result = subprocess.run(
        arguments,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"pangu-quant: error: address space is limited to {limit / 2**30:.1f} GiB")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3.0, 3.1, 3.2, 3.3, 3.4, 3.6, 3.8, 4.0, 5.0])
def test_any_address_space_is_enough_or_refused_in_one_line(limit, tmp_path):
    """None in which MindSpore hangs: what a model needs is asked for before it is made."""
    size = int(limit * 2**30)
    result = subprocess.run(
        command("generate", MINI, "--prompt", "hello", "--max-new-tokens", "20"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )
    assert result.returncode in (0, 2), result.stderr
    if result.returncode == 2:
        assert result.stderr.startswith(f"pangu-quant: error: address space is limited to {limit:.1f} GiB"), result.stderr
        assert result.stderr.count("\n") == 1
    else:
        assert limit > 3.0


@pytest.mark.slow
def test_an_output_that_is_removed_while_it_is_written_is_one_line(tmp_path):
    output = tmp_path / "gone"
    arguments = command("quantize", MINI, "--recipe", "w8a8", "--output", output, *DATA)
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not (output / "model-00001-of-00005.safetensors").exists() and process.poll() is None:
            time.sleep(0.01)
        shutil.rmtree(output)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 2
    assert "cannot write" in lines[-1]
    assert not any("Traceback" in line for line in lines)
