"""A command that is stopped says so in one line, at any moment, and leaves nothing but its unfinished output."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ASSETS, MINI


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize(
    "moment",
    [
        "frameworks are being imported",
        pytest.param("first block is being compiled", marks=pytest.mark.slow),
        "blocks are being done",
    ],
)
def test_a_stop_is_one_line_and_leaves_no_stray_file(number, code, word, moment, tmp_path):
    folder, scratch = tmp_path / "here", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    data = ["--calibration", str(ASSETS / "calibration.jsonl")]
    command = [sys.executable, "-m", "ms_pangu_quant", "quantize", str(MINI), "--recipe", "w8a8", "--output", "out", *data]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"}
    environment["TMPDIR"] = str(scratch)
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    if moment == "blocks are being done":
        lines += [process.stderr.readline() for _ in range(2)]
        assert lines[0].startswith("transforms: ")
        assert lines[1].startswith("block 1/4")
    else:
        # The frameworks' log folder appears right before they are imported, the output right before the first block.
        begun = folder / "out" if moment == "first block is being compiled" else scratch
        deadline = time.monotonic() + 500
        while not (begun.exists() and any(begun.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
    process.send_signal(number)
    lines += process.stderr.readlines()
    assert process.wait(timeout=500) == code
    assert lines[-1] == f"pangu-quant: {word}\n"
    assert all(line.startswith(("transforms: ", "block ")) for line in lines[:-1])
    assert list(scratch.iterdir()) == []
    assert [path.name for path in folder.iterdir()] in ([], ["out"])
    assert not (folder / "out" / "config.json").exists()
