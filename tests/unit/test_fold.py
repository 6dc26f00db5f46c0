"""transforms/fold.py: a folded block is the same function, checked against a float64 forward pass (conftest.py)."""

import numpy as np
import pytest

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint.layout import INPUT_NAMES
from ms_pangu_quant.transforms.fold import expand_to_input, fold_scale, reduce_to_producer, scale_channels

TOKENS = 7
GQA = {1: 4, 2: 2, 4: 1}  # query heads per key/value head -> key/value heads of 4 query heads
TOUCHED = {
    "attention_input": {
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    },
    "attention_output": {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"},
    "mlp_input": {"post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"},
    "mlp_hidden": {"mlp.up_proj.weight", "mlp.down_proj.weight"},
}
each_shape = pytest.mark.parametrize("group", GQA, ids=lambda group: f"gqa{group}")
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
each_input = pytest.mark.parametrize("input_name", INPUT_NAMES)


def hidden_states(block, seed=0):
    return np.random.default_rng(seed).normal(size=(TOKENS, block.config.hidden_size))


def observe(inputs, gram=True):
    return {name: InputStats.observe(x.astype(np.float32), gram=gram) for name, x in inputs.items()}


def scales(block, input_name, *, power_of_two, seed=1):
    drawn = np.random.default_rng(seed).normal(scale=2, size=scale_channels(block, input_name))
    return (2.0 ** (np.rint(drawn) if power_of_two else drawn)).astype(np.float32)


def assert_close(got, wanted, tolerance):
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def test_the_forward_pass_of_these_tests_is_not_blind(random_block, forward):
    """Every tensor of the block changes the output, so a forgotten one cannot pass for a preserved function."""
    block = random_block()
    hidden = hidden_states(block)
    output, _ = forward(block, hidden)
    for name, tensor in block.tensors.items():
        if name != "self_attn.k_proj.bias":  # nearly constant over keys, so softmax cancels most of it
            changed, _ = forward(block.replace({name: tensor * np.float32(1.1)}), hidden)
            assert np.abs(changed - output).max() > 1e-3 * np.abs(output).max(), name
    causal, _ = forward(block, np.concatenate([hidden[:4], 2 * hidden[4:]]))
    np.testing.assert_allclose(causal[:4], output[:4], rtol=1e-12)


@each_input
@each_bias
@each_shape
def test_folding_powers_of_two_changes_no_output(random_block, forward, input_name, bias, group):
    block = random_block(num_key_value_heads=GQA[group], bias=bias)
    hidden = hidden_states(block)
    output, inputs = forward(block, hidden)
    folded, _ = fold_scale(block, observe(inputs), input_name, scales(block, input_name, power_of_two=True))
    assert_close(forward(folded, hidden)[0], output, 1e-12)


@each_input
@each_bias
@each_shape
def test_folding_any_scale_changes_outputs_by_float32_rounding_alone(random_block, forward, input_name, bias, group):
    block = random_block(num_key_value_heads=GQA[group], bias=bias)
    hidden = hidden_states(block)
    output, inputs = forward(block, hidden)
    folded, _ = fold_scale(block, observe(inputs), input_name, scales(block, input_name, power_of_two=False))
    assert all(tensor.dtype == np.float32 for tensor in folded.tensors.values())
    assert_close(forward(folded, hidden)[0], output, 1e-5)


@each_input
@each_shape
def test_returned_statistics_are_those_of_the_folded_blocks_inputs(random_block, forward, input_name, group):
    block = random_block(num_key_value_heads=GQA[group])
    hidden = hidden_states(block)
    stats = observe(forward(block, hidden)[1])
    s = scales(block, input_name, power_of_two=False)
    folded, returned = fold_scale(block, stats, input_name, s)
    seen = observe(forward(folded, hidden)[1])
    assert list(returned) == list(stats)
    for name, wanted in seen.items():
        assert returned[name].tokens == TOKENS
        np.testing.assert_allclose(returned[name].absmax, wanted.absmax, rtol=1e-5)
        size = np.sqrt(np.outer(np.diag(wanted.gram), np.diag(wanted.gram)))
        assert (np.abs(returned[name].gram - wanted.gram) <= 1e-5 * size).all()
    divided = stats[input_name].absmax / expand_to_input(block, input_name, s)
    np.testing.assert_allclose(returned[input_name].absmax, divided, rtol=1e-6)


@each_input
@each_bias
def test_only_the_producer_and_the_readers_are_touched(random_block, forward, input_name, bias):
    block = random_block(bias=bias)
    kept = {name: tensor.copy() for name, tensor in block.tensors.items()}
    stats = observe(forward(block, hidden_states(block))[1])
    folded, _ = fold_scale(block, stats, input_name, scales(block, input_name, power_of_two=True) * np.float32(64))
    changed = {name for name in block.tensors if not np.array_equal(folded[name], block[name])}
    assert changed == {name for name in TOUCHED[input_name] if name in block.tensors}
    assert folded.tensors.keys() == block.tensors.keys()
    assert all(np.array_equal(block[name], tensor) for name, tensor in kept.items())


def test_the_bias_of_a_producing_linear_layer_is_divided_too(random_block, forward):
    block = random_block()
    stats = observe(forward(block, hidden_states(block))[1])
    s = scales(block, "attention_output", power_of_two=False)
    folded, _ = fold_scale(block, stats, "attention_output", s)
    np.testing.assert_array_equal(folded["self_attn.v_proj.bias"], block["self_attn.v_proj.bias"] / s)
    np.testing.assert_array_equal(folded["self_attn.o_proj.bias"], block["self_attn.o_proj.bias"])


@each_input
def test_folding_a_scale_and_then_its_inverse_gives_the_block_back_bit_for_bit(random_block, forward, input_name):
    block = random_block()
    stats = observe(forward(block, hidden_states(block))[1])
    s = scales(block, input_name, power_of_two=True)
    folded, scaled = fold_scale(block, stats, input_name, s)
    back, returned = fold_scale(folded, scaled, input_name, 1 / s)
    assert all(back[name].tobytes() == block[name].tobytes() for name in block.tensors)
    assert returned[input_name].absmax.tobytes() == stats[input_name].absmax.tobytes()


def test_one_value_channel_feeds_the_same_channel_of_each_query_head_of_its_group(random_block):
    """2 key/value heads of 2 channels, 4 query heads: heads 0 and 1 read the first, heads 2 and 3 the second."""
    block = random_block(num_key_value_heads=2, head_dim=2)
    wide = expand_to_input(block, "attention_output", np.array([1, 2, 3, 4], np.float32))
    assert wide.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    narrow = reduce_to_producer(block, "attention_output", np.array([1, 8, 5, 2, 3, 4, 0, 9], np.float32))
    assert narrow.tolist() == [5, 8, 3, 9]


@each_input
@each_shape
def test_reducing_what_was_expanded_gives_it_back(random_block, input_name, group):
    block = random_block(num_key_value_heads=GQA[group])
    s = scales(block, input_name, power_of_two=False)
    wide = expand_to_input(block, input_name, s)
    inputs = {"attention_output": 32, "mlp_hidden": 40}.get(input_name, 24)
    assert wide.shape == (inputs,)
    assert len(s) == (32 // group if input_name == "attention_output" else inputs)
    np.testing.assert_array_equal(reduce_to_producer(block, input_name, wide), s)


@each_input
@pytest.mark.parametrize("fault", ["zero", "negative", "nan", "inf", "short", "long", "column"])
def test_a_scale_that_is_not_positive_and_finite_for_every_channel_is_refused(random_block, forward, input_name, fault):
    block = random_block(num_key_value_heads=1)
    stats = observe(forward(block, hidden_states(block))[1], gram=False)
    s = scales(block, input_name, power_of_two=True)
    if fault in ("zero", "negative", "nan", "inf"):
        s[3] = {"zero": 0, "negative": -1, "nan": np.nan, "inf": np.inf}[fault]
    else:
        s = {"short": s[:-1], "long": np.append(s, s[:1]), "column": s[:, None]}[fault]
    with pytest.raises(ValueError, match=f"scale of {input_name}: wanted {scale_channels(block, input_name)} positive"):
        fold_scale(block, stats, input_name, s)
