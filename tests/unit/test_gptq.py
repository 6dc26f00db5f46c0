"""quantizers/gptq.py: the paper's algorithm, integer for integer, and its laws."""

import dataclasses
import itertools

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ms_pangu_quant.calibration.statistics import InputStats, Needs, StatsBuilder, token_weights
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.kernels.library import PATHS, SETTING, library
from ms_pangu_quant.quantizers import gptq
from ms_pangu_quant.quantizers.cholesky import cholesky, solver
from ms_pangu_quant.quantizers.clip import mse_scale
from ms_pangu_quant.quantizers.gptq import _DAMPINGS, _RIDGE, Gptq, HeldOut, checked_diagonal, factorise, gptq_codes
from ms_pangu_quant.quantizers.grid import is_bfloat16, weight_scale
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.quantizers.threads import in_parallel
from ms_pangu_quant.recipe.scheme import PRESETS, TensorScheme

SCHEMES = {
    "w8 channel": PRESETS["w8a8"].weight,
    "w4 channel": PRESETS["w4a8"].weight,
    "w4 channel, full": PRESETS["w4a8"].with_range(full_range=True).weight,
    "w4 group 12": TensorScheme(4, "group", group_size=12),
    "w4 group 12, full": TensorScheme(4, "group", group_size=12, full_range=True),
}
IN, OUT = 96, 20


def layer(seed=0, channels=IN, outputs=OUT, tokens=400, spread=1.0):
    """A weight and the statistics of correlated inputs of very different sizes."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(channels, channels)) * generator.lognormal(sigma=spread, size=channels)
    x = (generator.normal(size=(tokens, channels)) @ mix).astype(np.float32)
    weight = (generator.normal(size=(outputs, channels)) * generator.lognormal(size=channels)).astype(np.float32)
    return weight, InputStats.observe(x, gram=True)


@pytest.fixture
def exact(monkeypatch):
    """In float64: the codes are those of the mathematics, not of its rounding."""
    monkeypatch.setattr(gptq, "PRECISION", np.float64)


def correction(weight, gram, drift):
    order = np.arange(len(gram))
    return gptq.correction(weight, drift, factorise(gram, order[::-1], _RIDGE)[0], order)


def output_error(weight, quantized, stats):
    """Squared error of the layer's outputs, summed over tokens and outputs."""
    error = weight - quantized.dequantize().astype(np.float64)
    return float(np.einsum("oi,ij,oj->", error, stats.gram, error))


