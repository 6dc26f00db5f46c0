"""calibration/statistics.py: merging is a commutative monoid, scaling is exact, and a NaN is never averaged away."""

import copy
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.calibration.statistics import (
    PIECE_TOKENS,
    InputStats,
    Needs,
    StatsBuilder,
    row_keys,
    token_weights,
)
from ms_pangu_quant.errors import DataError


def same(one, other):
    """Bit for bit."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("absmax", "gram", "squares")]
    return one.tokens == other.tokens and all(
        (a is None and b is None) or (a is not None and b is not None and a.tobytes() == b.tobytes()) for a, b in pairs
    )


@st.composite
def batches(draw, least=1):
    """[tokens, channels] batches of small integers, whose products and sums are exact in float32; some are empty."""
    channels = draw(st.integers(1, 5))
    rows = st.lists(st.integers(-50, 50), min_size=channels, max_size=channels)
    drawn = draw(st.lists(st.lists(rows, max_size=5), min_size=least, max_size=5))
    return [np.array(batch, np.float32).reshape(-1, channels) for batch in drawn]


def test_a_hand_computed_example():
    stats = InputStats.observe(np.array([[1, -3], [-2, 0.5], [0, 2]], np.float32), gram=True)
    assert stats.tokens == 3
    assert stats.absmax.tolist() == [2, 3]
    assert stats.gram.tolist() == [[5, -4], [-4, 13.25]]
    assert (stats.absmax.dtype, stats.gram.dtype) == (np.float32, np.float32)
    assert InputStats.observe(np.ones((1, 2), np.float32)).gram is None


@given(batches(), st.booleans())
def test_merging_batches_equals_observing_all_of_them_at_once(parts, gram):
    whole = InputStats.observe(np.concatenate(parts), gram=gram)
    assert same(functools.reduce(InputStats.merge, (InputStats.observe(part, gram=gram) for part in parts)), whole)


@given(batches(least=3), st.booleans())
def test_merge_is_associative_and_commutative(parts, gram):
    one, two, three = (InputStats.observe(part, gram=gram) for part in parts[:3])
    assert same(one.merge(two).merge(three), one.merge(two.merge(three)))
    assert same(one.merge(two), two.merge(one))


@given(batches(least=2), st.randoms(use_true_random=False))
def test_the_order_of_batches_does_not_matter(parts, random):
    stats = [InputStats.observe(part, gram=True) for part in parts]
    whole = functools.reduce(InputStats.merge, stats)
    random.shuffle(stats)
    assert same(functools.reduce(InputStats.merge, stats), whole)


@given(batches(), st.data())
def test_scaling_by_powers_of_two_equals_observing_scaled_inputs_bit_for_bit(parts, data):
    x = np.concatenate(parts)
    exponents = data.draw(st.lists(st.integers(-20, 20), min_size=x.shape[1], max_size=x.shape[1]))
    s = np.float32(2.0) ** np.array(exponents, np.float32)
    assert same(InputStats.observe(x, gram=True).scaled(s), InputStats.observe(x / s, gram=True))


@pytest.mark.parametrize("seed", range(5))
def test_scaling_by_anything_equals_observing_scaled_inputs_to_float32_rounding(seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(40, 6)).astype(np.float32)
    s = generator.lognormal(sigma=3, size=6).astype(np.float32)
    scaled, observed = InputStats.observe(x, gram=True).scaled(s), InputStats.observe(x / s, gram=True)
    assert scaled.tokens == observed.tokens
    assert scaled.absmax.dtype == np.float32
    np.testing.assert_allclose(scaled.absmax, observed.absmax, rtol=1e-6)
    size = np.sqrt(np.outer(np.diag(observed.gram), np.diag(observed.gram)))
    assert (np.abs(scaled.gram - observed.gram) <= 1e-6 * size).all()


@pytest.mark.parametrize("seed", range(3))
def test_scaling_and_merging_may_be_swapped(seed):
    generator = np.random.default_rng(seed)
    one, two = (InputStats.observe(generator.normal(size=(9, 4)).astype(np.float32), gram=True) for _ in range(2))
    s = (2.0 ** generator.integers(-5, 6, 4)).astype(np.float32)
    assert same(one.merge(two).scaled(s), one.scaled(s).merge(two.scaled(s)))


def test_the_gram_is_accurate_to_float32():
    x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    gram = InputStats.observe(x, gram=True).gram
    exact = x.astype(np.float64).T @ x.astype(np.float64)
    np.testing.assert_allclose(gram, exact, rtol=0, atol=1e-5 * np.diag(exact).max())


def test_a_long_sum_of_grams_is_accurate_in_every_channel_whatever_the_others_size():
    """Why sums in float32 are enough: an error is small beside the two channels it is of, and so are those of what is
    factorised (docs/recipes.md)."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 20, 8)) * np.float32(10.0) ** np.arange(-4, 4)
    x[3, 0] *= 1000  # a massive token
    parts = x.astype(np.float32)
    gram = functools.reduce(InputStats.merge, (InputStats.observe(part, gram=True) for part in parts)).gram
    whole = parts.reshape(-1, 8).astype(np.float64)
    exact = whole.T @ whole
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(gram - exact) <= 5e-6 * size).all()


