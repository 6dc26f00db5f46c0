"""The grid of int8 keys and values: what rounding to it may do, and what choosing it from statistics must obey."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from ms_pangu_quant.calibration.ranges import RangeStats
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.quantizers.grid import is_bfloat16
from ms_pangu_quant.quantizers.kv_cache import CacheGrid, Int8Cache, grid_of_range

F32 = np.float32
HEADS, DIM = 3, 8
SETTINGS = [
    Int8Cache(keys=granularity, values=granularity, symmetric=symmetric, method=method, percentile=99)
    for granularity, symmetric, method in itertools.product(
        ("channel", "head"), (True, False), ("absmax", "percentile", "mse")
    )
]
ALL = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.keys}-{s.symmetric}-{s.method}")


def numbers(seed=0, tokens=300):
    """Keys and values [tokens, heads * dim], each channel with a size and a mean of its own."""
    rng = np.random.default_rng(seed)
    size, mean = rng.uniform(0.1, 9, HEADS * DIM), rng.normal(size=HEADS * DIM) * 3
    return (rng.normal(size=(tokens, HEADS * DIM)) * size + mean).astype(F32)


def chosen(setting, x):
    stats = RangeStats.observe(x, rows=setting.needs.rows)
    return setting.cache(stats, stats, HEADS).key


def heads(x):
    return x.reshape(len(x), HEADS, DIM)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_what_was_seen_comes_back_within_half_a_step(granularity, symmetric):
    for seed in range(20):
        x = numbers(seed)
        grid = chosen(Int8Cache(keys=granularity, symmetric=symmetric), x)
        error = np.abs(grid.values(grid.codes(heads(x))).astype(np.float64) - heads(x))
        assert (error <= grid.scale / 2 * (1 + 2.0**-14)).all()


def test_ends_that_lie_between_two_codes_are_still_within_half_a_step():
    low, high = np.array([[-153.5, -154.5, -100.25]], F32), np.array([[101.5, 100.5, 154.75]], F32)
    grid = grid_of_range(low, high, symmetric=False)
    for end in (low, high):
        assert (np.abs(grid.values(grid.codes(end[None]))[0] - end) <= grid.scale / 2).all()


def test_a_symmetric_grid_uses_127_codes_on_each_side_and_has_no_zero_point():
    x = numbers()
    grid = chosen(Int8Cache(), x)
    codes = grid.codes(heads(x))
    assert not grid.offset.any()
    assert codes.min() >= -127
    assert (np.abs(codes.astype(int)).max(axis=0) >= 126).all()  # a scale rounded up to bfloat16 loses at most one code


def test_an_asymmetric_grid_reaches_the_least_code_and_holds_zero_exactly():
    x = np.abs(numbers()) + F32(1)  # all on one side: the other side's codes are not wasted
    grid = chosen(Int8Cache(symmetric=False), x)
    codes = grid.codes(heads(x)).astype(int)
    assert (grid.offset == -128).all()
    assert (codes.max(axis=0) >= 125).all()
    assert (grid.values(grid.offset[None]) == 0).all()
    assert (grid.scale < 0.51 * chosen(Int8Cache(), x).scale * 1.01).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_not_seen_is_clipped_to_the_ends_and_never_wraps_around(symmetric):
    grid = chosen(Int8Cache(symmetric=symmetric), numbers())
    far = np.full((1, HEADS, DIM), 1e30, F32)
    assert (grid.codes(far) == 127).all()
    assert (grid.codes(-far) == -128).all()
    assert (grid.codes(np.full_like(far, np.inf)) == 127).all()


def test_half_a_step_goes_to_the_even_code():
    grid = CacheGrid(np.ones((1, 6), F32), np.zeros((1, 6), np.int8))
    assert grid.codes(np.array([[[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]], F32)).tolist() == [[[0, 2, 2, 0, -2, -2]]]


@ALL
def test_permuting_heads_permutes_the_grid(setting):
    x, order = numbers(), [2, 0, 1]
    moved = np.ascontiguousarray(heads(x)[:, order]).reshape(len(x), -1)
    plain, permuted = chosen(setting, x), chosen(setting, moved)
    assert np.array_equal(plain.scale[order], permuted.scale)
    assert np.array_equal(plain.offset[order], permuted.offset)
    assert np.array_equal(plain.codes(heads(x))[:, order], permuted.codes(heads(moved)))


@ALL
def test_twice_the_numbers_have_twice_the_scales_and_the_same_codes(setting):
    x = numbers()
    once, twice = chosen(setting, x), chosen(setting, 2 * x)
    assert np.array_equal(2 * once.scale, twice.scale)
    assert np.array_equal(once.offset, twice.offset)
    assert np.array_equal(once.codes(heads(x)), twice.codes(heads(2 * x)))


@ALL
def test_scales_are_bfloat16_values_and_a_head_has_one_if_it_was_asked_for(setting):
    grid = chosen(setting, numbers())
    assert is_bfloat16(grid.scale)
    assert (grid.scale > 0).all()
    assert (len(np.unique(grid.scale[0])) == 1) == (setting.keys == "head")


@ALL
def test_channels_that_were_never_active_stay_zero(setting):
    x = numbers()
    x[:, :DIM] = 0
    grid = chosen(setting, x)
    assert (grid.scale[0] == 1).all()
    assert (grid.values(grid.codes(heads(x)))[:, 0] == 0).all()
    tiny = np.full_like(x, 1e-45)
    assert np.isfinite(chosen(setting, tiny).values(chosen(setting, tiny).codes(heads(tiny)))).all()


def test_mse_errs_least_and_percentile_clips_what_lies_outside():
    x = numbers(tokens=20000)
    x[7, 3] = 6 * np.abs(x[:, 3]).std() + np.abs(x[:, 3]).mean()  # rare enough to be worth clipping
    stats = RangeStats.observe(x, rows=20000)
    errors = {}
    for method in ("absmax", "percentile", "mse"):
        grid = Int8Cache(method=method, percentile=99.8).cache(stats, stats, HEADS).key
        errors[method] = np.square(grid.values(grid.codes(heads(x))) - heads(x)).sum(axis=0, dtype=np.float64).reshape(-1)
    assert (errors["mse"] <= errors["absmax"] * (1 + 1e-6)).all()
    assert errors["mse"][3] < 0.95 * errors["absmax"][3]
    x[7, 3] = 400
    grid = chosen(Int8Cache(method="percentile", percentile=99.8), x)
    assert 127 * grid.scale.reshape(-1)[3] < 100


@ALL
@pytest.mark.parametrize("end", [-400, 400])
def test_an_outlier_that_the_sample_missed_is_not_clipped_as_if_it_did_not_exist(setting, end):
    """At the 100th percentile, which clips nothing that it knows of."""
    x = numbers(tokens=5000)
    sample = RangeStats.observe(x, rows=50).sample
    x[3000, 3] = end
    stats = dataclasses.replace(RangeStats.observe(x), sample=sample)
    grid = dataclasses.replace(setting, percentile=100).cache(stats, stats, HEADS).key
    held = grid.values(grid.codes(heads(x[3000:3001])))[0, 0, 3]
    assert held == pytest.approx(end, rel=0.05)


def test_statistics_merge_in_any_order_and_grouping():
    x = numbers()
    whole = RangeStats.observe(x, rows=50)
    parts = [RangeStats.observe(x[start:stop], rows=50, start=start) for start, stop in ((0, 7), (7, 130), (130, 300))]
    for order in itertools.permutations(parts):
        for merged in (order[0].merge(order[1]).merge(order[2]), order[0].merge(order[1].merge(order[2]))):
            assert merged.tokens == whole.tokens
            for name in ("low", "high"):
                assert np.array_equal(getattr(merged, name), getattr(whole, name))
            assert np.array_equal(merged.sample.rows, whole.sample.rows)


def test_statistics_of_different_caches_and_of_broken_numbers_are_refused():
    x = numbers()
    with pytest.raises(ValueError, match="different"):
        RangeStats.observe(x).merge(RangeStats.observe(x[:, 1:]))
    with pytest.raises(ValueError, match="different"):
        RangeStats.observe(x).merge(RangeStats.observe(x, rows=3))
    for bad in (np.nan, np.inf, -np.inf):
        x[5, 6] = bad
        with pytest.raises(DataError, match=r"block 1: keys: 1 of 24 channels.*first: 6"):
            RangeStats.observe(x, where="block 1: keys")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keys": "token"}, "int8.keys: got 'token', wanted channel or head"),
        ({"values": 1}, "int8.values: got 1"),
        ({"symmetric": "yes"}, "int8.symmetric: got 'yes'"),
        ({"method": "max"}, "int8.method: got 'max', wanted absmax, percentile or mse"),
        ({"percentile": 12}, "int8.percentile: got 12, wanted a number from 50 to 100"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, told):
    with pytest.raises(RecipeError) as error:
        Int8Cache(**settings)
    assert told in str(error.value)
