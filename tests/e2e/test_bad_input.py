"""Every way an input can be wrong ends in one line that names it, exit code 2, and no directory that looks complete."""

import json
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.cli import main
from tests.conftest import ASSETS, MINI


@pytest.fixture
def checkpoint(tmp_path):
    """A writable copy of the embedded checkpoint."""
    return shutil.copytree(MINI, tmp_path / "checkpoint", copy_function=shutil.copyfile)


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(checkpoint, change):
    """change(dict of name -> array) in place; arrays are float32 afterwards."""
    path = checkpoint / "model.safetensors"
    tensors = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def fails(capsys, *arguments):
    """Run a command that must fail cleanly; returns its one line."""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip() and not line.startswith("block ")]
    assert code == 2, printed.err
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0]


def quantize_fails(capsys, checkpoint, output, *, recipe="w8a8_rtn"):
    line = fails(capsys, "quantize", checkpoint, "--recipe", recipe, "--output", output)
    assert not (output / "config.json").exists()
    return line


def test_a_missing_directory_is_named(tmp_path, capsys):
    assert "no such directory" in quantize_fails(capsys, tmp_path / "nowhere", tmp_path / "out")


TENSOR_FAULTS = {
    "model.layers.2.mlp.up_proj.weight is missing": lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
    "model.layers.1.self_attn.o_proj.bias is missing": lambda t: t.pop("model.layers.1.self_attn.o_proj.bias"),
    "model.layers.0.extra.weight": lambda t: t.update({"model.layers.0.extra.weight": np.zeros(3, np.float32)}),
    "got [700, 256], config.json implies [768, 256]": lambda t: t.update(
        {"model.layers.3.mlp.gate_proj.weight": np.zeros((700, 256), np.float32)}
    ),
    "quantized already?": lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((768, 256), np.int8)}),
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_a_wrong_tensor_is_named(message, checkpoint, tmp_path, capsys):
    edit_tensors(checkpoint, TENSOR_FAULTS[message])
    assert message in quantize_fails(capsys, checkpoint, tmp_path / "out")


