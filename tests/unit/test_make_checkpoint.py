"""tools/dev/make_checkpoint.py: the bytes are reproducible, the layout is openPangu's, a broken run looks broken."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tools.dev import make_checkpoint as tool

TOOL = Path(__file__).parents[2] / "tools/dev/make_checkpoint.py"


def write(
    output: Path, *, seed: int = 0, dtype: str = "bfloat16", shard_bytes: int = 1 << 30, **changes: object
) -> dict[str, np.ndarray]:
    """Write the tiny shape, some fields changed; returns every tensor of every file."""
    config = tool.make_config("tiny", **changes)
    tool.write_checkpoint(output, config, seed=seed, dtype=dtype, shard_bytes=shard_bytes)
    return {name: tensor for path in sorted(output.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    assert same(one, other)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name
    for name, tensor in write(tmp_path / "seed", seed=1).items():
        assert tensor.tobytes() != one[name].tobytes(), name


def test_the_bytes_are_those_of_every_other_machine(tmp_path):
    write(tmp_path / "out", seed=7, dtype="float32")
    assert hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest() == (
        "d42efae82bacc9861ab65d1b88774fe6fb10777acf16551072d647fbf97482b3"
    )


@pytest.mark.parametrize("slice_values", [1 << 14, 1000])
def test_the_values_do_not_depend_on_how_the_work_is_cut(tmp_path, monkeypatch, slice_values):
    whole = write(tmp_path / "whole")
    monkeypatch.setattr(tool, "SLICE", slice_values)
    monkeypatch.setattr(tool, "CELL", 300)
    assert same(write(tmp_path / "cut"), whole)


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 100_000])
def test_shards_of_any_size_hold_identical_tensors_and_a_true_index(tmp_path, shard_bytes):
    whole = write(tmp_path / "whole")
    assert same(write(tmp_path / "cut", shard_bytes=shard_bytes), whole)
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "cut" / file, "np") as shard:
            assert shard.get_slice(name).get_shape() == list(whole[name].shape)
    assert index["weight_map"].keys() == whole.keys()
    assert not (tmp_path / "whole/model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("shape", "count", "parameters", "q", "kv", "inner", "hidden", "layers"),
    [
        ("1b", 340, 1_155_912_192, 1536, 768, 6144, 1536, 26),
        ("7b", 445, 8_030_887_936, 4096, 1024, 12800, 4096, 34),
    ],
)
def test_the_real_shapes_have_the_tensors_of_the_published_checkpoints(
    shape, count, parameters, q, kv, inner, hidden, layers
):
    tensors = {tensor.name: tensor.shape for tensor in tool.plan_tensors(tool.make_config(shape))}
    assert len(tensors) == count
    assert sum(np.prod(size, dtype=np.int64) for size in tensors.values()) == parameters
    assert ("lm_head.weight" in tensors) == (shape == "7b")
    last = f"model.layers.{layers - 1}."
    assert {name[len(last) :]: size for name, size in tensors.items() if name.startswith(last)} == {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.o_proj.bias": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    others = {"model.embed_tokens.weight": (153376, hidden), "model.norm.weight": (hidden,)}
    assert {name: tensors[name] for name in others} == others


def test_the_7b_shape_is_cut_into_four_files_of_at_most_4_5_gb():
    shards = tool.plan_shards(tool.plan_tensors(tool.make_config("7b")), 2, tool.SHARD_BYTES)
    sizes = [2 * sum(tensor.size for tensor in tensors) for tensors in shards.values()]
    assert len(sizes) == 4
    assert max(sizes) <= 4_500_000_000


def test_the_config_decides_head_biases_and_head_dim(tmp_path):
    tied = write(tmp_path / "tied")
    untied = write(tmp_path / "untied", tie_word_embeddings=False)
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert same({name: untied[name] for name in tied}, tied)
    plain = write(tmp_path / "plain", model_type="llama", attention_bias=False)
    biased = write(tmp_path / "biased", model_type="llama", attention_bias=True)
    assert same(biased, tied)
    assert plain.keys() == {name for name in tied if not name.endswith(".bias")}
    wide = write(tmp_path / "wide", head_dim=24)
    assert wide["model.layers.0.self_attn.q_proj.weight"].shape == (96, 64)
    assert wide["model.layers.0.self_attn.o_proj.weight"].shape == (64, 96)


def test_every_dtype_is_the_float32_draw_rounded_once(tmp_path):
    exact = write(tmp_path / "f32", dtype="float32")
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        rounded = write(tmp_path / name, dtype=name)
        assert same(rounded, {key: tensor.astype(dtype) for key, tensor in exact.items()})
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == name


def test_weights_have_the_promised_spread(tmp_path):
    tensors = write(tmp_path / "out", dtype="float32", num_hidden_layers=1, vocab_size=4096)
    embedding = tensors["model.embed_tokens.weight"]  # 262,144 values: 0.14 % standard error
    assert embedding.std() == pytest.approx(2.5 / 8, rel=0.01)
    assert embedding.mean() == pytest.approx(0, abs=0.003)
    assert tensors["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(1 / np.sqrt(2 * 128), rel=0.03)
    norm = tensors["model.norm.weight"]
    assert norm.min() > 0.3
    assert norm.max() < 1.7
    assert norm.std() > 0.1


@pytest.mark.parametrize("content", ["config.json", "notes.txt", ".model.safetensors.partial"])
def test_a_directory_that_holds_anything_is_refused_in_one_line(tmp_path, capsys, content):
    (tmp_path / content).write_text("mine")
    assert tool.main(["--shape", "tiny", "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == [content]
    assert (tmp_path / content).read_text() == "mine"


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    assert tool.main(["--shape", "7b", "--output", str(tmp_path / "deep/out")]) == 2
    assert "needs 16.06 GB, the disk has 0.01 GB free" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


def test_a_failure_half_way_removes_what_was_written(tmp_path, monkeypatch):
    def stop_at_the_third(path, written, whole_file=tool.whole_file):
        if "00003" in path.name:
            raise OSError(28, "No space left on device")
        return whole_file(path, written)

    monkeypatch.setattr(tool, "whole_file", stop_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "deep/out", shard_bytes=30_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, sent):
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, TOOL, "--shape", "7b", "--layers", "1", "--output", output], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 500
    while not list(output.glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    message = process.communicate(timeout=500)[1]
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert message == "make_checkpoint: interrupted; nothing was left behind\n"
        assert not output.exists()
    else:
        assert process.returncode == -signal.SIGKILL
        assert [path.suffix for path in output.iterdir()] == [".partial"]
