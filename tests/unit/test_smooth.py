"""transforms/smooth.py: SmoothQuant's eq. 4, and what it does to a block."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint.layout import INPUT_NAMES, sites_reading
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers import grid
from ms_pangu_quant.transforms.fold import reduce_to_producer
from ms_pangu_quant.transforms.smooth import SmoothQuant, input_absmax, smooth_scale

SUBSETS = [names for count in range(1, 5) for names in itertools.combinations(INPUT_NAMES, count)]
SIZES = st.floats(0, float(np.float32(1e38)), width=32)


def observe(inputs):
    return {name: InputStats.observe(x.astype(np.float32), gram=True) for name, x in inputs.items()}


@pytest.fixture
def outlier_block(random_block, forward):
    """(key/value heads, bias) -> block with outlier channels and two dead ones, hidden states, its statistics."""

    def make(kv_heads=2, bias=True):
        block = random_block(num_key_value_heads=kv_heads, bias=bias)
        norm, up = block["input_layernorm.weight"].copy(), block["mlp.up_proj.weight"].copy()
        norm[3], norm[5] = 300, 0  # an outlier and a dead channel of attention_input
        up[7], up[11] = 90, 0  # the same of mlp_hidden
        block = block.replace({"input_layernorm.weight": norm, "mlp.up_proj.weight": up})
        hidden = np.random.default_rng(0).normal(size=(7, block.config.hidden_size))
        return block, hidden, observe(forward(block, hidden)[1])

    return make


def absmaxes(block, stats, input_name):
    """max |x| and max |w| of each channel that has a scale of its own."""
    weights = np.concatenate([block.weight(site) for site in sites_reading(input_name)])
    return (
        reduce_to_producer(block, input_name, stats[input_name].absmax),
        reduce_to_producer(block, input_name, np.abs(weights).max(axis=0)),
    )


@pytest.mark.parametrize(
    ("alpha", "wanted"),
    [
        (0.0, [1 / 4, 1 / 16, 1 / 81, 4, 1]),
        (0.25, [1 / 2, 1 / 4, 1 / 27, 4, 1]),
        (0.5, [1, 1, 1 / 9, 4, 1]),
        (0.75, [2, 4, 1 / 3, 4, 1]),
        (1.0, [4, 16, 1, 4, 1]),
    ],
)
def test_hand_computed_scales_of_equation_4(alpha, wanted):
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), arXiv:2211.10438."""
    s = smooth_scale(np.array([4, 16, 1, 4, 1], np.float32), np.array([4, 16, 81, 0.25, 1], np.float32), alpha)
    assert s.dtype == np.float32
    np.testing.assert_allclose(s, wanted, rtol=1e-6)


def test_a_channel_that_was_never_active_or_that_no_weight_reads_is_left_alone():
    s = smooth_scale(np.array([0, 5, 0, 4], np.float32), np.array([3, 0, 0, 1], np.float32), 0.5)
    assert s.tolist() == [1, 1, 1, 2]


