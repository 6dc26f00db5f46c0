"""checkpoint/names.py: a state dict with other prefixes, or with buffers in it, is the checkpoint that it was made from."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import INDEX_FILE, CheckpointNote
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe

HEAD_DIM, THETA = 16, 10_000.0
OUTER = ("model.", "")  # what may be there of the usual prefix
WRAPPERS = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.base_model.model.": lambda name: f"_orig_mod.base_model.model.{name}",
    "base_model.model._orig_mod.": lambda name: f"base_model.model._orig_mod.{name}",
    "model.": lambda name: f"model.{name}",
    "policy.": lambda name: f"policy.{name}",
    "_orig_mod of each layer": lambda name: name.replace("mlp.", "_orig_mod.mlp."),
    "_fsdp_wrapped_module of each": lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "none": lambda name: name,
}


def opened(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = CheckpointReader(folder)
    return reader, " ".join(str(each.message) for each in caught if each.category is CheckpointNote)


def rename(folder, change):
    file = folder / "model.safetensors"
    save_file({change(name): value for name, value in load_file(file).items()}, file)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request, make_checkpoint):
    """A checkpoint and the hash of its tensors."""
    folder = make_checkpoint(tie_word_embeddings=request.param, rope_theta=THETA)
    return folder, opened(folder)[0].files.sha256()


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_prefix_is_stripped_and_told(checkpoint, wrapper, outer):
    folder, digest = checkpoint
    rename(folder, lambda name: WRAPPERS[wrapper](outer + name.removeprefix("model.") if name != layout.HEAD else name))
    reader, note = opened(folder)
    assert reader.files.sha256() == digest
    tied = reader.config.tie_word_embeddings
    if (wrapper == "none" and outer) or (wrapper == "model." and not outer and tied):  # as they are
        assert note == ""
    else:
        assert str(folder) in note
        for part in ("_orig_mod.", "module.", "base_model.model.", "policy.", "_fsdp_wrapped_module."):
            assert part not in wrapper or part in note


def test_the_head_may_have_the_prefix_too_or_none(make_checkpoint):
    folder = make_checkpoint(tie_word_embeddings=False)
    digest = opened(folder)[0].files.sha256()
    rename(folder, lambda name: name if name == layout.HEAD else f"llm.{name}")
    assert opened(folder)[0].files.sha256() == digest
    rename(folder, lambda name: "llm.model.lm_head.weight" if name == layout.HEAD else name)
    assert opened(folder)[0].files.sha256() == digest


@pytest.mark.parametrize("prefix", ["other.", "base_model.model."])
def test_a_prefix_of_some_tensors_is_an_error_that_names_one(checkpoint, prefix):
    folder, _ = checkpoint
    rename(folder, lambda name: f"{prefix}{name}" if ".layers.1." in name else name)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.\S* is missing.*; {prefix}model\.layers\.1\.\S* is there"):
        CheckpointReader(folder)


def test_two_tensors_of_one_name_but_for_their_prefixes_are_refused_naming_both(checkpoint):
    folder, _ = checkpoint
    file = folder / "model.safetensors"
    save_file({**load_file(file), "_orig_mod.model.norm.weight": np.ones(64, np.float32)}, file)
    with pytest.raises(CheckpointError) as raised:
        CheckpointReader(folder)
    assert "_orig_mod.model.norm.weight" in str(raised.value)
    assert "are both model.norm.weight without their prefixes" in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.weight",
        "q_proj.base_layer.weight",
        "q_proj.modules_to_save.default.weight",
    ],
)
def test_an_adapter_that_is_not_merged_is_refused_by_name(checkpoint, edit_tensors, name):
    folder, _ = checkpoint
    rename(folder, lambda each: f"base_model.model.{each}")
    whole = f"base_model.model.model.layers.0.self_attn.{name}"
    edit_tensors(folder, lambda tensors: tensors.update({whole: np.ones((4, 64), np.float32)}))
    with pytest.raises(CheckpointError, match=f"{whole}: belongs to an adapter that is not merged"):
        CheckpointReader(folder)


def frequencies(theta=THETA, scale=1.0):
    return (scale * theta ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)


def tables(function, theta=THETA):
    return function(np.outer(np.arange(32), np.tile(frequencies(theta), 2))).astype(np.float32)


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies(),
    "model.layers.1.self_attn.rotary_emb.inv_freq": frequencies().astype(np.float16),
    "model.rotary_emb.inv_freq": frequencies().astype(ml_dtypes.bfloat16),
    "rotary_emb.original_inv_freq": frequencies(),
    "model.layers.0.self_attn.rotary_emb.cos_cached": tables(np.cos)[None, None],
    "model.layers.1.self_attn.rotary_emb.sin_cached": tables(np.sin).astype(ml_dtypes.bfloat16),
    "model.layers.0.self_attn.masked_bias": np.float32(-1e4).reshape(()),
    "model.layers.0.self_attn.bias": np.tril(np.ones((32, 32), np.bool_))[None, None],
    "transformer.h.0.attn.bias": np.tril(np.ones((32, 32), np.uint8))[None, None],
    "model.causal_mask": np.ones((32, 32), np.bool_),
    "model.embeddings.position_ids": np.arange(32)[None],
}


@pytest.mark.parametrize("wrapper", ["none", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("name", [*BUFFERS, None])
def test_buffers_are_left_out(checkpoint, edit_tensors, name, wrapper):
    folder, digest = checkpoint
    edit_tensors(folder, lambda tensors: tensors.update(BUFFERS if name is None else {name: BUFFERS[name]}))
    rename(folder, WRAPPERS[wrapper])
    reader, _ = opened(folder)
    assert reader.files.sha256() == digest
    assert reader.bytes == sum(entry.nbytes for entry in reader.files.entries.values())


CONTRADICTIONS = {
    "another theta": (
        "inv_freq",
        frequencies(500_000.0),
        r"is that of rope_theta 5e\+05, .*config\.json has 10000; correct",
    ),
    "near": ("inv_freq", frequencies(11_000.0), r"is that of rope_theta 1\.1e\+04, "),
    "scaled": ("inv_freq", frequencies(scale=0.25), "nor of another: the rope is scaled, which is not supported"),
    "some scaled": ("inv_freq", np.where(np.arange(8) > 4, 0.125, 1) * frequencies(), "the rope is scaled"),
    "NaN": ("inv_freq", np.full(8, np.nan, np.float32), "nor of another"),
    "zeros": ("inv_freq", np.zeros(8, np.float32), "nor of another"),
    "another width": ("inv_freq", frequencies()[:4], r"got \[4\], .*config\.json implies \[8\]"),
    "cosines": ("cos_cached", tables(np.cos, 500_000.0), "is not the table of rope_theta 10000"),
    "sines": ("sin_cached", tables(np.sin, 500_000.0)[None, None], "is not the table of rope_theta 10000"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_buffer_that_rope_theta_contradicts_is_refused(checkpoint, edit_tensors, kind):
    folder, _ = checkpoint
    name, value, said = CONTRADICTIONS[kind]
    name = f"model.layers.1.self_attn.rotary_emb.{name}"
    edit_tensors(folder, lambda tensors: tensors.update({name: value}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}: .*{said}"):
        CheckpointReader(folder)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0, 1e6, 16e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_frequency_is_compared_to_the_rounding_of_its_type(make_checkpoint, edit_tensors, theta, dtype):
    folder = make_checkpoint(rope_theta=theta)
    values = frequencies(theta).astype(dtype)
    edit_tensors(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": values}))
    assert CheckpointReader(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.bias", (64,)),
        ("model.layers.0.self_attn.rotary_emb.weight", (8,)),
        ("model.inv_freq_net.weight", (8,)),
        ("model.layers.0.mlp.bias", (1, 1, 4, 4)),
        ("score.weight", (2, 64)),
    ],
)
def test_a_stray_tensor_that_is_no_buffer_stays_an_error(checkpoint, edit_tensors, name, shape):
    folder, _ = checkpoint
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))
    with pytest.raises(CheckpointError, match=f"{name}: not a tensor of the model"):
        CheckpointReader(folder)


def test_a_quantized_directory_may_have_buffers_too(make_checkpoint, tmp_path):
    quantize(CheckpointReader(make_checkpoint(rope_theta=THETA)), load_recipe(find_recipe("w8a8_rtn")), tmp_path / "q")
    before = QuantizedReader(tmp_path / "q").files.entries.keys()
    file = min((tmp_path / "q").glob("*.safetensors"))
    for value in (frequencies(), frequencies(500.0)):
        save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": value}, file)
        if value is not None and value[1] == frequencies()[1]:
            assert QuantizedReader(tmp_path / "q").files.entries.keys() == before
        else:
            with pytest.raises(CheckpointError, match="is that of rope_theta 500, "):
                QuantizedReader(tmp_path / "q")


def test_a_quantized_directory_may_have_a_prefix_too(make_checkpoint, tmp_path):
    quantize(CheckpointReader(make_checkpoint()), load_recipe(find_recipe("w8a8_rtn")), tmp_path / "q")
    before = QuantizedReader(tmp_path / "q").files.sha256()
    for file in (tmp_path / "q").glob("*.safetensors"):
        save_file({f"module.{name}": value for name, value in load_file(file).items()}, file)
    (tmp_path / "q" / INDEX_FILE).unlink()
    with pytest.warns(CheckpointNote, match=r"module\. is left out"):
        assert QuantizedReader(tmp_path / "q").files.sha256() == before
