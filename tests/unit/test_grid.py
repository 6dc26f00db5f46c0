"""quantizers/grid.py: the smallest scale that spans the weights, the nearest code, and the way back."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_pangu_quant.quantizers import grid
from ms_pangu_quant.quantizers.grid import (
    QuantizedWeight,
    relative_weight_error,
    round_to_grid,
    scale_from_absmax,
    weight_scale,
)
from ms_pangu_quant.recipe.scheme import TensorScheme

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST = float(np.float32(1e38))
SCHEMES = [
    TensorScheme(bits, "channel", full_range=full, bfloat16_scale=bf16)
    for bits in (4, 8)
    for full in (False, True)
    for bf16 in (False, True)
]
POSITIVE = st.floats(SMALLEST_NORMAL, LARGEST, width=32)


def bfloat16_patterns():
    """Every positive finite bfloat16, normal and subnormal, in ascending order, as float32."""
    return np.arange(1, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=POSITIVE))
def test_rounding_up_gives_the_smallest_bfloat16_that_is_not_less(values):
    up = grid.round_up_to_bfloat16(values)
    before = np.nextafter(up.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(0)).astype(np.float32)
    assert up.dtype == np.float32
    assert (up == up.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    assert (up >= values).all()
    assert (before < values).all()


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=POSITIVE))
def test_rounding_down_gives_the_largest_bfloat16_that_is_not_more(values):
    down = grid.round_down_to_bfloat16(values)
    after = np.nextafter(down.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(np.inf)).astype(np.float32)
    assert down.dtype == np.float32
    assert (down == down.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    assert (down <= values).all()
    assert (after > values).all()


def test_every_bfloat16_rounds_to_itself_and_its_neighbours_in_float32_to_the_right_side():
    exact = bfloat16_patterns()
    assert (grid.round_up_to_bfloat16(exact) == exact).all()
    assert (grid.round_down_to_bfloat16(exact) == exact).all()
    above, below = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))
    assert (grid.round_up_to_bfloat16(above)[:-1] == exact[1:]).all()
    assert (grid.round_down_to_bfloat16(above) == exact).all()
    assert (grid.round_up_to_bfloat16(below) == exact).all()
    assert (grid.round_down_to_bfloat16(below)[1:] == exact[:-1]).all()


def test_is_bfloat16_wants_every_value_to_be_one():
    exact = bfloat16_patterns()
    assert grid.is_bfloat16(exact)
    assert grid.is_bfloat16(exact[:, None])
    for position in (0, 1000, len(exact) - 1):
        changed = exact.copy()
        changed[position] = np.nextafter(exact[position], np.float32(0)) if position else np.float32(1e-45)
        assert not grid.is_bfloat16(changed)


@given(
    scheme=st.sampled_from([scheme for scheme in SCHEMES if scheme.bfloat16_scale]),
    absmax=hnp.arrays(np.float32, st.integers(1, 20), elements=POSITIVE),
)
def test_a_bfloat16_scale_is_the_smallest_that_reaches_absmax(scheme, absmax):
    scale = scale_from_absmax(absmax, scheme)
    wanted = np.maximum(absmax / np.float32(scheme.divisor), np.float32(SMALLEST_NORMAL))
    below = np.nextafter(scale.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(0)).astype(np.float32)
    assert grid.is_bfloat16(scale)
    assert (scale >= wanted).all()
    assert (below < wanted).all()


@given(
    scheme=st.sampled_from([scheme for scheme in SCHEMES if not scheme.bfloat16_scale]),
    absmax=hnp.arrays(np.float32, st.integers(1, 20), elements=POSITIVE),
)
def test_a_float32_scale_is_absmax_over_the_divisor(scheme, absmax):
    scale = scale_from_absmax(absmax, scheme).astype(np.float64)
    wanted = np.maximum(absmax.astype(np.float64) / scheme.divisor, SMALLEST_NORMAL)
    np.testing.assert_allclose(scale, wanted, rtol=2**-23)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_scale_is_never_zero_or_denormal_and_is_one_where_nothing_was_seen(scheme):
    scale = scale_from_absmax(np.array([0.0, 1e-45, 1e-40, SMALLEST_NORMAL], np.float32), scheme)
    assert scale.dtype == np.float32
    assert scale.tolist() == [1.0, SMALLEST_NORMAL, SMALLEST_NORMAL, SMALLEST_NORMAL]


def test_each_scale_comes_from_its_own_channel_or_group():
    weight = np.array([[7, -1, 2, 14], [-21, 3, 0, 0], [0, 0, -0.0, 28]], np.float32)
    per_channel = weight_scale(weight, TensorScheme(4, "channel"))
    per_group = weight_scale(weight, TensorScheme(4, "group", group_size=2))
    assert per_channel.tolist() == [[2], [3], [4]]
    assert per_group.tolist() == [[1, 2], [3, 1], [1, 4]]


def test_a_hand_computed_narrow_int4_example_rounds_halves_to_even():
    weight = np.array([[7.0, -3.5, 1.25, -0.5], [14.0, -7.0, 3.0, 5.0]], np.float32)
    scheme = TensorScheme(4, "channel")
    scale = weight_scale(weight, scheme)
    assert scale.tolist() == [[1.0], [2.0]]
    assert round_to_grid(weight, scale, scheme).tolist() == [[7, -4, 1, 0], [7, -4, 2, 2]]


def test_a_hand_computed_grouped_full_range_int4_example_clips_only_at_plus_eight():
    weight = np.array([[7.5, -7.5, 0.5, 15.0], [-2.5, 1.5, -3.75, 0.0]], np.float32)
    scheme = TensorScheme(4, "group", group_size=2, full_range=True)
    scale = weight_scale(weight, scheme)
    assert scale.tolist() == [[1.0, 2.0], [np.float32(2.5 / 7.5), 0.5]]
    assert round_to_grid(weight, scale, scheme).tolist() == [[7, -8, 0, 7], [-8, 4, -8, 0]]


def test_a_hand_computed_int8_example_has_its_scale_rounded_up_before_the_codes_are_chosen():
    # 1/127 = (1 + 1/127) * 2^-7 lies between the bfloat16 values (1 + 1/128) * 2^-7 and (1 + 2/128) * 2^-7.
    weight = np.array([[1.0, -0.5, 0.25, 0.003]], np.float32)
    scheme = TensorScheme(8, "channel", bfloat16_scale=True)
    scale = weight_scale(weight, scheme)
    assert scale.tolist() == [[130 / 128 / 128]]
    assert round_to_grid(weight, scale, scheme).tolist() == [[126, -63, 32, 0]]  # 126.03, -63.02, 31.51, 0.38


@given(
    st.sampled_from(SCHEMES),
    hnp.arrays(np.float32, (2, 6), elements=(st.floats(-LARGEST, LARGEST, width=32) | st.floats(-9, 9, width=32))),
)
def test_codes_stay_in_the_schemes_range_even_for_a_scale_that_is_too_small(scheme, weight):
    codes = round_to_grid(weight, np.full((2, 1), 0.5, np.float32), scheme)
    assert codes.dtype == np.int8
    assert codes.shape == weight.shape
    wanted = [min(max(round(float(value) / 0.5), scheme.code_min), scheme.code_max) for value in weight.reshape(-1)]
    assert codes.reshape(-1).tolist() == wanted


@given(st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
def test_dequantize_multiplies_each_code_by_its_groups_scale(out_features, groups, seed):
    generator = np.random.default_rng(seed)
    codes = generator.integers(-128, 128, (out_features, groups * 6)).astype(np.int8)
    scale = generator.lognormal(size=(out_features, groups)).astype(np.float32)
    back = QuantizedWeight(codes, scale).dequantize()
    assert back.dtype == np.float32
    wanted = [
        [np.float32(codes[row, column]) * scale[row, column // 6] for column in range(groups * 6)]
        for row in range(out_features)
    ]
    assert back.tolist() == np.array(wanted).tolist()


def test_pieces_of_a_large_weight_are_rounded_like_the_whole(monkeypatch):
    weight = np.random.default_rng(0).normal(size=(37, 24)).astype(np.float32)
    scheme = TensorScheme(4, "group", group_size=8)
    scale = weight_scale(weight, scheme)
    codes = round_to_grid(weight, scale, scheme)
    whole = QuantizedWeight(codes, scale)
    error = relative_weight_error(whole, weight)
    assert error == pytest.approx(np.linalg.norm(whole.dequantize() - weight) / np.linalg.norm(weight), rel=1e-6)
    monkeypatch.setattr(grid, "_PIECE_ELEMENTS", 100)  # rows in fours, the last alone
    assert [len(weight[rows]) for rows in grid.row_pieces(weight)] == [4] * 9 + [1]
    assert np.array_equal(weight_scale(weight, scheme), scale)
    assert np.array_equal(round_to_grid(weight, scale, scheme), codes)
    assert np.array_equal(whole.dequantize(), np.repeat(scale, 8, axis=1) * codes)
    assert relative_weight_error(whole, weight) == pytest.approx(error, rel=1e-6)