@given(hnp.arrays(np.float32, 6, elements=SIZES), hnp.arrays(np.float32, 6, elements=SIZES), st.floats(0, 1))
def test_a_scale_is_positive_and_finite_whatever_was_seen(x, w, alpha):
    s = smooth_scale(x, w, alpha)
    assert np.isfinite(s).all()
    assert (s > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_smoothing_every_input_preserves_the_function(outlier_block, forward, kv_heads, bias, alpha):
    block, hidden, stats = outlier_block(kv_heads, bias)
    smoothed, _ = SmoothQuant(alpha)(block, stats)
    wanted, got = forward(block, hidden)[0], forward(smoothed, hidden)[0]
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("inputs", SUBSETS, ids="+".join)
def test_smoothing_some_inputs_preserves_the_function_and_scales_no_others(outlier_block, forward, inputs):
    block, hidden, stats = outlier_block()
    smoothed, returned = SmoothQuant(0.6, inputs)(block, stats)
    wanted, got = forward(block, hidden)[0], forward(smoothed, hidden)[0]
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()
    scaled = {name for name in INPUT_NAMES if not np.array_equal(returned[name].absmax, stats[name].absmax)}
    assert scaled == set(inputs)


@pytest.mark.parametrize("inputs", SUBSETS, ids="+".join)
def test_what_smoothing_says_it_changes_is_what_it_changes(outlier_block, inputs):
    block, _, stats = outlier_block()
    smoothed, _ = SmoothQuant(0.6, inputs)(block, stats)
    changed = {name for name in block.tensors if not np.array_equal(block[name], smoothed[name])}
    assert changed == {name for name in block.tensors if SmoothQuant(0.6, inputs).changes(name, {})}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_returned_statistics_are_those_of_the_smoothed_blocks_inputs(outlier_block, forward, kv_heads, alpha):
    block, hidden, stats = outlier_block(kv_heads)
    smoothed, returned = SmoothQuant(alpha)(block, stats)
    seen = observe(forward(smoothed, hidden)[1])
    assert list(returned) == list(stats)
    for name, wanted in seen.items():
        np.testing.assert_allclose(returned[name].absmax, wanted.absmax, rtol=3e-5)
        size = np.sqrt(np.outer(np.diag(wanted.gram), np.diag(wanted.gram)))
        assert (np.abs(returned[name].gram - wanted.gram) <= 3e-5 * size).all()


@pytest.mark.parametrize("inputs", [INPUT_NAMES, INPUT_NAMES[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_with_alpha_one_half_activations_and_weights_end_equally_large(outlier_block, kv_heads, inputs):
    """In every channel; true only if o_proj's input is smoothed before v_proj's, and down_proj's before up_proj's."""
    block, _, stats = outlier_block(kv_heads)
    smoothed, returned = SmoothQuant(0.5, inputs)(block, stats)
    for name in INPUT_NAMES:
        before, x = absmaxes(block, stats, name)[0], absmaxes(smoothed, returned, name)
        active = before > 0
        np.testing.assert_allclose(x[0][active], x[1][active], rtol=1e-5)


@pytest.mark.parametrize(("alpha", "side"), [(1.0, 0), (0.0, 1)], ids=["activations", "weights"])
def test_the_extremes_of_alpha_flatten_one_side_completely(outlier_block, alpha, side):
    block, _, stats = outlier_block()
    smoothed, returned = SmoothQuant(alpha)(block, stats)
    for name in INPUT_NAMES:
        active = absmaxes(block, stats, name)[0] > 0
        np.testing.assert_allclose(absmaxes(smoothed, returned, name)[side][active], 1, rtol=1e-5)


def test_a_dead_channel_keeps_its_weights_bit_for_bit(outlier_block):
    block, _, stats = outlier_block()
    smoothed, _ = SmoothQuant(0.5, ["attention_input"])(block, stats)
    assert stats["attention_input"].absmax[5] == 0
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        assert (smoothed[name][:, 5] == block[name][:, 5]).all()
        assert (smoothed[name][:, 3] != block[name][:, 3]).any()
    smoothed, _ = SmoothQuant(0.5, ["mlp_hidden"])(block, stats)
    assert (smoothed["mlp.down_proj.weight"][:, 11] == block["mlp.down_proj.weight"][:, 11]).all()


def test_smoothing_is_pure_and_needs_no_gram(outlier_block):
    block, _, stats = outlier_block()
    kept = {name: tensor.copy() for name, tensor in block.tensors.items()}
    seen = {name: stat.absmax.copy() for name, stat in stats.items()}
    SmoothQuant()(block, {name: InputStats(stat.tokens, stat.absmax) for name, stat in stats.items()})
    assert all((block[name] == tensor).all() for name, tensor in kept.items())
    assert all((stats[name].absmax == absmax).all() for name, absmax in seen.items())
    assert not SmoothQuant().needs.gram


@pytest.mark.parametrize("alpha", [-0.01, 1.01, 2])
def test_an_alpha_outside_zero_to_one_is_refused(alpha):
    with pytest.raises(RecipeError, match=r"smooth\.alpha: got .*from 0 to 1"):
        SmoothQuant(alpha)


@pytest.mark.parametrize("inputs", [[], ["attention"], ["mlp_input", "mlp_out"]])
def test_inputs_that_do_not_exist_are_refused_with_a_list_of_those_that_do(inputs):
    with pytest.raises(RecipeError, match=rf"smooth\.inputs: .*{', '.join(INPUT_NAMES)}"):
        SmoothQuant(0.5, inputs)


def test_pieces_of_a_large_weight_are_smoothed_like_the_whole(outlier_block, monkeypatch):
    block, _, stats = outlier_block()
    weight = block["mlp.up_proj.weight"]
    whole, seen = SmoothQuant(alpha=0.5)(block, stats)
    monkeypatch.setattr(grid, "_PIECE_ELEMENTS", 2 * weight.shape[1] + 1)  # rows in twos
    assert np.array_equal(input_absmax(weight), np.abs(weight).max(axis=0))
    parts, seen_too = SmoothQuant(alpha=0.5)(block, stats)
    assert all(np.array_equal(parts[name], whole[name]) for name in whole.tensors)
    assert all(np.array_equal(seen_too[name].absmax, seen[name].absmax) for name in seen)
