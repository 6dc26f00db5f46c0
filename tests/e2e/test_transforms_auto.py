"""`transforms: auto`: what is decided, how it is told, and that nothing but the decision differs from naming it."""

import dataclasses
import json

import numpy as np
import pytest

from ms_pangu_quant import api
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import begun_with
from ms_pangu_quant.errors import OutputError, RecipeError
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline import trial
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.report import Progress
from ms_pangu_quant.pipeline.trial import chosen_in, try_choices, with_transforms
from ms_pangu_quant.recipe.parse import AUTO, parse_recipe
from tests.conftest import ASSETS, MINI, calibration

UNDECIDED = (
    "scheme: w4a8\ntransforms: auto\nrounding: {gptq: {damping: auto, correct: true, strength: auto, temper: 0.5}}\n"
)
NAMES = [", ".join(names) for names in AUTO]


@pytest.fixture(scope="module")
def reader():
    runtime.start("cpu", "graph")
    return CheckpointReader(MINI)


@pytest.fixture
def undecided():
    return parse_recipe(UNDECIDED, "recipe")


def test_what_was_tried_is_what_a_run_would_do_with_a_block(reader):
    """Block 0 sees the same whether it is tried or quantized: the same weights, so the same error."""
    undecided = parse_recipe("scheme: w4a8\ntransforms: auto\nrounding: {gptq: {damping: auto}}", "recipe")
    data = calibration(9)
    choices = [undecided.decided(name, "") for name in NAMES]
    first = dataclasses.replace(reader.config, num_hidden_layers=1)
    tried = try_choices(_cut(reader, first), choices, data, lambda done, total: None)
    assert tried[0][0] == pytest.approx(_token_error_of_block_0(reader, choices[0], data), rel=1e-6)
    # A rotated checkpoint's embedding is stored in bfloat16 again; what is tried is not.
    assert tried[1][0] == pytest.approx(_token_error_of_block_0(reader, choices[1], data), rel=0.02)


def _cut(reader, config):
    return reader.rewritten(config, {}, lambda block: block)


def _token_error_of_block_0(reader, recipe, data):
    """Through the loop's own stream."""
    from ms_pangu_quant.calibration.stream import Stream
    from ms_pangu_quant.pipeline.block import round_block, transform_block

    rewritten, plan = recipe.rewritten(reader), recipe.plan(reader.config).blocks[0]
    stream, block = Stream(rewritten, data, recipe.observed), rewritten.block(0)
    block, stats = transform_block(block, stream.observe(block, 0, plan), recipe, plan)
    rounded = round_block(block, stats, recipe, plan, stream)
    target = stream._target.states
    stream.advance(rounded)
    held = slice(stream._hidden.fitted, None)
    difference, square = (
        np.square(each[held], dtype=np.float64).sum(axis=1) for each in (stream._hidden.states - target, target)
    )
    return np.sqrt(np.mean(difference / square))


def test_rotated_hidden_states_are_those_of_the_rotated_checkpoint(reader, undecided):
    (rotate,) = undecided.decided(NAMES[1], "").rewrites
    rows = reader.files.read_float32(layout.EMBEDDING)
    rotated = rotate(reader).files.read_float32(layout.EMBEDDING)  # stored in bfloat16
    np.testing.assert_allclose(rotate.states(rows), rotated, rtol=2**-8)


@pytest.mark.slow
def test_deciding_changes_nothing_but_the_transforms(reader, undecided, tmp_path):
    data, said = calibration(9), []
    quantize(reader, undecided, tmp_path / "auto", data=data, progress=Progress(on_decided=said.append))
    (decision,) = said
    named = parse_recipe(UNDECIDED.replace("auto\nr", f"[{chosen_in(decision)}]\nr"), "recipe")
    quantize(reader, named, tmp_path / "named", data=data)
    hashes = [json.loads((tmp_path / name / "quantization_report.json").read_text())["files"] for name in ("auto", "named")]
    assert hashes[0] == hashes[1]
    assert begun_with(tmp_path / "auto")["transforms"] == decision
    assert begun_with(tmp_path / "auto")["recipe"] == begun_with(tmp_path / "named")["recipe"]
    assert "transforms" not in begun_with(tmp_path / "named")


def test_a_run_that_goes_on_keeps_what_was_decided(reader, undecided, tmp_path):
    class Stopped(Exception):
        pass

    def stop(report):
        raise Stopped

    def refuse(done, total):
        raise AssertionError("tried again")

    data, said = calibration(9), []
    with pytest.raises(Stopped):
        quantize(reader, undecided, tmp_path / "out", data=data, progress=Progress(on_block=stop))
    for _ in range(2):  # unfinished, finished
        quantize(
            reader, undecided, tmp_path / "out", data=data, resume=True,
            progress=Progress(on_tried=refuse, on_decided=said.append),
        )  # fmt: skip
    assert said == [begun_with(tmp_path / "out")["transforms"]] * 2


def test_a_directory_of_another_run_decides_nothing(reader, undecided, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "decide", lambda *arguments: f"{NAMES[1]}: because")
    data = dataclasses.replace(calibration(2), held_out=1)
    (tmp_path / "quantization_report.json").write_text(json.dumps({"fingerprint": {"transforms": "something: else"}}))
    assert with_transforms(reader, undecided, data, resumed=tmp_path).decision == f"{NAMES[1]}: because"
    (tmp_path / "quantization_report.json").write_text("{")
    assert with_transforms(reader, undecided, data, resumed=tmp_path).decision == f"{NAMES[1]}: because"


def test_where_there_is_nothing_to_try_on_it_is_said(reader, undecided):
    with pytest.raises(RecipeError, match="needs calibration data"):
        with_transforms(reader, undecided, None)
    with pytest.raises(RecipeError, match=r"name them: \[smooth_search\] or \[rotate, smooth_search\]"):
        api.observe(MINI, 0, ASSETS / "calibration.jsonl", recipe=undecided)


def test_a_directory_that_is_not_empty_is_refused_before_anything_is_tried(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("tried before the output was looked at")

    monkeypatch.setattr(trial, "try_choices", refuse)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        api.quantize(MINI, "w8a8", tmp_path, calibration=ASSETS / "calibration.jsonl")


def test_an_estimate_names_what_will_be_tried_and_has_the_size_of_the_last():
    found = api.estimate(MINI, "w8a8", calibration=ASSETS / "calibration.jsonl")
    named = api.estimate(
        MINI, {"scheme": "w8a8", "transforms": ["rotate", "smooth_search"]}, calibration=ASSETS / "calibration.jsonl"
    )
    assert list(found.tried) == NAMES
    assert found.bytes_after == named.bytes_after
    assert not named.tried