def published(weight, gram, scale, scheme, damping, act_order):
    """Codes by the paper's equations (arXiv:2210.17323, sec. 3, eq. 2 and 3), one row and one weight at a time.

    The inverse Hessian is updated by Gaussian elimination as each weight leaves: no Cholesky, no blocks.
    """
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
    width = weight.shape[1] // scale.shape[1]
    hessian = 2 * (gram + damping * np.diag(gram).mean() * np.eye(len(gram)))
    codes = np.zeros(weight.shape, np.int64)
    for row in range(len(weight)):
        w, inverse = weight[row].astype(np.float64), np.linalg.inv(hessian)
        for q in order:
            step = float(scale[row, q // width])
            codes[row, q] = np.clip(np.rint(w[q] / step), scheme.code_min, scheme.code_max)
            w -= (w[q] - codes[row, q] * step) / inverse[q, q] * inverse[:, q]
            inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_are_those_of_the_papers_equations(scheme, act_order, exact):
    weight, stats = layer(seed=1)
    made = Gptq(damping=0.01, act_order=act_order, scale="absmax")(weight, scheme, stats)
    assert np.array_equal(made.scale, weight_scale(weight, scheme))
    assert (made.codes == published(weight, stats.gram, made.scale, scheme, 0.01, act_order)).all()
    assert (made.codes != RoundToNearest()(weight, scheme, None).codes).mean() > 0.05


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_block_size_changes_no_integer(scheme, exact):
    weight, stats = layer(seed=2, channels=204, outputs=48)
    order = np.argsort(-np.diag(stats.gram))
    factor, _ = factorise(stats.gram, order[::-1], 0.01)
    scale = weight_scale(weight, scheme)
    whole = gptq_codes(weight, scale, scheme, factor, order, block=204)
    for block in (1, 7, 32, 64, 128):
        assert np.array_equal(gptq_codes(weight, scale, scheme, factor, order, block=block), whole)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_with_uncorrelated_inputs_it_is_round_to_nearest(scheme, act_order):
    weight, _ = layer(seed=3)
    weight[0, :12] = np.arange(12) - 5.5  # ties: halves of the scale
    weight[0, 12] = scheme.divisor
    diagonal = np.random.default_rng(3).lognormal(sigma=3, size=IN)
    stats = InputStats(9, np.ones(IN, np.float32), np.diag(diagonal), squares=diagonal)
    for choice in ("absmax", "mse"):
        made = Gptq(scale=choice, act_order=act_order)(weight, scheme, stats)
        nearest = RoundToNearest(choice, weighted=choice == "mse")(weight, scheme, stats)
        assert np.array_equal(made.codes, nearest.codes)
        assert np.array_equal(made.scale, nearest.scale)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_float32_gives_the_codes_of_float64_or_as_good_ones(scheme, monkeypatch):
    weight, stats = layer(seed=40, channels=384, outputs=64, tokens=300, spread=2.0)
    made = Gptq()(weight, scheme, stats)
    monkeypatch.setattr(gptq, "PRECISION", np.float64)
    wanted = Gptq()(weight, scheme, stats)
    assert (made.codes != wanted.codes).mean() < 0.01
    assert output_error(weight, made, stats) < 1.01 * output_error(weight, wanted, stats)


@pytest.mark.parametrize("settings", [{}, {"damping": "auto"}, {"correct": True, "strength": "auto", "damping": "auto"}])
def test_some_rows_of_a_weight_are_rounded_as_they_are_among_all(settings):
    """What is chosen for an input is chosen on all that read it, whoever rounds which of them."""
    weight, stats, _ = few(seed=41)
    if "correct" not in settings:
        stats = dataclasses.replace(stats, drift=None, held_out_drift=None)
    scheme = SCHEMES["w4 group 12"]
    whole = Gptq(**settings)(weight, scheme, stats)
    for rows in (slice(0, 7), slice(7, OUT)):
        part = Gptq(**settings)(weight, scheme, stats, rows)
        assert np.array_equal(part.codes, whole.codes[rows])
        np.testing.assert_allclose(part.scale, whole.scale[rows], rtol=1e-5)  # of other products


def test_act_order_keeps_every_channel_in_its_own_group():
    """Static groups: scales and layout are those without act_order; only the order of rounding differs."""
    weight, stats = layer(seed=4)
    scheme = SCHEMES["w4 group 12"]
    ordered, plain = (Gptq(act_order=flag, scale="absmax")(weight, scheme, stats) for flag in (True, False))
    assert np.array_equal(ordered.scale, plain.scale)
    assert (ordered.codes != plain.codes).any()
    grouped = np.abs(weight - ordered.dequantize()).reshape(OUT, -1, 12) / ordered.scale[..., None]
    assert np.median(grouped) < 0.5  # in a wrong group the codes would have nothing to do with the weights


def test_renaming_the_channels_renames_the_codes():
    """With act_order the result does not depend on the order in which channels are stored."""
    weight, stats = layer(seed=5)
    shuffle = np.random.default_rng(5).permutation(IN)
    other = InputStats(stats.tokens, stats.absmax[shuffle], stats.gram[np.ix_(shuffle, shuffle)])
    scheme = SCHEMES["w4 channel"]
    one, two = Gptq()(weight, scheme, stats), Gptq()(weight[:, shuffle], scheme, other)
    assert np.array_equal(one.codes[:, shuffle], two.codes)


def test_rows_are_rounded_without_regard_to_each_other(monkeypatch):
    weight, stats = layer(seed=6)
    whole = Gptq(sweeps=1)(weight, SCHEMES["w4 group 12"], stats)
    monkeypatch.setattr("ms_pangu_quant.quantizers.gptq._PIECE_ELEMENTS", 3 * IN)
    monkeypatch.setattr("ms_pangu_quant.quantizers.refine._PIECE_ELEMENTS", 5 * IN)
    pieces = Gptq(sweeps=1)(weight, SCHEMES["w4 group 12"], stats)
    assert np.array_equal(whole.codes, pieces.codes)
    np.testing.assert_allclose(whole.scale, pieces.scale, rtol=1e-6)


def test_a_gram_times_a_constant_gives_the_same_codes():
    weight, stats = layer(seed=7)
    louder = InputStats(stats.tokens, stats.absmax * 2, stats.gram * 4)
    one, two = (Gptq(sweeps=1)(weight, SCHEMES["w4 channel"], seen) for seen in (stats, louder))
    assert np.array_equal(one.codes, two.codes)
    assert np.array_equal(one.scale, two.scale)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_channel_that_was_never_active_is_rounded_to_nearest_and_disturbs_no_other(scheme):
    weight, stats = layer(seed=8)
    gram = stats.gram.copy()
    gram[[5, 40]], gram[:, [5, 40]] = 0, 0
    for damping in (0.0, 0.01):
        made = Gptq(damping=damping, scale="absmax")(weight, scheme, InputStats(1, stats.absmax, gram))
        nearest = RoundToNearest()(weight, scheme, None)
        assert np.array_equal(made.codes[:, [5, 40]], nearest.codes[:, [5, 40]])
        assert made.note == ""


def test_int8_scales_stay_values_that_bfloat16_holds():
    weight, stats = layer(seed=9)
    for settings in (Gptq(), Gptq(scale="absmax"), Gptq(sweeps=2)):
        assert is_bfloat16(settings(weight, PRESETS["w8a8"].weight, stats).scale)


def test_more_channels_than_tokens_are_damped_and_the_note_says_so():
    weight, stats = layer(seed=10, tokens=IN // 3)
    assert Gptq(damping=0.01)(weight, SCHEMES["w4 channel"], stats).note == ""
    flat = np.ones((IN, IN))  # rank 1, exactly
    made = Gptq(damping=0)(weight, SCHEMES["w4 channel"], InputStats(1, np.ones(IN, np.float32), flat))
    assert made.note == "damping raised from 0 to 1e-06"
    same = Gptq(damping=1e-6)(weight, SCHEMES["w4 channel"], InputStats(1, np.ones(IN, np.float32), flat))
    assert np.array_equal(made.codes, same.codes)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_a_diagonal_that_is_no_sum_of_squares_raises(value):
    weight, stats = layer(seed=11)
    stats.gram[7, 7] = value
    with pytest.raises(DataError, match=r"1 of 96 diagonal values .*first: channel 7"):
        Gptq()(weight, SCHEMES["w4 channel"], stats)


def test_a_gram_that_is_far_from_semidefinite_raises():
    weight, _ = layer(seed=12)
    gram = np.full((IN, IN), 5.0)
    np.fill_diagonal(gram, 1.0)
    with pytest.raises(DataError, match="not semidefinite"):
        Gptq()(weight, SCHEMES["w4 channel"], InputStats(1, np.ones(IN, np.float32), gram))


def test_the_factor_is_the_damped_grams():
    _, stats = layer(seed=13)
    order = np.random.default_rng(13).permutation(IN)
    factor, damping = factorise(stats.gram, order, 0.02)
    lower = np.tril(factor).astype(np.float64)
    assert damping == 0.02
    damped = (stats.gram + 0.02 * np.diag(stats.gram).mean() * np.eye(IN))[np.ix_(order, order)]
    size = np.sqrt(np.outer(np.diag(damped), np.diag(damped)))
    assert (np.abs(lower @ lower.T - damped) < 1e-5 * size).all()
    assert (checked_diagonal(stats.gram) == np.diag(stats.gram)).all()


def test_what_a_factor_solves_is_the_matrix_inverse():
    x, rows = (np.random.default_rng(seed).normal(size=(count, 900)) for seed, count in ((0, 2000), (1, 7)))
    lower, solved = x.T @ x, rows.copy()
    assert cholesky(lower)
    solver(lower)(solved)
    np.testing.assert_allclose(solved @ (x.T @ x), rows, atol=1e-9)


def test_the_correction_is_the_same_for_few_outputs_and_for_many():
    """Which product comes first depends on how many there are."""
    weight, _, _, stats = drifted(seed=42)
    many = np.concatenate([weight] * 9)
    step = correction(weight, stats.gram, stats.drift)
    assert len(weight) < IN < len(many)
    np.testing.assert_allclose(
        correction(many, stats.gram, stats.drift)[: len(weight)], step, atol=1e-4 * np.abs(step).max()
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 511, 512, 1000, 1500])
def test_the_blocked_factorisation_is_lapacks(size, dtype):
    x = np.random.default_rng(size).normal(size=(2 * size, size))
    whole = (x.T @ x).astype(dtype)
    wanted = np.linalg.cholesky(whole.astype(np.float64))
    made = whole.copy()
    assert cholesky(made)
    accuracy = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(np.tril(made), wanted, atol=accuracy * np.abs(wanted).max())
    torn = whole.copy()
    torn[size // 2, size // 2] = -1
    assert not cholesky(torn)


def test_a_factor_has_the_same_bits_with_any_number_of_threads():
    x = np.random.default_rng(0).normal(size=(900, 1100)).astype(np.float32)
    gram, made = x.T @ x, []
    for threads in (1, 2, 3):
        with threadpool_limits(threads, user_api="blas"):
            factor, _ = factorise(gram, np.arange(1100), 0.01)
            made.append(np.tril(factor).tobytes())
    assert len(set(made)) == 1


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_sweep_lowers_what_it_minimises(scheme):
    """tr(E G E^T) with the damped gram; the first sweep visibly, none ever the other way."""
    weight, stats = layer(seed=14)
    damping = 0.01
    damped = InputStats(1, stats.absmax, stats.gram + damping * np.diag(stats.gram).mean() * np.eye(IN))
    errors = [output_error(weight, Gptq(sweeps=n)(weight, scheme, stats), damped) for n in range(5)]
    assert errors[1] < errors[0]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))


def test_no_single_code_can_be_bettered_after_enough_sweeps():
    weight, stats = layer(seed=15)
    scheme = SCHEMES["w4 group 12"]
    made = Gptq(sweeps=30)(weight, scheme, stats)
    damped = stats.gram + 0.01 * np.diag(stats.gram).mean() * np.eye(IN)
    error = weight - made.dequantize().astype(np.float64)
    steps = np.repeat(made.scale.astype(np.float64), 12, axis=1)
    gradient = error @ damped
    for step in (-1, 1):  # a code moved by one step changes the error by -step * scale
        allowed = (made.codes + step >= scheme.code_min) & (made.codes + step <= scheme.code_max)
        change = -2 * step * steps * gradient + steps**2 * np.diag(damped)
        assert (change[allowed] >= -1e-6 * np.abs(gradient * steps).max()).all()


def test_rounding_is_pure():
    weight, stats = layer(seed=16)
    before, gram = weight.copy(), stats.gram.copy()
    one, two = (Gptq(sweeps=1)(weight, SCHEMES["w4 group 12"], stats) for _ in range(2))
    assert one.codes.tobytes() == two.codes.tobytes()
    assert one.scale.tobytes() == two.scale.tobytes()
    assert np.array_equal(weight, before)
    assert np.array_equal(stats.gram, gram)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"damping": -0.1}, "gptq.damping: got -0.1"),
        ({"damping": 2}, "gptq.damping: got 2"),
        ({"strength": -0.5}, "gptq.strength: got -0.5"),
        ({"strength": "most"}, "gptq.strength: got 'most', wanted a number or auto"),
        ({"temper": 1.5}, "gptq.temper: got 1.5"),
        ({"sweeps": -1}, "gptq.sweeps: got -1"),
        ({"sweeps": 0.5}, "gptq.sweeps: got 0.5"),
        ({"correct": 1}, "gptq.correct: got 1"),
        ({"scale": "max"}, "gptq.scale: got 'max', wanted absmax or mse"),
    ],
)
def test_senseless_settings_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        Gptq(**settings)