def test_extremes_and_squares_are_those_of_all_rows_in_their_order_whatever_the_pieces():
    x = np.random.default_rng(0).normal(size=(300, 1100)).astype(np.float32)
    x[7, 3], x[200, 4] = -9, 9
    stats = InputStats.observe(x)
    assert np.array_equal(stats.absmax, np.abs(x).max(axis=0))
    assert np.array_equal(stats.squares, np.add.accumulate(x.astype(np.float64) ** 2)[-1])  # one row after another


def test_no_rows_are_the_neutral_element():
    none = InputStats.observe(np.empty((0, 3), np.float32), gram=True)
    some = InputStats.observe(np.array([[1, -2, 0]], np.float32), gram=True)
    assert none.absmax.tolist() == [0, 0, 0]
    assert same(none.merge(some), some)
    assert same(some.merge(none), some)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("gram", [False, True])
def test_a_nan_or_an_infinity_is_refused_naming_place_and_channel(bad, gram):
    x = np.ones((4, 6), np.float32)
    x[2, 3] = x[1, 5] = bad
    with pytest.raises(DataError, match=r"^block 7 mlp_input: 2 of 6 channels .*first: 3"):
        InputStats.observe(x, gram=gram, where="block 7 mlp_input")


def test_statistics_of_different_inputs_do_not_merge():
    wide, narrow = (InputStats.observe(np.ones((2, size), np.float32)) for size in (3, 4))
    with_gram = InputStats.observe(np.ones((2, 3), np.float32), gram=True)
    for one, other in ((wide, narrow), (wide, with_gram), (with_gram, wide)):
        with pytest.raises(ValueError, match="do not merge"):
            one.merge(other)


def test_observing_scaling_and_merging_leave_their_inputs_alone():
    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    before = x.copy()
    stats = InputStats.observe(x, gram=True)
    kept = copy.deepcopy(stats)
    stats.scaled(np.full(3, 2, np.float32))
    stats.merge(stats)
    assert (x == before).all()
    assert same(stats, kept)


# --- the sample of rows, and statistics built in place ----------------------------------------------------------------


def in_pieces(x, cuts, rows):
    """Statistics of x observed in pieces that end at `cuts`, each knowing its place."""
    edges = [0, *sorted(cuts), len(x)]
    return [InputStats.observe(x[start:stop], rows=rows, start=start) for start, stop in itertools.pairwise(edges)]


@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_which_rows_are_kept_depends_neither_on_the_pieces_nor_on_their_order(rows):
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    whole = InputStats.observe(x, rows=rows).sample
    assert len(whole.rows) == min(rows, 60)
    for cuts in ([20], [1, 2, 59], [10, 10, 30]):
        parts = in_pieces(x, cuts, rows)
        for order in (parts, parts[::-1], [*parts[1:], parts[0]]):
            merged = functools.reduce(InputStats.merge, order).sample
            assert merged.rows.tobytes() == whole.rows.tobytes()
            assert merged.keys.tobytes() == whole.keys.tobytes()


def test_every_row_is_kept_equally_often():
    """Over many disjoint ranges of places: a place's share is rows / tokens to within chance (5 sigma)."""
    counts = np.zeros(20)
    for start in range(0, 20 * 2000, 20):
        counts[np.argsort(row_keys(start, 20))[:5]] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_keys_of_different_rows_differ():
    assert len(np.unique(row_keys(0, 100_000))) == 100_000


def test_the_sample_scales_with_the_rest():
    x = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    s = np.array([1, 2, 0.5, 3], np.float32)
    scaled, observed = InputStats.observe(x, rows=9).scaled(s).sample, InputStats.observe(x / s, rows=9).sample
    assert scaled.rows.tobytes() == observed.rows.tobytes()
    assert scaled.keys.tobytes() == observed.keys.tobytes()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("channels", [3, 1500])
