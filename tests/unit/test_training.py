"""Checkpoints of MindFormers' training: the fused tensors come apart as the formulas in MindFormers' source say.

That MindFormers' own code makes the same tensors is checked where MindFormers is, in tests/e2e/test_trained.py.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import chunks
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import CheckpointError, OutputError
from ms_pangu_quant.network import merge as merging
from ms_pangu_quant.network.merge import merge

NAMES = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}


def fused(tensors, config, contiguous_qkv=False, interleaved_fc1=True):
    """Hugging Face tensors -> the training's, spelled out row by row."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    found = {NAMES[name]: value for name, value in tensors.items() if name in NAMES}
    for index in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{index}.", f"decoder.layers.{index}."
        found[f"{new}input_layernorm.weight"] = tensors[f"{old}input_layernorm.weight"]
        found[f"{new}pre_mlp_layernorm.weight"] = tensors[f"{old}post_attention_layernorm.weight"]
        found[f"{new}mlp.linear_fc2.weight"] = tensors[f"{old}mlp.down_proj.weight"]
        gate, up = tensors[f"{old}mlp.gate_proj.weight"], tensors[f"{old}mlp.up_proj.weight"]
        rows = [row for pair in zip(gate, up, strict=True) for row in pair] if interleaved_fc1 else [*gate, *up]
        found[f"{new}mlp.linear_fc1.weight"] = np.stack(rows)
        for kind in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{kind}" not in tensors:
                continue
            q, k, v = (tensors[f"{old}self_attn.{each}_proj.{kind}"] for each in "qkv")
            rows = [*q, *k, *v]
            if not contiguous_qkv:
                rows = []
                for group in range(groups):
                    per_group = heads // groups * size
                    rows += [*q[group * per_group : (group + 1) * per_group]]
                    rows += [*k[group * size : (group + 1) * size], *v[group * size : (group + 1) * size]]
            found[f"{new}self_attention.linear_qkv.{kind}"] = np.stack(rows)
            found[f"{new}self_attention.linear_proj.{kind}"] = tensors[f"{old}self_attn.o_proj.{kind}"]
    return found


@pytest.fixture
def trained(make_checkpoint, tmp_path):
    """(Hugging Face directory, the training's directory, its tensors, its config) of a small model."""

    def make(extra=(), layout_keys=(), **shape):
        settings = {"num_attention_heads": 4, "num_key_value_heads": 2, **shape}
        source = make_checkpoint("source", dtype="float32", **settings)
        config = json.loads((source / "config.json").read_text())
        options = dict(layout_keys)
        tensors = fused(
            load_file(source / "model.safetensors"),
            config,
            options.get("use_contiguous_weight_layout_attention", False),
            options.get("use_interleaved_weight_layout_mlp", True),
        )
        folder = tmp_path / "trained"
        folder.mkdir()
        save_file({**tensors, **dict(extra)}, folder / "run-1_2.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **options}))
        return source, folder, tensors, config

    return make


def assert_same(one, other):
    first, second = CheckpointReader(one), CheckpointReader(other)
    assert first.plan.float_shapes(first.config) == second.plan.float_shapes(second.config)
    for name in first.plan.float_shapes(first.config):
        a, b = first.files.entries[name], second.files.entries[name]
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.read(), b.read(), err_msg=name)
        assert b"".join(map(bytes, chunks(a))) == b"".join(map(bytes, chunks(b)))
        for start, stop in ((0, 1), (3, 9), (a.shape[0] - 2, a.shape[0] + 5)):
            np.testing.assert_array_equal(a.read(start, stop), b.read(start, stop), err_msg=f"{name} {start}:{stop}")
    assert first.files.sha256() == second.files.sha256()
    assert first.bytes == second.bytes
    assert first.config == second.config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_tensor_is_the_hugging_face_forms(trained, tied, bias, kv_heads):
    source, folder, _, _ = trained(tie_word_embeddings=tied, bias=bias, num_key_value_heads=kv_heads)
    assert_same(source, folder)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rows_lie_as_config_json_says(trained, contiguous, interleaved):
    keys = {"use_contiguous_weight_layout_attention": contiguous, "use_interleaved_weight_layout_mlp": interleaved}
    source, folder, _, _ = trained(layout_keys=keys)
    assert_same(source, folder)


