"""A search on a checkpoint of two blocks, from the command to files, and killed where it hurts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ms_pangu_quant import api
from ms_pangu_quant.cli import main
from ms_pangu_quant.report.inspection import inspection
from tools.dev import make_checkpoint


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


def words_of(folder: Path, target: str, output: str) -> list[str]:
    words = ["tune", str(folder / "float"), "--target", target, "--device", "cpu", "--output", str(folder / output)]
    return [*words, "--calibration", str(folder / "calibration.jsonl"), "--validation", str(folder / "validation.jsonl")]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def quantized(files: dict[str, bytes]) -> list[float]:
    """Bits per weight of what was quantized, in its order."""
    records = [json.loads(line) for line in files["history.jsonl"].splitlines()]
    return [record["bits_per_weight"] for record in records if record["step"] == "quantize"]


@pytest.mark.slow
def test_a_killed_search_ends_in_the_bytes_of_an_undisturbed_one_and_takes_no_step_twice(folder, capsys):
    assert main(words_of(folder, "kl<=0.3", "whole")) == 0
    assert "final, on 8 texts that chose nothing" in capsys.readouterr().out
    whole = contents(folder / "whole")
    assert {name.split("/")[0] for name in whole} == {"history.jsonl", "recipe.yaml", "tune.html", "quantized"}
    assert "<svg" in whole["tune.html"].decode()
    assert quantized(whole)[0] > 8 > 4.5 > quantized(whole)[-1]

    steps = []

    def part(done: int, total: int) -> None:
        if len(steps) == 6:  # behind three schemes' blocks, w8a8 and its KL on few texts and more: w4a8's first block
            raise Killed

    def search(progress: api.TuneProgress, *, resume: bool) -> api.TuneResult:
        data = folder / "calibration.jsonl", folder / "validation.jsonl"
        asked = api.TuneRequest(folder / "float", "kl<=0.3", *data, folder / "killed", device="cpu", resume=resume)
        return api.tune(asked, replace(progress, on_done=lambda said, seconds: steps.append(said)))

    with pytest.raises(Killed):
        search(api.TuneProgress(on_part=part), resume=False)
    assert search(api.TuneProgress(), resume=True).met
    assert contents(folder / "killed") == whole
    assert len(steps) == len(set(steps))

    assert main([*words_of(folder, "kl<=0.3", "whole"), "--resume"]) == 0  # only read
    assert contents(folder / "whole") == whole
    assert main([*words_of(folder, "kl<=0.2", "whole"), "--resume"]) == 2
    assert "begun with another target" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_mixture_is_found_where_no_scheme_is_small_enough_and_quantize_repeats_it(folder):
    assert main(words_of(folder, "kl<=0.01", "mixed")) == 0
    assert min(quantized(contents(folder / "mixed"))) > 4.5
    assert 4.5 < inspection(folder / "mixed/quantized")["bits_per_weight"] < 8
    again = folder / "again"
    api.quantize(folder / "float", folder / "mixed/recipe.yaml", again, calibration=folder / "calibration.jsonl")
    assert contents(again) == contents(folder / "mixed/quantized")