def test_a_gram_added_up_in_strips_is_the_products_sum(channels, bfloat16):
    x = np.random.default_rng(2).integers(-9, 10, size=(12, channels)).astype(np.float32)  # exact in float32
    builder = StatsBuilder(Needs(gram=True, bfloat16=bfloat16), "here")
    builder.add(x, x + 1)
    builder.add(x, x + 1)
    built = builder.finish()
    assert np.array_equal(built.gram, 2 * x.astype(np.float64).T @ x.astype(np.float64))
    assert np.array_equal(built.drift, np.broadcast_to(2 * x.sum(axis=0), (channels, channels)))


@pytest.mark.parametrize("sizes", [[5], [PIECE_TOKENS + 1], [700] * 7, [PIECE_TOKENS, 1, 1, 3000]])
def test_building_is_merging(sizes):
    generator = np.random.default_rng(3)
    parts = [generator.integers(-9, 10, size=(size, 4)).astype(np.float32) for size in sizes]
    builder = StatsBuilder(Needs(gram=True, rows=50), "here")
    for part in parts:
        builder.add(part)
        part[:] = np.nan  # what was added is the builder's own
    built = builder.finish()
    generator = np.random.default_rng(3)
    whole = np.concatenate([generator.integers(-9, 10, size=(size, 4)).astype(np.float32) for size in sizes])
    observed = InputStats.observe(whole, gram=True, rows=50)
    assert same(built, observed)
    assert built.sample.rows.tobytes() == observed.sample.rows.tobytes()


def test_a_builder_that_saw_nothing_or_a_nan_says_so():
    with pytest.raises(ValueError, match="no statistics"):
        StatsBuilder(Needs(gram=True), "here").finish()
    builder = StatsBuilder(Needs(gram=True), "block 3: mlp_input")
    with pytest.raises(DataError, match=r"^block 3: mlp_input: 3 of 3 channels"):
        builder.add(np.full((2, 3), np.nan, np.float32))


def test_the_drift_is_the_float_models_difference_times_the_input():
    generator = np.random.default_rng(4)
    x, y = (generator.integers(-9, 10, size=(3000, 5)).astype(np.float32) for _ in range(2))
    builder = StatsBuilder(Needs(gram=True), "here")
    for start in range(0, 3000, 500):
        builder.add(x[start : start + 500], y[start : start + 500])
    built = builder.finish()
    assert np.array_equal(built.drift, (y - x).astype(np.float64).T @ x)
    assert np.array_equal(built.squares, np.diag(built.gram))
    s = np.array([1, 2, 4, 0.5, 8], np.float32)
    scaled = StatsBuilder(Needs(gram=True), "here")
    scaled.add(x / s, y / s)
    assert np.array_equal(built.scaled(s).drift, scaled.finish().drift)
    assert np.array_equal(built.merge(built).drift, 2 * built.drift)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_outputs_drift_is_the_weight_times_the_inputs(bfloat16):
    generator = np.random.default_rng(4)
    x, y = (generator.integers(-9, 10, size=(3000, 5)).astype(np.float32) for _ in range(2))
    weight = generator.integers(-3, 4, size=(2, 5)).astype(np.float32)  # exact in bfloat16 too, and its products
    whole, of_outputs = (StatsBuilder(Needs(gram=True, bfloat16=bfloat16), "here", weight=each) for each in (None, weight))
    for start in range(0, 3000, 500):
        for builder in (whole, of_outputs):
            builder.add(x[start : start + 500], y[start : start + 500])
    built, small = whole.finish(), of_outputs.finish()
    assert small.drift is None
    assert np.array_equal(small.gram, built.gram)
    assert np.array_equal(small.output_drift, weight @ built.drift)
    assert np.array_equal(small.merge(small).output_drift, 2 * small.output_drift)
    s = np.array([1, 2, 4, 0.5, 8], np.float32)
    assert np.array_equal(small.scaled(s).output_drift, (weight * s) @ built.scaled(s).drift)
    assert (Needs(bfloat16=True) | Needs()).bfloat16


