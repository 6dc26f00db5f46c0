"""evaluation/provenance.py: what a run records of its checkpoint, in whatever format that is stored."""

from __future__ import annotations

import shutil

import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import REPORT_FILE
from ms_pangu_quant.evaluation.provenance import of_checkpoint
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe


@pytest.fixture(scope="module")
def float_checkpoint(tmp_path_factory, checkpoint_tool):
    folder = tmp_path_factory.mktemp("provenance") / "float"
    config = checkpoint_tool.make_config("tiny", layers=2)
    checkpoint_tool.write_checkpoint(folder, config, seed=0, dtype="bfloat16", shard_bytes=10**9)
    return folder


@pytest.fixture(params=FORMATS)
def stored_as(request):
    return FORMATS[request.param]


@pytest.fixture
def written(float_checkpoint, stored_as, tmp_path):
    recipe = load_recipe(find_recipe("w8a8_rtn"))
    quantize(CheckpointReader(float_checkpoint), recipe, tmp_path / "quantized", stored_as=stored_as)
    return tmp_path / "quantized"


def test_the_recipe_and_the_errors_of_the_blocks_are_found_in_every_format(written):
    recorded = of_checkpoint(written, "cpu")["recipe"]
    assert recorded["recipe"]["text"] == find_recipe("w8a8_rtn").read_text(encoding="utf-8")
    assert len(recorded["blocks"]) == 2
    assert all(0 < error < 0.1 for block in recorded["blocks"] for error in block["weight_error"].values())


def test_they_are_those_of_the_run_that_an_export_was_made_from(written, stored_as, tmp_path):
    for name, other in FORMATS.items():
        if other is not stored_as:
            export(QuantizedReader(written), other, tmp_path / name)
            assert of_checkpoint(tmp_path / name, "cpu")["recipe"] == of_checkpoint(written, "cpu")["recipe"]


def test_a_directory_without_a_report_has_none(written):
    (written / REPORT_FILE).unlink()
    assert of_checkpoint(written, "cpu")["recipe"] is None


def test_a_float_checkpoint_has_none_whatever_lies_beside_it(float_checkpoint, written, tmp_path):
    copy = shutil.copytree(float_checkpoint, tmp_path / "float")
    assert of_checkpoint(copy, "cpu")["recipe"] is None
    shutil.copyfile(written / REPORT_FILE, copy / REPORT_FILE)
    assert of_checkpoint(copy, "cpu")["recipe"] is None
