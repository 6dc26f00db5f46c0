"""tools/ascend/acceptance.sh: its options, and (slow) a rehearsal on the CPU with a step that fails and is repeated."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from tests.conftest import MINI, ROOT
from tools.ascend import logits as tool

SCRIPT = ROOT / "tools/ascend/acceptance.sh"


def run(*options):
    return subprocess.run([str(SCRIPT), *map(str, options)], capture_output=True, text=True)


def test_help_lists_every_option_that_is_taken():
    shown = run("--help")
    assert shown.returncode == 0
    taken = {word for word in SCRIPT.read_text().split("case $1 in")[1].split("esac")[0].split() if word.startswith("--")}
    assert {word.rstrip(")") for word in taken} <= set(shown.stdout.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "gpu"], "--device is 'gpu', wanted ascend or cpu"),
        (["--nonsense"], "unknown option --nonsense"),
        (["--model"], "--model needs a value"),
        (["--model", "/nowhere"], "has no config.json"),
        (["--calibration", "/nowhere"], "is not a file"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_run(options, said):
    done = run(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_the_difference_of_logits_is_the_kl_of_their_distributions(tmp_path):
    one = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], np.float32)) + 3  # a shift changes no distribution
    for name, logits in (("one", one), ("other", other)):
        np.savez(tmp_path / f"{name}.npz", tokens0=np.arange(2), logits0=logits)
    found = tool.difference(tmp_path / "one.npz", tmp_path / "other.npz")
    assert found["kl_mean"] == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-5)
    assert found["kl_max"] == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert (found["tokens"], found["top1_agreement"]) == (2, 0.5)
    np.savez(tmp_path / "third.npz", tokens0=np.arange(1, 3), logits0=one)
    with pytest.raises(ValueError, match="other tokens"):
        tool.difference(tmp_path / "one.npz", tmp_path / "third.npz")


@pytest.mark.slow
def test_a_rehearsal_leaves_a_report_and_a_second_call_repeats_only_what_failed(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("{}\n")  # no text: what compares logits fails
    options = ["--device", "cpu", "--recipes", "w8a8_rtn", "--batch-sizes", "1", "--prompt-lens", "32", "--limit", "1"]
    options += ["--max-new-tokens", "8", "--data", data, "--output", tmp_path / "out"]
    first = run(*options)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "w8a8_rtn-bench" in first.stdout
    lines = {line.split()[0]: line for line in first.stdout.splitlines() if line.startswith(("float", "w8a8_rtn"))}
    failed = {name for name, line in lines.items() if "FAILED" in line}
    assert failed == {f"{name}-logits-{device}" for name in ("float", "w8a8_rtn") for device in ("cpu", "device")}
    assert "not run: float-logits-cpu has not passed" in lines["float-logits-compared"]
    report = (tmp_path / "out/report.md").read_text()
    assert "A rehearsal on the CPU" in report
    assert "w8a8_rtn-quantize | passed" in report
    shutil.copyfile(ROOT / "ms_pangu_quant/assets/validation.jsonl", data)
    second = run(*options)
    assert second.returncode == 0, second.stdout
    assert re.search(r"w8a8_rtn-quantize +passed before", second.stdout)
    compared = json.loads((tmp_path / "out/logits/w8a8_rtn.json").read_text())
    assert (compared["kl_mean"], compared["top1_agreement"], compared["passed"]) == (0.0, 1.0, True)
    assert (tmp_path / "out/report.tar.gz").stat().st_size > 1000
    assert run(*options, "--kl", "1").returncode == 2  # other options: another directory
    assert MINI.exists()