def test_weights_are_those_of_rows_in_gram_and_drift_and_nowhere_else():
    generator = np.random.default_rng(5)
    x, y = (generator.integers(-9, 10, size=(3000, 5)).astype(np.float32) for _ in range(2))
    weights = np.exp2(generator.integers(-3, 3, size=(3000, 1))).astype(np.float32)
    weighted, plain, multiplied = (StatsBuilder(Needs(gram=True, rows=9), "here") for _ in range(3))
    for start in range(0, 3000, 500):
        rows = slice(start, start + 500)
        weighted.add(x[rows], y[rows], weights[rows])
        plain.add(x[rows], y[rows])
        multiplied.add(x[rows] * weights[rows], y[rows] * weights[rows])
    built, raw, wanted = (each.finish() for each in (weighted, plain, multiplied))
    assert np.array_equal(built.gram, wanted.gram)
    assert np.array_equal(built.drift, wanted.drift)
    assert np.array_equal(built.absmax, raw.absmax)
    assert np.array_equal(built.squares, raw.squares)
    assert np.array_equal(built.sample.rows, raw.sample.rows)


def test_what_a_token_counts_follows_its_size_and_nothing_else():
    generator = np.random.default_rng(6)
    states = generator.normal(size=(7, 64)).astype(np.float32) * np.exp2(np.arange(7, dtype=np.float32))[:, None]
    turned = (states @ np.linalg.qr(generator.normal(size=(64, 64)))[0]).astype(np.float32)
    for temper in (0.0, 0.5, 1.0):
        weights = token_weights(states, temper)
        assert (weights.shape, weights.dtype) == ((7, 1), np.float32)
        np.testing.assert_allclose(token_weights(turned, temper), weights, rtol=1e-5)  # the same in a rotated stream
        np.testing.assert_allclose(token_weights(4 * states, temper) * 4**temper, weights, rtol=1e-5)
    assert np.array_equal(token_weights(states, 0.0), np.ones((7, 1)))
    evened = states * token_weights(states, 1.0)
    np.testing.assert_allclose(np.square(evened).mean(axis=1), 1, rtol=1e-5)
    assert token_weights(np.zeros((2, 4), np.float32), 1.0).tolist() == [[1], [1]]
    assert (Needs(temper=0.5) | Needs(data=True)).temper == 0.5


@pytest.mark.parametrize("drift", [False, True])
def test_held_out_rows_are_in_nothing_else_and_do_not_depend_on_the_pieces_or_their_order(drift):
    generator = np.random.default_rng(12)
    x, y, held, held_y = generator.normal(size=(4, 90, 3)).astype(np.float32)
    weights = generator.lognormal(size=(90, 1)).astype(np.float32)

    def build(start, pieces):
        builder = StatsBuilder(Needs(gram=True, rows=4, held_out=20), "here", start=start, held_out_start=1000 + start)
        for piece in pieces:
            rows = slice(start + piece[0], start + piece[1])
            builder.add(x[rows], y[rows] if drift else None, weights[rows])
            builder.hold_out(held[rows], held_y[rows] if drift else None, weights[rows])
        return builder.finish()

    whole = build(0, [(0, 90)])
    alone = StatsBuilder(Needs(gram=True, rows=4), "here")
    alone.add(x, y if drift else None, weights)
    assert same(whole, alone.finish())
    assert whole.held_out.rows.shape == (20, 3)
    kept = [int(np.flatnonzero((held * weights == row).all(axis=1))[0]) for row in whole.held_out.rows]
    assert len(set(kept)) == 20
    if drift:
        assert np.array_equal(whole.held_out_drift.rows, ((held_y - held) * weights)[kept])
    else:
        assert whole.held_out_drift is None
    one, two = build(0, [(0, 7), (7, 40)]), build(40, [(0, 50)])
    for merged in (one.merge(two), two.merge(one)):
        assert np.array_equal(merged.held_out.rows, whole.held_out.rows)
    s = generator.lognormal(size=3).astype(np.float32)
    assert np.array_equal(whole.scaled(s).held_out.rows, whole.held_out.rows / s)
    if drift:
        assert np.array_equal(whole.scaled(s).held_out_drift.rows, whole.held_out_drift.rows / s)


def test_a_share_of_the_data_without_held_out_texts_merges_with_one_that_has_some():
    builders = [StatsBuilder(Needs(gram=True, held_out=5), "here") for _ in range(2)]
    for builder in builders:
        builder.add(np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32))
    builders[1].hold_out(np.full((4, 2), 7, np.float32), np.zeros((4, 2), np.float32))
    one, two = (builder.finish() for builder in builders)
    assert one.merge(two).held_out.rows.tolist() == [[7, 7]] * 4
    assert one.merge(two).held_out_drift.rows.tolist() == [[-7, -7]] * 4
