"""The demo from an installed wheel, in an empty folder: what a newcomer gets, without the repository.

The wheel is installed into a fresh environment by itself; what it requires is looked up in this environment, by a .pth
line, since a whole installation takes minutes and gigabytes. `pip check` says whether the two fit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pangu_quant(tmp_path_factory) -> Path:
    """The command in the fresh environment."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", folder / "source"], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source"]
    subprocess.run(wheel, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    (built,) = folder.glob("*.whl")
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", built], check=True)
    here = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    Path(target, "requirements.pth").write_text("\n".join(here) + "\n")
    return folder / "venv/bin/pangu-quant"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Without what would let the repository be imported."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LOCAL_DEFAULT_PATH")}


def test_the_wheel_is_what_runs_and_its_requirements_are_met(pangu_quant, environment, tmp_path):
    program = "import ms_pangu_quant, ms_pangu_quant.installation as i; print(ms_pangu_quant.__file__, i.packages())"
    python = pangu_quant.parent / "python"
    done = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(pangu_quant.parents[1]))
    assert "fits=True" in done.stdout
    assert "fits=False" not in done.stdout


def test_the_demo_runs_outside_the_repository_is_stopped_and_goes_on(pangu_quant, environment, tmp_path):
    process = subprocess.Popen(
        [pangu_quant, "demo"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first = tmp_path / "demo_output/w8a8/config.json"
    deadline = time.monotonic() + 1500
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "pangu-quant: interrupted"
    written = first.stat().st_mtime_ns

    again = subprocess.run([pangu_quant, "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "\n# 1 of " not in again.stdout  # it was done
    assert "\n# 2 of " in again.stdout
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["demo_output"]
    output = tmp_path / "demo_output"
    report = (output / "report/report.md").read_text(encoding="utf-8")
    assert all(name in report for name in ("float", "w8a8", "w4a8_g128"))
    comparisons = {path.stem: json.loads(path.read_bytes()) for path in (output / "comparison").iterdir()}
    assert comparisons["w8a8"]["kl_mean"] < comparisons["w4a8_g128"]["kl_mean"] < comparisons["w4a8_g128_rtn"]["kl_mean"]
    table = {line.split()[0]: line.split()[1:] for line in again.stdout.splitlines() if line.startswith(("float ", "w"))}
    assert {"float", *comparisons} <= set(table)
    assert float(table["w4a8_g128"][3]) == pytest.approx(comparisons["w4a8_g128"]["kl_mean"], rel=0.06)
    for mode in ("slow_think", "auto_think", "no_think"):
        assert f"w4a8_g128, {mode}, " in again.stdout
        assert json.loads((output / "answers" / f"{mode}.json").read_bytes())["answer"]
    assert again.stdout.rstrip().endswith("--calibration chats.jsonl --output pangu-7b-w8a8 --dry-run")

    third = subprocess.run([pangu_quant, "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert "was done before" in third.stdout
    assert "$ pangu-quant" not in third.stdout
