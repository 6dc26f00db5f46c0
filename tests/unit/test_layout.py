"""checkpoint/layout.py: names, shapes and neighbours are those of the published checkpoints."""

import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": False},
        {"output_bias": False},
        {"head_dim": 24},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": False},
        {"model_type": "llama"},
        {"model_type": "llama", "attention_bias": True},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_the_checkpoint_tool(checkpoint_tool, changes):
    """The tool's own are checked against the published checkpoints in test_make_checkpoint.py."""
    raw = checkpoint_tool.make_config("tiny", **changes)
    config = ModelConfig.from_dict(raw, where="test")
    shapes = layout.outer_shapes(config)
    for index in range(config.num_hidden_layers):
        shapes.update({layout.block_prefix(index) + name: shape for name, shape in layout.block_shapes(config).items()})
    assert shapes == {tensor.name: tensor.shape for tensor in checkpoint_tool.plan_tensors(raw)}


def test_every_linear_layer_is_in_the_table_once_and_its_input_has_a_name(small_config):
    shapes = layout.block_shapes(small_config())
    linear = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    assert sorted(site.name for site in layout.SITES) == sorted(linear)
    assert {site.input_name for site in layout.SITES} == set(layout.INPUT_NAMES)
    assert [site for name in layout.INPUT_NAMES for site in layout.sites_reading(name)] == list(layout.SITES)


def test_who_reads_what_and_what_is_computed_as_one():
    assert {name: [site.name.split(".")[1] for site in layout.sites_reading(name)] for name in layout.INPUT_NAMES} == {
        "attention_input": ["q_proj", "k_proj", "v_proj"],
        "attention_output": ["o_proj"],
        "mlp_input": ["gate_proj", "up_proj"],
        "mlp_hidden": ["down_proj"],
    }
    fused = {}
    for site in layout.SITES:
        fused.setdefault(site.fused, []).append(site.name.split(".")[1])
    assert sorted(fused.values()) == [["down_proj"], ["gate_proj", "up_proj"], ["o_proj"], ["q_proj", "k_proj", "v_proj"]]


def test_sites_that_read_one_input_have_one_width_and_one_producer(small_config):
    config = small_config()
    for name in layout.INPUT_NAMES:
        sites = layout.sites_reading(name)
        assert len({layout.site_shape(config, site)[1] for site in sites}) == 1
        assert len({site.producer for site in sites}) == 1


def test_a_producer_has_an_output_for_every_channel_or_for_every_group_of_heads(small_config):
    config = small_config()
    shapes = layout.block_shapes(config)
    for site in layout.SITES:
        channels = shapes[f"{site.producer}.weight"][0]
        repeats = config.num_attention_heads // config.num_key_value_heads if site.producer.endswith("v_proj") else 1
        assert channels * repeats == shapes[f"{site.name}.weight"][1], site.name


def test_only_attention_has_biases_and_only_where_the_config_says_so(small_config):
    for bias in (True, False):
        config = small_config(bias=bias)
        biased = {site.name for site in layout.SITES if site in config.biased}
        assert biased == ({site.name for site in layout.SITES if "self_attn" in site.name} if bias else set())
