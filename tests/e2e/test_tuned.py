"""A search on a checkpoint of two blocks, from the command to files, and killed where it hurts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ms_pangu_quant import api
from ms_pangu_quant.cli import main
from tools.dev import make_checkpoint

TARGET = "kl<=0.01"


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tune")
    make_checkpoint.write_checkpoint(made / "float", make_checkpoint.make_config("tiny"), seed=3, dtype="float32")
    generator = np.random.default_rng(0)
    for name, rows in (("calibration", 60), ("validation", 24)):
        texts = [json.dumps({"token_ids": generator.integers(3, 96, 64).tolist()}) for _ in range(rows)]
        (made / f"{name}.jsonl").write_text("\n".join(texts))
    return made


def request(folder: Path, output: str, **more):
    data = folder / "calibration.jsonl", folder / "validation.jsonl"
    return api.TuneRequest(folder / "float", TARGET, *data, folder / output, device="cpu", **more)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_mixture_is_found_that_quantize_repeats_and_a_killed_search_ends_in_the_same_bytes(folder, capsys):
    words = ["tune", str(folder / "float"), "--target", TARGET, "--device", "cpu", "--output", str(folder / "whole")]
    words += ["--calibration", str(folder / "calibration.jsonl"), "--validation", str(folder / "validation.jsonl")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "final, on 8 texts that chose nothing" in shown.out
    assert "w4a8: sensitivity of every layer" in shown.err
    whole = contents(folder / "whole")
    assert {name.split("/")[0] for name in whole} == {
        "history.jsonl", "recipe.yaml", "tune.html", "sensitivity-w4a8.json", "quantized"
    }  # fmt: skip
    assert "<svg" in whole["tune.html"].decode()

    again = folder / "again"
    api.quantize(folder / "float", folder / "whole/recipe.yaml", again, calibration=folder / "calibration.jsonl")
    assert contents(again) == contents(folder / "whole/quantized")
    bits = [record["bits_per_weight"] for record in records(whole) if record["step"] == "quantize"]
    assert bits[0] > 8 > min(bits) > 4.5

    steps, stops = [], [2, 9, 10]  # tried blocks; a mixture's first block; behind its KL on few texts
    for stop in stops:
        with pytest.raises(Killed):
            api.tune(request(folder, "killed", resume=stop != stops[0]), killing(steps, stop))
    found = api.tune(request(folder, "killed", resume=True), api.TuneProgress(on_done=lambda said, _: steps.append(said)))
    assert found.met
    assert contents(folder / "killed") == whole
    assert len(steps) == len(set(steps)), "a step that had ended was taken again"

    assert main([*words, "--resume"]) == 0  # only read
    assert contents(folder / "whole") == whole


def records(files):
    return [json.loads(line) for line in files["history.jsonl"].splitlines()]


def killing(steps: list[str], stop: int):
    """Behind so many steps in all: at the first part of the next one."""

    def part(done: int, total: int) -> None:
        if len(steps) >= stop:
            raise Killed

    return api.TuneProgress(on_part=part, on_done=lambda said, _: steps.append(said))