def test_rows_read_as_the_other_layout_are_other_rows(trained):
    source, folder, _, config = trained(layout_keys={"use_contiguous_weight_layout_attention": True})
    (folder / "config.json").write_text(json.dumps(config))  # the key is lost
    name = "model.layers.0.self_attn.q_proj.weight"
    one, other = (CheckpointReader(each).files.entries[name].read() for each in (source, folder))
    assert not np.array_equal(one, other)


def test_what_the_optimizer_keeps_is_left_out(trained):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    state = {f"{kind}.{name}": np.ones((2, 3), np.float32) for kind in ("adam_m", "adam_v", "accu_grads")}
    scalars = {"global_step": np.array([7], np.int32), "loss_scale": np.array(1.0, np.float32)}
    source, folder, _, _ = trained(extra={**state, **scalars})
    assert_same(source, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("decoder.layers.0.mlp.linear_fc1.weight"),
            r"layers\.0\.mlp\.linear_fc1\.weight is missing",
        ),
        (lambda t: t.pop("decoder.layers.1.self_attention.linear_qkv.bias"), r"linear_qkv\.bias is missing"),
        (
            lambda t: t.update({"decoder.layers.0.self_attention.q_layernorm.weight": np.ones(16, np.float32)}),
            r"q_layernorm\.weight: not a tensor of the network",
        ),
        (
            lambda t: t.update({"decoder.layers.0.mlp.linear_fc2.weight": np.ones((3, 4), np.float32)}),
            r"linear_fc2\.weight: got \[3, 4\], config\.json implies",
        ),
        (
            lambda t: t.update({"decoder.final_layernorm.weight": np.ones(64, np.int8)}),
            "got int8, wanted a floating-point tensor",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(trained, change, said):
    _, folder, tensors, _ = trained()
    change(tensors)
    save_file(tensors, folder / "run-1_2.safetensors")
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(folder)


def test_a_row_layout_that_is_no_boolean_is_refused(trained):
    _, folder, _, config = trained()
    (folder / "config.json").write_text(json.dumps({**config, "use_interleaved_weight_layout_mlp": "no"}))
    with pytest.raises(CheckpointError, match="use_interleaved_weight_layout_mlp is 'no', wanted true or false"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["rank_0/a.safetensors", "rank_1/a.safetensors"], "is sliced, a folder for each rank; .*pangu-quant merge"),
        (["iteration_00000010/a.safetensors", "iteration_00000020/a.safetensors"], "name one: .*/iteration_00000020"),
        (["a.ckpt"], r"holds \.ckpt files.*ckpt_to_safetensors"),
        (["rank_0/a.ckpt"], r"holds \.ckpt files.*ckpt_to_safetensors"),
        (["pytorch_model.bin"], r"pytorch_model\.bin, a pickle"),
        (["a.safetensors"], r"weights but no config\.json.*pangu-quant merge"),
    ],
)
def test_what_training_leaves_behind_and_is_not_read_says_what_to_do(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(tmp_path)


# --- slices with a metadata.json ------------------------------------------------------------------------------------


def sliced(folder, tensors, ranks, axes):
    """The tensors in a file for each rank and the metadata of them, as docs of MindFormers' save_metadata have it."""
    described, storage = {}, {}
    parts = [{} for _ in range(ranks)]
    for name, value in tensors.items():
        axis = axes(name, value)
        described[name] = {"properties": {}, "global_shape": list(value.shape), "chunk": []}
        for rank in range(ranks):
            piece, origin = value, [0] * value.ndim
            if axis is not None:
                size = value.shape[axis] // ranks
                origin[axis] = rank * size
                piece = np.take(value, range(rank * size, (rank + 1) * size), axis)
            parts[rank][name] = np.ascontiguousarray(piece)
            if axis is not None or rank == 0:
                described[name]["chunk"].append({"global_offset": origin, "local_shape": list(piece.shape)})
            held = {"file_name": f"model-{rank:07d}-{ranks:07d}.safetensors", "storage_rank": rank}
            storage.setdefault(str((name, tuple(origin))), []).append(held)
    for rank, part in enumerate(parts):
        save_file(part, folder / f"model-{rank:07d}-{ranks:07d}.safetensors")
    (folder / "metadata.json").write_text(json.dumps({"state_dict_metadata": described, "storage_data": storage}))


def tensor_parallel(name, value):
    if value.ndim == 1:
        return 0 if "linear_qkv" in name else None
    return 1 if "linear_proj" in name or "linear_fc2" in name else 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_slices_with_their_metadata_are_the_whole_tensors(trained, ranks):
    source, folder, tensors, _ = trained(tie_word_embeddings=False)
    (folder / "run-1_2.safetensors").unlink()
    sliced(folder, tensors, ranks, tensor_parallel)
    assert_same(source, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m["state_dict_metadata"]["output_layer.weight"]["chunk"].pop(),
            "the slices of output_layer",
        ),
        (
            lambda m: m["state_dict_metadata"]["output_layer.weight"].update(global_shape=[512, 64]),
            "the slices of output_layer",
        ),
        (lambda m: m["storage_data"].popitem(), "not as MindFormers writes it"),
        (
            lambda m: next(iter(m["storage_data"].values()))[0].update(file_name="../x.safetensors"),
            "which is not a file beside it",
        ),
        (lambda m: m.update(state_dict_metadata={}), "names no tensor"),
    ],
)
def test_metadata_that_does_not_fit_the_files_is_refused(trained, change, said):
    _, folder, tensors, _ = trained(tie_word_embeddings=False)
    (folder / "run-1_2.safetensors").unlink()
    sliced(folder, tensors, 2, tensor_parallel)
    metadata = json.loads((folder / "metadata.json").read_text())
    change(metadata)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(folder)


