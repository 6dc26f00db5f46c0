"""report/inspection.py: what a directory's report says is shown if it is one, and refused in a line if not."""

import json

import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import REPORT_FILE
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.report.inspection import inspection


@pytest.fixture
def directory(make_checkpoint, tmp_path):
    quantize(CheckpointReader(make_checkpoint()), load_recipe(find_recipe("w8a8_rtn")), tmp_path / "quantized")
    return tmp_path / "quantized"


def test_a_report_with_a_byte_order_mark_is_the_report(directory):
    before, path = inspection(directory), directory / REPORT_FILE
    assert any(layer["weight_error"] for layer in before["layers"])
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(json.dumps(json.loads(path.read_bytes())).encode(encoding))
        assert inspection(directory) == before


def test_without_a_report_the_layers_are_shown_all_the_same(directory):
    (directory / REPORT_FILE).unlink()
    found = inspection(directory)
    assert {layer["weight_error"] for layer in found["layers"]} == {None}
    assert (found["output_error"], found["bytes_before"]) == ([], None)


DAMAGED = {
    "cut": '{"blocks": [',
    "a list": "[]",
    "blocks": {"blocks": {"0": {}}},
    "a block": {"blocks": [7]},
    "no errors": {"blocks": [{"output_error": 0.1}]},
    "errors": {"blocks": [{"weight_error": [0.1]}]},
    "an error": {"blocks": [{"weight_error": {"self_attn.q_proj": "much"}}]},
    "a NaN": {"blocks": [{"weight_error": {"self_attn.q_proj": float("nan")}}]},
    "an output error": {"blocks": [{"weight_error": {}, "output_error": []}]},
    "bytes": {"blocks": [], "bytes_before": "many"},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_report_is_refused_by_name(directory, kind):
    content = DAMAGED[kind]
    (directory / REPORT_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=f"^{directory / REPORT_FILE}: "):
        inspection(directory)