# --- aiming at the float model ----------------------------------------------------------------------------------------


def drifted(seed, tokens=400, noise=0.3):
    """A weight, what its input is when served x and in the float model y, and the statistics of both."""
    weight, _ = layer(seed=seed)
    generator = np.random.default_rng(seed)
    y = (generator.normal(size=(tokens, IN)) @ generator.normal(size=(IN, IN))).astype(np.float32)
    x = y @ (np.eye(IN) + noise * generator.normal(size=(IN, IN)) / np.sqrt(IN)) + generator.normal(size=y.shape) * noise
    builder = StatsBuilder(Needs(gram=True), "here")
    builder.add(x.astype(np.float32), y)
    return weight, x.astype(np.float32).astype(np.float64), y.astype(np.float64), builder.finish()


def test_the_corrected_weight_is_the_ridge_regression_on_the_float_models_output():
    """Solved here from the data itself, stacked with the rows that hold it to the weight; not from gram and drift."""
    weight, x, y, stats = drifted(seed=20)
    ridge = np.sqrt(0.03 * np.mean(np.sum(x**2, axis=0)))
    stacked_x = np.vstack([x, ridge * np.eye(IN)])
    stacked_output = np.vstack([y @ weight.T, ridge * weight.T.astype(np.float64)])
    wanted = np.linalg.lstsq(stacked_x, stacked_output, rcond=None)[0].T
    got = weight + correction(weight, stats.gram, stats.drift)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(got - weight).max() > 0.05 * np.abs(weight).max()


