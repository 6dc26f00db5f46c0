"""checkpoint/reader.py: a checkpoint is checked whole when it is opened, and read a block at a time."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows, is_quantized
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats.reader import open_checkpoint
from ms_pangu_quant.recipe.plan import Plan

SHAPES = [
    {},
    {"bias": False},
    {"head_dim": 24},
    {"num_key_value_heads": 1},
    {"tie_word_embeddings": False},
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True},
]


def shapes(reader):
    return reader.plan.float_shapes(reader.config)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_blocks_are_the_files_tensors_in_float32(make_checkpoint, changes, shard_bytes):
    directory = make_checkpoint(shard_bytes=shard_bytes, **changes)
    wanted = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    reader = CheckpointReader(directory)
    blocks = list(map(reader.block, range(reader.config.num_hidden_layers)))
    assert len(blocks) == 2
    for index, block in enumerate(blocks):
        prefix = f"model.layers.{index}."
        assert {prefix + name for name in block.tensors} == {name for name in wanted if name.startswith(prefix)}
        for name, tensor in block.tensors.items():
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(tensor, wanted[prefix + name].astype(np.float32))
    assert shapes(reader) == {name: tensor.shape for name, tensor in wanted.items()}


def test_the_embedded_checkpoint_is_read(mini):
    reader = CheckpointReader(mini)
    wanted = load_file(mini / "model.safetensors")
    assert reader.config.num_hidden_layers == 4
    assert shapes(reader).keys() <= wanted.keys()
    np.testing.assert_array_equal(
        reader.block(3)["mlp.down_proj.weight"], wanted["model.layers.3.mlp.down_proj.weight"].astype(np.float32)
    )


def test_a_float_checkpoint_has_the_face_of_a_quantized_one_with_nothing_quantized(make_checkpoint):
    reader = CheckpointReader(make_checkpoint())
    assert reader.plan == Plan.uniform(reader.config)
    assert reader.format is None
    assert reader.rows is None
    for index in range(reader.config.num_hidden_layers):
        rounded, block = reader.rounded_block(index), reader.block(index)
        assert rounded.plan == reader.plan.blocks[index]
        assert rounded.kept.keys() == block.tensors.keys()
        assert all(np.array_equal(value, block[name]) for name, value in rounded.kept.items())


def test_a_block_knows_its_weights_and_biases_by_site_and_is_replaced_not_changed(random_block):
    for bias in (True, False):
        block = random_block(bias=bias)
        for site in layout.SITES:
            assert block.weight(site) is block[f"{site.name}.weight"]
            assert (block.bias(site) is not None) == (bias and "self_attn" in site.name)
        new = block.replace({"mlp.up_proj.weight": np.zeros((40, 24), np.float32)})
        assert not new["mlp.up_proj.weight"].any()
        assert block["mlp.up_proj.weight"].any()
        assert {name for name in block.tensors if new[name] is not block[name]} == {"mlp.up_proj.weight"}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_a_missing_tensor_is_named_with_the_shape_it_should_have(make_checkpoint, edit_tensors, name):
    directory = make_checkpoint()
    shape = list(shapes(CheckpointReader(directory))[name])
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError) as raised:
        CheckpointReader(directory)
    assert f"{name} is missing; config.json implies a tensor of shape {shape}" in str(raised.value)
    assert "bias is part of the model" not in str(raised.value)


def test_a_missing_o_proj_bias_is_explained(make_checkpoint, edit_tensors):
    """Converters to Llama drop it, and the checkpoint then is another model."""
    directory = make_checkpoint()
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.bias"))
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.1\.self_attn\.o_proj\.bias is missing.*"
        "bias is part of the model, a checkpoint without it is another one",
    ):
        CheckpointReader(directory)


def test_a_wrong_shape_names_file_tensor_found_and_wanted(make_checkpoint, edit_tensors):
    directory = make_checkpoint()
    edit_tensors(
        directory,
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": np.zeros((136, 64), ml_dtypes.bfloat16)}),
    )
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\.weight: "
        r"got \[136, 64\], config\.json implies \[128, 64\]",
    ):
        CheckpointReader(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"bias": False},
        {"num_hidden_layers": 3},
        {"hidden_size": 128},
        {"vocab_size": 97},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_the_config_of_another_checkpoint_is_refused(make_checkpoint, changes):
    directory = make_checkpoint()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointReader(directory)


def test_an_unknown_tensor_is_named(make_checkpoint, edit_tensors):
    directory = make_checkpoint()
    edit_tensors(
        directory, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight: not a tensor of"):
        CheckpointReader(directory)


def test_an_integer_weight_looks_like_a_quantized_checkpoint(make_checkpoint, edit_tensors):
    directory = make_checkpoint()
    edit_tensors(
        directory, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.weight": np.zeros((64, 128), np.int8)})
    )
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight: got int8.*quantized already\?"):
        CheckpointReader(directory)


def test_a_tied_checkpoint_may_ship_its_head_and_an_untied_one_must(make_checkpoint, edit_tensors):
    tied = make_checkpoint("tied")
    edit_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head.weight" not in shapes(CheckpointReader(tied))
    untied = make_checkpoint("untied", tie_word_embeddings=False)
    assert shapes(CheckpointReader(untied))["lm_head.weight"] == (96, 64)
    edit_tensors(untied, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing.*tie_word_embeddings true in config\.json"):
        CheckpointReader(untied)


OTHER_HEADS = {
    "rows in another order": lambda embedding: embedding[::-1],
    "one number": lambda embedding: np.concatenate([embedding[:-1], embedding[-1:] * 2]),
    "another dtype": lambda embedding: embedding.astype(np.float32) * 1.001,
    "another shape": lambda embedding: np.concatenate([embedding, embedding]),
}


@pytest.mark.parametrize("kind", OTHER_HEADS)
def test_a_trained_head_is_not_dropped_for_a_config_that_ties_it(make_checkpoint, edit_tensors, kind):
    directory = make_checkpoint()
    change = OTHER_HEADS[kind]
    edit_tensors(directory, lambda tensors: tensors.update({layout.HEAD: change(tensors[layout.EMBEDDING])}))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: lm_head\.weight is not the embedding.*tie_word_embeddings true; set it"
    ):
        CheckpointReader(directory)


def test_a_head_that_is_the_embedding_in_a_wider_type_is_the_embedding(make_checkpoint, edit_tensors):
    directory = make_checkpoint()
    wider = {layout.HEAD: lambda tensors: tensors[layout.EMBEDDING].astype(np.float32)}
    edit_tensors(directory, lambda tensors: tensors.update({name: make(tensors) for name, make in wider.items()}))
    assert layout.HEAD not in shapes(CheckpointReader(directory))


@pytest.mark.parametrize(
    "mark",
    [
        *("quantization_description.json", "quant_model_description.json", "quant_model_description_w8a8.json"),
        *("quantization_config", "compression_config"),
    ],
)
def test_a_quantized_directory_is_refused_by_any_of_its_marks(make_checkpoint, mark):
    directory = make_checkpoint()
    reader = CheckpointReader(directory)
    assert not is_quantized(directory, reader.config)
    if mark.endswith(".json"):
        (directory / mark).write_text("{}")
    else:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, mark: {"quant_method": "golden-stick"}}))
    with pytest.raises(CheckpointError, match="is quantized already; wanted the float checkpoint"):
        CheckpointReader(directory)
    if mark in ("quant_model_description_w8a8.json", "compression_config"):  # which are not read either
        with pytest.raises(CheckpointError, match=mark):
            open_checkpoint(directory)


def test_a_directory_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"^{path}: no such directory"):
            CheckpointReader(path)
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        CheckpointReader(tmp_path)


@given(st.lists(st.integers(0, 1023), min_size=1, max_size=40))
def test_embedding_rows_are_those_of_the_whole_table(mini, ids):
    opened = TensorFiles(mini)
    table = opened.read_float32(layout.EMBEDDING)
    rows = embedding_rows(opened, np.array(ids, np.int32))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[ids])
