"""pangu-quant evaluate on the embedded checkpoint: the same answers for every batch size and after every interruption."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ms_pangu_quant.cli import main
from ms_pangu_quant.evaluation.samples import read_records
from ms_pangu_quant.kernels.library import library
from tests.conftest import MINI

MODES = "slow_think,auto_think,no_think"


def evaluate(output, *more: str, tasks="mini", limit=10) -> list[str]:
    arguments = ["evaluate", str(MINI), "--tasks", tasks, "--modes", MODES, "--limit", str(limit), "--output", str(output)]
    return [*arguments, "--max-new-tokens", "230", "--sandbox", "rlimits", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert main(evaluate(output, "--batch-size", "30")) == 0
    return output


def test_the_embedded_checkpoint_solves_most_of_its_own_problems_in_each_mode(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert [(entry["mode"], entry["problems"], entry["complete"]) for entry in summary["entries"]] == [
        (mode, 10, True) for mode in MODES.split(",")
    ]
    assert all(entry["passed"] >= 6 for entry in summary["entries"])
    slow, _, none = (entry["lengths"] for entry in summary["entries"])
    assert slow["thought_tokens"]["mean"] > 10
    assert none["thought_tokens"] is None
    provenance = json.loads((whole / "run.json").read_text())
    assert provenance["precision"] == "bfloat16"
    assert len(provenance["checkpoint_sha256"]) == 64


def test_answers_do_not_depend_on_the_batch_size(whole, tmp_path):
    assert main(evaluate(tmp_path, "--batch-size", "3", "--samples-only", limit=4)) == 0
    wanted = {record["prompt_sha256"]: record for _, record in read_records(whole / "samples.jsonl")}
    found = [record for _, record in read_records(tmp_path / "samples.jsonl")]
    assert len(found) == 12
    assert all(record == wanted[record["prompt_sha256"]] for record in found)


def test_a_mode_with_a_smaller_limit_has_the_beginnings_of_the_same_answers(whole, tmp_path):
    """Which is why one run has pass@1 under every smaller budget."""
    arguments = evaluate(tmp_path, "--max-new-tokens", "slow_think=40,auto_think=30,no_think=20", "--samples-only", limit=4)
    assert main(arguments) == 0
    wanted = {record["prompt_sha256"]: record for _, record in read_records(whole / "samples.jsonl")}
    cut = 0
    for _, record in read_records(tmp_path / "samples.jsonl"):
        limit, longer = (
            {"slow_think": 40, "auto_think": 30, "no_think": 20}[record["mode"]],
            wanted[record["prompt_sha256"]],
        )
        assert record["tokens"] == min(limit, longer["tokens"])
        assert longer["completion"].startswith(record["completion"])
        cut += record["finish_reason"] == "length"
    assert cut > 6


@pytest.mark.skipif(library() is None, reason="no C++ compiler, or kernels switched off")
def test_a_run_with_a_rounded_head_says_so_and_is_not_continued_with_the_stored_one(quantized, tmp_path, capsys):
    arguments = ["evaluate", str(quantized("w8a8_rtn")), "--tasks", "mini", "--modes", "no_think", "--limit", "2"]
    arguments += ["--output", str(tmp_path), "--max-new-tokens", "8", "--samples-only"]
    assert main([*arguments, "--head", "int8"]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["head"] == "int8"
    assert [record["settings"]["head"] for _, record in read_records(tmp_path / "samples.jsonl")] == ["int8"] * 2
    assert main(arguments) == 2
    assert "another settings" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(3))
def test_a_run_killed_at_a_random_moment_ends_in_the_same_bytes(whole, tmp_path, turn):
    command = [sys.executable, "-m", "ms_pangu_quant", *evaluate(tmp_path / "killed", "--batch-size", "30")]
    samples = tmp_path / "killed" / "samples.jsonl"
    kills = 0
    while kills < 2:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            lines = samples.read_bytes().count(b"\n") if samples.exists() else 0
            while process.poll() is None and not (samples.exists() and samples.read_bytes().count(b"\n") > lines):
                time.sleep(0.01)
            time.sleep(random.random() * 0.5 if kills else 0)  # the first is killed while it generates
            if process.poll() is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
    assert kills
    assert main(evaluate(tmp_path / "killed", "--batch-size", "30")) == 0
    for name in ("samples.jsonl", "results.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_humaneval_and_mbpp_run_from_end_to_end(tmp_path):
    """The embedded checkpoint knows neither; its score is near 0, and prompts longer than its context are counted."""
    assert main(evaluate(tmp_path, tasks="humaneval,mbpp", limit=20)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(entry["task"], entry["samples"]) for entry in summary["entries"]] == [("humaneval", 20)] * 3 + [
        ("mbpp", 20)
    ] * 3
    assert all(entry["pass@1"]["value"] <= 0.2 for entry in summary["entries"])