def test_weighted_tokens_make_the_correction_a_weighted_regression():
    """As above, solved from the data; a massive token must not be all that the weight is fitted to."""
    weight, x, y, _ = drifted(seed=24)
    x[:3], y[:3] = 1000 * x[:3], 1000 * y[:3]
    errors = []
    for temper in (0.0, 1.0):
        weights = token_weights(y.astype(np.float32), temper)
        builder = StatsBuilder(Needs(gram=True), "here")
        builder.add(x.astype(np.float32), y.astype(np.float32), weights)
        stats = builder.finish()
        ridge = np.sqrt(0.03 * np.mean(np.sum((x * weights) ** 2, axis=0)))
        stacked_x = np.vstack([x * weights, ridge * np.eye(IN)])
        stacked_output = np.vstack([(y * weights) @ weight.T, ridge * weight.T.astype(np.float64)])
        wanted = np.linalg.lstsq(stacked_x, stacked_output, rcond=None)[0].T
        got = weight + correction(weight, stats.gram, stats.drift)
        np.testing.assert_allclose(got, wanted, atol=1e-3 * np.abs(wanted).max())
        errors.append(np.linalg.norm((x @ got.T - y @ weight.T)[3:]))
    assert errors[1] < 0.8 * errors[0]


def test_the_strength_is_the_part_of_the_correction_that_is_made():
    weight, _, _, stats = drifted(seed=25)
    scheme, step = SCHEMES["w4 channel"], correction(weight, stats.gram, stats.drift)
    still = dataclasses.replace(stats, drift=None)
    for strength in (0.0, 0.25, 1.0):
        got = Gptq(correct=True, strength=strength)(weight, scheme, stats)
        wanted = Gptq()(weight + np.float32(strength) * step, scheme, still)
        assert np.array_equal(got.codes, wanted.codes)
        np.testing.assert_allclose(got.scale, wanted.scale, rtol=1e-5)  # the factor's order is another