def test_the_table_of_names_covers_every_tensor_once(trained):
    source, folder, tensors, _ = trained(tie_word_embeddings=False)
    reader = CheckpointReader(folder)
    assert (
        set(reader.files.entries)
        == set(load_file(source / "model.safetensors"))
        == set(reader.plan.float_shapes(reader.config))
    )
    assert sum(entry.nbytes for entry in reader.files.entries.values()) == sum(value.nbytes for value in tensors.values())
    assert layout.EMBEDDING in reader.files.entries


# --- merge ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["absent", "nested/deep", "there"])
def output(request, tmp_path):
    """What merge is told to write; "there" is an empty folder of the user's, which stays."""
    (tmp_path / "there").mkdir()
    return tmp_path / request.param


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("fault", ["no config.json", "no rank_0", "no weights", "a tensor is missing"])
def test_a_merge_that_is_refused_leaves_nothing(fault, output, trained, tmp_path):
    source, folder, tensors, _ = trained()
    strategy = None
    if fault == "no config.json":
        (folder / "config.json").unlink()
    elif fault == "no rank_0":
        strategy = folder
    else:
        for file in folder.glob("*.safetensors"):
            file.unlink()
    if fault == "a tensor is missing":
        save_file({name: value for name, value in tensors.items() if "linear_fc2" not in name}, folder / "a.safetensors")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError):
        merge(folder, output, strategy=strategy)
    assert tree(tmp_path) == before
    assert merge(source, output) > 0  # the folder can be used


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("error", [OutputError("disk full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_merge_that_fails_while_it_writes_leaves_nothing(at, error, output, trained, tmp_path, monkeypatch):
    """At any of its writes: a model of two blocks has three files of tensors, an index and a config.json."""
    source, *_ = trained()
    calls = []

    def failing(name):
        real = getattr(merging, name)

        def write(*arguments):
            calls.append(name)
            if len(calls) > at:
                raise error
            return real(*arguments)

        monkeypatch.setattr(merging, name, write)

    for name in ("write_safetensors", "carry_over", "write_json"):
        failing(name)
    before = tree(tmp_path)
    with pytest.raises(type(error)):
        merge(source, output)
    assert len(calls) == at + 1
    assert tree(tmp_path) == before


def test_a_merge_takes_no_file_and_no_folder_with_something_in_it(trained, tmp_path):
    source, *_ = trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    before = tree(tmp_path)
    for name, said in [("full", "is not empty"), ("full/mine", "cannot write here"), ("full/mine/x", "cannot write here")]:
        with pytest.raises(OutputError, match=said):
            merge(source, tmp_path / name)
        assert tree(tmp_path) == before
