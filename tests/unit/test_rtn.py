"""quantizers/rtn.py: no weight moves by more than half a scale, whatever the scheme and whatever the weights."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.scheme import PRESETS, TensorScheme

LARGEST = float(np.float32(1e38))
SCHEMES = {
    f"{bits} bits, {granularity}{size or ''}, {'full' if full else 'narrow'}{', bfloat16' if bf16 else ''}": TensorScheme(
        bits, granularity, group_size=size, full_range=full, bfloat16_scale=bf16
    )
    for bits in (4, 8)
    for granularity, size in (("channel", 0), ("group", 2), ("group", 6), ("group", 12))
    for full in (False, True)
    for bf16 in (False, True)
}
ANY = st.floats(-LARGEST, LARGEST, width=32)
DENORMAL = st.floats(-(2.0**-126), 2.0**-126, width=32)
EVERYDAY = st.floats(-4, 4, width=32)
HALF = 0.5 + 2e-5  # w / scale is rounded to float32 before it is rounded to a code: 127.5 * 2^-24 at most


def weights():
    """[1 to 4, 12], each row everyday, denormal, zero, or everything up to 1e38 at once."""
    rows = [hnp.arrays(np.float32, 12, elements=elements) for elements in (EVERYDAY, DENORMAL, ANY, st.just(0.0))]
    return st.lists(st.one_of(rows), min_size=1, max_size=4).map(np.stack)


def quantized(weight, scheme):
    return RoundToNearest()(weight, scheme, None)


@settings(max_examples=400)
@given(scheme=st.sampled_from(list(SCHEMES.values())), weight=weights())
def test_no_weight_moves_by_more_than_half_a_scale(scheme, weight):
    result = quantized(weight, scheme)
    groups = scheme.groups(weight.shape[1])
    scale = np.repeat(result.scale, weight.shape[1] // groups, axis=1).astype(np.float64)
    assert result.codes.dtype == np.int8
    assert result.scale.dtype == np.float32
    assert result.scale.shape == (len(weight), groups)
    assert (result.scale > 0).all()
    assert result.codes.min() >= scheme.code_min
    assert result.codes.max() <= scheme.code_max
    assert (np.abs(weight - result.codes * scale) <= scale * HALF).all()
    assert (np.abs(weight - result.dequantize().astype(np.float64)) <= scale * HALF).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_other_code_is_nearer(scheme):
    weight = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    result = quantized(weight, scheme)
    scale = np.repeat(result.scale, 12 // scheme.groups(12), axis=1).astype(np.float64)
    others = np.arange(scheme.code_min, scheme.code_max + 1)
    nearest = np.abs(weight[..., None] - others * scale[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(weight - result.codes * scale), nearest, rtol=0, atol=1e-6 * np.abs(weight).max())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_largest_weight_uses_the_grid_to_its_end(scheme):
    """A scale larger than needed would leave codes unused: the last one, or with a rounded-up scale the last 1/128."""
    weight = np.random.default_rng(1).normal(size=(64, 12)).astype(np.float32)
    result = quantized(weight, scheme)
    largest = np.abs(result.codes.reshape(-1, 12 // scheme.groups(12)).astype(int)).max(axis=1)
    assert largest.min() >= scheme.code_max - (1 if scheme.bfloat16_scale else 0)


@settings(max_examples=200)
@given(scheme=st.sampled_from(list(SCHEMES.values())), weight=weights(), exponent=st.integers(-3, 3))
def test_weights_times_a_power_of_two_have_the_same_codes(scheme, weight, exponent):
    ordinary = np.where(np.abs(weight) < 1e-30, 0, weight * np.float32(0.1)).astype(np.float32)
    one, other = quantized(ordinary, scheme), quantized(ordinary * np.float32(2.0**exponent), scheme)
    assert (one.codes == other.codes).all()
    zero = ~one.codes.reshape(*one.scale.shape, -1).any(axis=2)
    assert (other.scale == np.where(zero, 1, one.scale * 2.0**exponent)).all()


@given(scheme=st.sampled_from([scheme for scheme in SCHEMES.values() if not scheme.full_range]), weight=weights())
def test_the_narrow_grid_is_symmetric(scheme, weight):
    one, other = quantized(weight, scheme), quantized(-weight, scheme)
    assert (one.codes == -other.codes).all()
    assert (one.scale == other.scale).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_channel_or_group_is_rounded_without_regard_to_the_others(scheme):
    weight = np.random.default_rng(2).normal(size=(4, 12)).astype(np.float32)
    width = 12 // scheme.groups(12)
    changed = weight.copy()
    changed[1:] *= 100
    changed[0, width:] *= 100
    before, after = quantized(weight, scheme), quantized(changed, scheme)
    assert (before.codes[0, :width] == after.codes[0, :width]).all()
    assert before.scale[0, 0] == after.scale[0, 0]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("full_range", [False, True])
def test_an_all_zero_channel_is_zeros_with_scale_one_between_others(name, full_range):
    scheme = PRESETS[name].with_range(full_range=full_range).weight
    weight = np.random.default_rng(3).normal(size=(3, 256)).astype(np.float32)
    weight[1] = 0
    result = quantized(weight, scheme)
    assert (result.scale[1] == 1).all()
    assert not result.codes[1].any()
    assert result.codes[0].any()
    assert result.codes[2].any()
    assert not result.dequantize()[1].any()


def test_rounding_is_pure_and_looks_at_the_weight_alone():
    weight = np.random.default_rng(4).normal(size=(4, 12)).astype(np.float32)
    before = weight.copy()
    stats = InputStats.observe(np.random.default_rng(5).normal(size=(9, 12)).astype(np.float32), gram=True)
    rounding, scheme = RoundToNearest(), SCHEMES["4 bits, group6, narrow"]
    one, other = rounding(weight, scheme, stats), rounding(weight, scheme, None)
    assert (one.codes == other.codes).all()
    assert (one.scale == other.scale).all()
    assert (weight == before).all()
    assert not rounding.needs.gram
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.scale = other.scale