# --- what is chosen on texts that are held out ------------------------------------------------------------------------


def few(seed, tokens=48, held_out=3000):
    """As drifted, of so few tokens that fitting them says little of others; with rows that are held out, and 3000 more."""
    generator = np.random.default_rng(seed)
    weight, _ = layer(seed=seed)
    mixed, moved = generator.normal(size=(2, IN, IN)) / np.sqrt(IN)

    def draw(count):
        y = generator.normal(size=(count, IN)) @ mixed
        x = y + 0.1 * y @ moved + 0.3 * generator.normal(size=y.shape)
        return x.astype(np.float32), y.astype(np.float32)

    builder = StatsBuilder(Needs(gram=True, held_out=held_out), "here")
    builder.add(*draw(tokens))
    builder.hold_out(*draw(held_out))
    return weight, builder.finish(), draw(3000)


@pytest.mark.parametrize("seed", range(30, 34))
def test_the_strength_is_the_one_with_the_least_error_on_held_out_rows(seed):
    weight, stats, _ = few(seed)
    step = correction(weight, stats.gram, stats.drift)
    x = stats.held_out.rows.astype(np.float64)
    target = (x + stats.held_out_drift.rows) @ weight.T.astype(np.float64)
    tried = np.linspace(0, 1, 2001)
    errors = [np.linalg.norm(x @ (weight + strength * step).T - target) for strength in tried]
    got = HeldOut(weight, stats).strength(step)
    assert got == pytest.approx(tried[np.argmin(errors)], abs=1e-3)
    assert 0 < got < 1
    assert HeldOut(weight, stats).strength(-step) == 0
    assert HeldOut(weight, stats).strength(step * np.float32(0.01)) == 1
    assert HeldOut(weight, stats).strength(np.zeros_like(step)) == 1


