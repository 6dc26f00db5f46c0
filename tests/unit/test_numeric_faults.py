"""Numbers that are none, and inputs with nothing in them: a named error, or a bounded effect that can be stated."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats.reader import QuantizedReader

BLOCK = "model.layers.0."
BAD = (np.nan, -np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_one_bad_value_anywhere_is_found_and_the_largest_finite_ones_are_not(dtype, bad, tmp_path):
    chance = np.random.default_rng(0)
    values = chance.integers(-9, 9, (257, 33)).astype(dtype)
    values[3, 4], values[5, 6] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
    save_file({"w": values, "codes": np.full(7, -1, np.int8)}, tmp_path / "x.safetensors")
    assert TensorFiles(tmp_path).sha256()
    values[chance.integers(257), chance.integers(33)] = bad
    save_file({"w": values}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="w has a NaN or an infinity"):
        TensorFiles(tmp_path).sha256()


@pytest.mark.parametrize(
    "name",
    [f"{BLOCK}mlp.up_proj.weight", f"{BLOCK}self_attn.q_proj.bias", f"{BLOCK}input_layernorm.weight", "model.norm.weight"],
)
@pytest.mark.parametrize("bad", BAD[::2])
def test_a_bad_weight_ends_a_run_before_anything_is_written(name, bad, make_checkpoint, edit_tensors, tmp_path, capsys):
    """Rounding without data looks at nothing else: NaN became the code of a channel whose scale was 1."""
    directory = make_checkpoint()

    def spoil(tensors):
        tensors[name].reshape(-1)[1] = bad

    edit_tensors(directory, spoil)
    assert main(["quantize", str(directory), "--recipe", "w8a8_rtn", "--output", str(tmp_path / "out")]) == 2
    assert f"{name} has a NaN or an infinity" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_channels_of_zeros_are_stored_as_zeros_with_finite_scales(make_checkpoint, edit_tensors, tmp_path):
    directory = make_checkpoint()

    def clear(tensors):
        tensors[f"{BLOCK}mlp.up_proj.weight"][2] = 0
        tensors[f"{BLOCK}mlp.down_proj.weight"][:] = 0
        tensors[f"{BLOCK}self_attn.v_proj.weight"][:8] = 0

    edit_tensors(directory, clear)
    assert main(["quantize", str(directory), "--recipe", "w4a8_rtn", "--output", str(tmp_path / "out")]) == 0
    floats, linears = CheckpointReader(directory).block(0), QuantizedReader(tmp_path / "out").rounded_block(0).linears
    assert len(linears) == 7
    for site, linear in linears.items():
        weight = floats[f"{site}.weight"]
        assert np.isfinite(linear.weight.scale).all()
        assert (linear.weight.dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"token_ids": [3]}', "got 1 token, wanted 2 or more"),
        ('{"token_ids": []}', "wanted a list that is not empty"),
        (json.dumps({"token_ids": [1] * 3 + [10**9]}), "wanted integers from 0"),
    ],
)
def test_calibration_data_with_nothing_in_it_is_named(content, message, make_checkpoint, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    arguments = ["quantize", str(make_checkpoint()), "--recipe", "w8a8", "--calibration", str(data)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
