"""The embedded checkpoint writes its own calibration text, and is quantized with it."""

from __future__ import annotations

import json

import pytest

import ms_pangu_quant as pq
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.cli import main
from tests.conftest import MINI

SMALL = {"scheme": "w8a8", "transforms": ["smooth"], "calibration": {"samples": 8}}


class Killed(BaseException):
    pass


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_what_the_model_drew_and_a_killed_run_ends_in_the_same_bytes(tmp_path):
    """Five answers in batches of two; killed behind the third."""
    request = pq.CalibrationRequest(MINI, modes=["no_think"], samples=5, max_new_tokens=40, batch_size=2, seed=3)

    def kill_at_third():
        rows.append(1)
        if len(rows) == 3:
            raise Killed

    whole = pq.calibrate(request, tmp_path / "whole.jsonl")
    rows = []
    with pytest.raises(Killed):
        pq.calibrate(request, tmp_path / "stopped.jsonl", on_row=kill_at_third)
    pq.calibrate(request, tmp_path / "stopped.jsonl", resume=True)
    assert (tmp_path / "stopped.jsonl").read_bytes() == whole.output.read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    tokenizer = Tokenizer(MINI)
    for row in lines(whole.output):
        said = row["token_ids"][row["prompt_tokens"] :]
        assert tokenizer.encode_chat(row["messages"][:-1]) == row["token_ids"][: row["prompt_tokens"]]
        assert tokenizer.decode(said).startswith(row["messages"][-1]["content"])
        assert (said[-1] == tokenizer.eos_id) == (row["finish_reason"] == "eos")


@pytest.mark.slow
def test_quantize_generates_its_calibration_text_once_and_says_so_in_the_report(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(SMALL))
    command = ["quantize", str(MINI), "--recipe", str(recipe), "--calibration"]
    assert main([*command, "auto", "--output", str(tmp_path / "auto")]) == 0
    (made,) = tmp_path.glob("calibration-*.jsonl")
    assert f"the model's own answers -> {made}" in capsys.readouterr().err.replace("\n", "")
    before = made.stat().st_mtime_ns
    pq.quantize(MINI, SMALL, tmp_path / "again", calibration="auto")
    pq.quantize(MINI, SMALL, tmp_path / "given", calibration=made)
    assert made.stat().st_mtime_ns == before
    assert len({(tmp_path / name / "SHA256SUMS").read_bytes() for name in ("auto", "again", "given")}) == 1
    told = json.loads((tmp_path / "auto" / "quantization_report.json").read_text())["calibration"]
    assert told["own_answers"] == json.loads(made.with_suffix(".json").read_text())
    assert told["sequences"] == told["own_answers"]["rows"] == len(lines(made)) == 9
    assert main([*command, "auto", "--output", str(tmp_path / "other"), "--dry-run"]) == 2
    assert "--calibration auto: only a run of quantize makes it" in capsys.readouterr().err.replace("\n", " ")
    made.write_bytes(b"\n")
    assert main([*command, "auto", "--output", str(tmp_path / "other")]) == 2
    assert "was changed since" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()