def test_what_is_chosen_is_better_than_all_or_nothing_on_texts_that_nobody_saw():
    """In 8 bits, where rounding itself costs little."""
    weight, stats, (x, y) = few(seed=35)
    scheme = TensorScheme(8, "channel")
    error = {}
    for strength in (0.0, 1.0, "auto"):
        made = Gptq(correct=True, strength=strength)(weight, scheme, stats).dequantize().astype(np.float64)
        error[strength] = np.linalg.norm(x @ made.T - y @ weight.T.astype(np.float64))
    assert error["auto"] < min(error[0.0], error[1.0])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("seed", "tokens"), [(36, 40), (37, 4000)])
def test_the_damping_is_the_one_with_the_least_error_on_held_out_rows(scheme, seed, tokens):
    weight, stats, _ = few(seed, tokens)
    stats = dataclasses.replace(stats, drift=None, held_out_drift=None)
    made = {damping: Gptq(damping=damping)(weight, scheme, stats) for damping in _DAMPINGS}
    rows = stats.held_out.rows
    errors = {damping: np.linalg.norm(rows @ (each.dequantize() - weight).T) for damping, each in made.items()}
    got = Gptq(damping="auto")(weight, scheme, stats)
    (chosen,) = (damping for damping, each in made.items() if np.array_equal(each.codes, got.codes))
    assert errors[chosen] <= 1.02 * min(errors.values())  # the search goes downhill: two may be equal but for chance
    assert got.note == ""


def test_nothing_is_chosen_where_nothing_is_held_out():
    weight, stats, _ = few(seed=38)
    for settings in ({"damping": "auto"}, {"correct": True, "strength": "auto"}):
        for missing in (None, dataclasses.replace(stats.held_out, rows=stats.held_out.rows[:0])):
            with pytest.raises(DataError, match="there are none: give more texts"):
                Gptq(**settings)(weight, SCHEMES["w4 channel"], dataclasses.replace(stats, held_out=missing))
    assert (Gptq().needs.held_out, Gptq(strength="auto").needs.held_out) == (0, 0)
    assert Gptq(damping="auto").needs.held_out > 0