CONFIG_FAULTS = {
    "num_hidden_layers": ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight is missing"),
    "fewer layers": ({"num_hidden_layers": 3}, "model.layers.3"),
    "hidden size": ({"hidden_size": 128}, "config.json implies"),
    "R-7B": ({"param_sink_number": 128}, "openPangu-R-7B"),
    "VL": ({"vision_config": {"depth": 26}}, "openPangu-VL"),
    "MoE": ({"num_experts": 64}, "openPangu-Pro-MoE"),
    "another model": ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
    "rope scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
    "not a number": ({"hidden_size": "many"}, "hidden_size is 'many'"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_of_another_model_is_named(fault, checkpoint, tmp_path, capsys):
    changes, message = CONFIG_FAULTS[fault]
    edit_config(checkpoint, **changes)
    assert message in quantize_fails(capsys, checkpoint, tmp_path / "out")


def test_a_truncated_file_is_named(checkpoint, tmp_path, capsys):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path}: damaged" in quantize_fails(capsys, checkpoint, tmp_path / "out").replace("\n", "")


def test_an_index_that_names_an_absent_shard_is_named(checkpoint, tmp_path, capsys):
    names = list(load_file(checkpoint / "model.safetensors"))
    (checkpoint / "model.safetensors").rename(checkpoint / "whole.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    line = quantize_fails(capsys, checkpoint, tmp_path / "out")
    assert "model-00002-of-00002.safetensors, which is not in the directory" in line
    assert "delete the index if whole.safetensors is the model" in line


def test_what_lies_beside_the_weights_changes_nothing_and_is_named_in_a_line(checkpoint, tmp_path, capsys):
    """As do names with a prefix, buffers, and a byte order mark."""
    path = checkpoint / "model.safetensors"
    tensors = {f"_orig_mod.{name}": value for name, value in load_file(path).items()}
    inverse = 10000.0 ** -(np.arange(32, dtype=np.float32) / 32)
    save_file({**tensors, "_orig_mod.model.rotary_emb.inv_freq": inverse}, path)
    (checkpoint / "._model.safetensors").write_bytes(b"Mac OS X")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    config = checkpoint / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    for source, name in ((MINI, "plain"), (checkpoint, "odd")):
        assert main(["quantize", str(source), "--recipe", "w8a8_rtn", "--output", str(tmp_path / name)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "what is not: adapter_model.safetensors" in notes[0]
    assert "_orig_mod. is left out" in notes[1]
    assert (tmp_path / "odd" / "SHA256SUMS").read_bytes() == (tmp_path / "plain" / "SHA256SUMS").read_bytes()


def test_a_quantized_directory_is_not_quantized_again(quantized, tmp_path, capsys):
    assert "is quantized already" in quantize_fails(capsys, quantized("w8a8"), tmp_path / "out")


def test_an_output_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write here" in quantize_fails(capsys, MINI, tmp_path / "file" / "out")


def test_an_output_with_files_in_it_is_not_touched(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "is not empty" in quantize_fails(capsys, MINI, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_complete(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        line = quantize_fails(capsys, MINI, disk / "out")
        assert "No space left on device" in line
        assert "--resume" in line
        assert not list((disk / "out").glob(".*.safetensors.partial"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_recipe_that_needs_data_says_so_before_anything_is_written(tmp_path, capsys):
    assert "needs calibration data" in quantize_fails(capsys, MINI, tmp_path / "out", recipe="w8a8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "rows"), [("w4a8_g128", 1), ("w4a8", 2), ("w4a8_mixed", 8), ("w4a8_online", 8)], ids=str
)
def test_choices_that_need_held_out_rows_are_refused_before_anything_is_written(recipe, rows, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"token_ids": [1, 273]}\n' * rows)
    said = f"{data}: {rows} row{'s' * (rows > 1)}, {2 * rows} tokens, 0 held out; "
    for more in ([], ["--dry-run"]):
        words = ["quantize", MINI, "--recipe", recipe, "--calibration", data, "--output", tmp_path / "out", *more]
        line = fails(capsys, *words)
        assert said in line
        assert "wants 128 rows and 16 that are held out, of up to 512 tokens: give 9 rows or more" in line
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_fewer_rows_than_the_recipe_wants_are_said_in_a_dry_run_and_in_the_report(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    said = "1 row, 2 tokens, 0 held out; the recipe wants 128 rows and 16 that are held out, of up to 512 tokens"
    words = ["quantize", str(MINI), "--recipe", "w8a8_rtn", "--calibration", str(data), "--output", str(tmp_path / "out")]
    for more in (["--dry-run"], []):
        assert main([*words, *more]) == 0
        assert capsys.readouterr().err.splitlines()[0] == f"calibration: {said}"
    report = tmp_path / "out" / "quantization_report.json"
    found = json.loads(report.read_bytes())["calibration"]
    assert (found["sequences"], found["tokens"], found["wanted"], found["shortfall"]) == (1, 2, 144, said)
    report.write_bytes(b"\xef\xbb\xbf" + report.read_bytes())
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_a_comparison_of_a_broken_model_is_json_and_one_text_has_no_standard_error(tmp_path, capsys, checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * 5000}))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "def double(x):"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert main(["compare", str(MINI), str(checkpoint), "--data", str(data), "--json"]) == 0
        found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert main(["compare", str(MINI), str(checkpoint), "--data", str(data)]) == 0
    assert found["kl_se"] is found["ppl_quantized"] is None
    assert found["kl_mean"] > 1
    printed = capsys.readouterr().out
    assert "one text has none" in printed
    assert "nan" not in printed
    assert "perplexity       -" in printed


def test_an_unknown_recipe_gets_a_suggestion(tmp_path, capsys):
    assert "did you mean 'w4a8_g128'" in quantize_fails(capsys, MINI, tmp_path / "out", recipe="w4a8_g182")


def test_comparing_two_different_models_is_refused(tmp_path, capsys, write_checkpoint):
    from tests.conftest import golden_checkpoint

    other = golden_checkpoint("pangu_gqa2_tied", tmp_path, write_checkpoint)
    assert "not the same model" in fails(
        capsys, "compare", MINI, other, "--data", ASSETS / "validation.jsonl", "--limit", 1
    )


def test_generating_without_a_tokenizer_says_what_is_missing(tmp_path, capsys, write_checkpoint):
    from tests.conftest import golden_checkpoint

    other = golden_checkpoint("pangu_gqa2_tied", tmp_path, write_checkpoint)
    assert "tokenizer.model" in fails(capsys, "generate", other, "--prompt", "hello")


def test_a_wrong_thinking_mode_is_named(capsys):
    assert "thinking" in fails(capsys, "generate", MINI, "--prompt", "hello", "--mode", "deep_think").lower()


@pytest.mark.parametrize("arguments", [["quantize"], ["quantise"], ["inspect", str(MINI), "--jsn"]])
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