def test_without_drift_nothing_is_corrected():
    weight, stats = layer(seed=21)
    still = InputStats(stats.tokens, stats.absmax, stats.gram, drift=np.zeros((IN, IN)))
    one, two = (Gptq(correct=True)(weight, SCHEMES["w4 channel"], seen) for seen in (stats, still))
    assert np.array_equal(one.codes, two.codes)
    assert np.array_equal(one.scale, two.scale)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_correction_brings_the_output_nearer_to_the_float_models(scheme):
    weight, x, y, stats = drifted(seed=22)
    plain = Gptq()(weight, scheme, InputStats(stats.tokens, stats.absmax, stats.gram))
    corrected = Gptq(correct=True)(weight, scheme, stats)
    errors = [np.linalg.norm(x @ made.dequantize().T.astype(np.float64) - y @ weight.T) for made in (plain, corrected)]
    assert errors[1] < 0.8 * errors[0]


def test_an_input_that_was_never_active_is_corrected_to_itself():
    weight, _ = layer(seed=23)
    nothing = np.zeros((IN, IN))
    assert not correction(weight, nothing, nothing).any()


# --- the choice of scales -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_mse_scale_is_the_best_of_its_grid(scheme, weighted):
    weight, stats = layer(seed=17, outputs=6)
    cost = np.diag(stats.gram) if weighted else np.ones(IN)
    chosen = mse_scale(weight, scheme, cost if weighted else None)
    groups = scheme.groups(IN)
    largest = weight_scale(weight, scheme)

    def error(scale, row, group):
        columns = slice(group * IN // groups, (group + 1) * IN // groups)
        codes = np.clip(np.rint(weight[row, columns] / scale), scheme.code_min, scheme.code_max)
        return float((cost[columns] * (weight[row, columns] - codes * float(scale)) ** 2).sum())

    smaller = 0
    for row in range(len(weight)):
        for group in range(groups):
            best = error(chosen[row, group], row, group)
            for shrink in np.linspace(1, 0.4, 25):
                tried = np.float32(largest[row, group] * np.float32(shrink))
                if scheme.bfloat16_scale:
                    continue
                assert best <= error(tried, row, group) * (1 + 1e-3)
            assert best <= error(largest[row, group], row, group) * (1 + 1e-5)
            smaller += chosen[row, group] < largest[row, group]
    assert smaller > 0 or scheme.bits == 8


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_kernels_choose_the_scale_that_numpy_does(scheme, monkeypatch):
    generator = np.random.default_rng(43)
    weight, importance, found = generator.normal(size=(50, IN)).astype(np.float32), generator.lognormal(size=IN), []
    paths = PATHS[: PATHS.index(library().best) + 1] if library() else ()
    for path in (*paths, "off"):
        monkeypatch.setenv(SETTING, path)
        found.append(mse_scale(weight, scheme, importance))
    monkeypatch.undo()
    library()
    assert all(np.array_equal(each, found[-1]) for each in found)


def test_inputs_that_were_never_active_do_not_make_the_scale_arbitrary():
    weight, _ = layer(seed=18)
    scheme = SCHEMES["w4 channel"]
    assert np.array_equal(mse_scale(weight, scheme, np.zeros(IN)), mse_scale(weight, scheme))
    zero = np.zeros((2, IN), np.float32)
    assert (mse_scale(zero, scheme) == 1).all()


def test_products_in_parallel_have_the_bits_of_one_thread():
    """Of widths at whose edges OpenBLAS adds up in another order when threads split them."""
    generator = np.random.default_rng(0)
    factor, error = generator.normal(size=(640, 128)), generator.normal(size=(640, 904))
    found = []
    for threads in (1, 2, 3):
        result = np.empty((128, 904))

        def work(rows, result=result):
            result[:, rows] = factor.T @ error[:, rows]

        with threadpool_limits(threads):
            in_parallel(work, [slice(start, start + 301) for start in range(0, 904, 301)])
        found.append(result)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("rows", [1, 64, 205])
@pytest.mark.parametrize("name", ["portable", "avx2", "vnni"])
def test_the_kernel_has_the_bits_of_the_loop_that_specifies_it(rows, name, monkeypatch):
    best = library()
    if best is None or PATHS.index(name) > PATHS.index(best.best):
        pytest.skip("not on this machine")
    generator = np.random.default_rng(3)
    target, carried = generator.normal(size=(2, 37, rows)).astype(np.float32)
    carried *= np.float32(0.01)
    inside, steps = generator.normal(size=(37, 37)) / 9, generator.uniform(0.1, 0.3, size=(4, rows))
    target[5], carried[5] = np.float32(2.5) * steps[1].astype(np.float32), 0  # ties, as far as 37 channels leave them
    group, found = np.sort(generator.integers(0, 4, size=37)), []
    for path in (name, "off"):
        monkeypatch.setenv(SETTING, path)
        codes, spent = np.empty(target.shape, np.int8), carried.copy()
        scheme, small = SCHEMES["w4 group 12"], (inside.astype(np.float32), steps.astype(np.float32))
        found.append((gptq.round_block(target, spent, *small, group, scheme, codes), codes))
    monkeypatch.undo()
    library()
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("scheme", ["w4 channel", "w4 group 12"])
def test_products_of_bfloat16_give_codes_as_good(scheme, kernels, monkeypatch):
    weight, stats, (x, y) = few(5, tokens=2000)
    settings = {"correct": True, "strength": "auto", "damping": "auto"}
    monkeypatch.setenv(SETTING, kernels)
    made = [Gptq(**settings, products=products)(weight, SCHEMES[scheme], stats) for products in ("float32", "bfloat16")]
    monkeypatch.undo()
    library()
    assert 0 < (made[0].codes != made[1].codes).mean() < 0.1
    errors = [np.linalg.norm(x @ each.dequantize().T - y @ weight.T) for each in made]
    assert errors[1] <= 1.02 * errors[0]


def test_the_drift_of_the_outputs_is_corrected_as_that_of_the_inputs():
    weight, stats, *_ = few(6, tokens=400)
    settings = {"correct": True, "strength": "auto", "damping": "auto"}
    other = dataclasses.replace(stats, drift=None, output_drift=weight @ stats.drift)
    for rows in (slice(None), slice(3, 9)):
        one, two = (Gptq(**settings)(weight, SCHEMES["w4 channel"], each, rows) for each in (stats, other))
        assert (one.codes != two.codes).mean() < 0.01
        np.testing.assert_allclose(one.scale, two.scale, rtol=0.05)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [384, 300])
@pytest.mark.parametrize("outputs", [192, 301])  # 301: edges of what threads split, where OpenBLAS adds up in another order
def test_the_number_of_threads_changes_no_code(channels, outputs, products):
    weight, stats = layer(channels=channels, outputs=outputs, tokens=2000)
    drift = np.random.default_rng(1).normal(size=(channels, channels)) * np.diag(stats.gram).mean() / 100
    stats = dataclasses.replace(stats, drift=drift.astype(np.float32))
    found, kernels = [], library()
    before = kernels.threads if kernels else 0
    for threads in (1, 2, 3):
        if kernels:
            kernels.functions.pangu_threads(threads)
        with threadpool_limits(threads):
            settings = {"correct": True, "sweeps": 2, "products": products}
            found.append(Gptq(**settings)(weight, SCHEMES["w4 group 12"], stats))
    if kernels:
        kernels.functions.pangu_threads(before)
    for other in found[1:]:
        assert np.array_equal(other.codes, found[0].codes)
        assert np.array_equal(other.scale, found[0].scale)
