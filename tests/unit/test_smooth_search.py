"""transforms/smooth_search.py: the error it minimises is the one that rounding makes, and the block computes the same."""

import dataclasses
import itertools

import numpy as np
import pytest

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.kernels.library import PATHS, SETTING, library
from ms_pangu_quant.quantizers.grid import scale_from_absmax
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.scheme import PRESETS, QuantScheme, TensorScheme
from ms_pangu_quant.transforms.fold import expand_to_input
from ms_pangu_quant.transforms.smooth import smooth_scale
from ms_pangu_quant.transforms.smooth_search import OutputCost, SmoothSearch, best_scale, weighed_means

W4 = QuantScheme(TensorScheme(4, "group", group_size=8), PRESETS["w4a8"].activation)
SCHEMES = {"w8a8": PRESETS["w8a8"], "w8a8_static": PRESETS["w8a8_static"], "w4a8": PRESETS["w4a8"], "w4a8_g8": W4}


def output_error(s, weights, seen, scheme):
    return OutputCost(weights, seen, scheme)(s)


def every(scheme):
    return {site.name: scheme for site in layout.SITES}


@pytest.fixture
def calibrated(random_block, forward):
    """(key/value heads) -> a block with outliers and a dead channel, hidden states, its statistics."""

    def make(kv_heads=2, tokens=40):
        block = random_block(num_key_value_heads=kv_heads)
        names = ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.up_proj.weight")
        norm, second, up = changed = [block[name].copy() for name in names]
        norm[3], norm[5], second[4], up[7] = 300, 0, 300, 90
        block = block.replace(dict(zip(names, changed, strict=True)))
        hidden = np.random.default_rng(0).normal(size=(tokens, block.config.hidden_size))
        inputs = forward(block, hidden)[1]
        return block, hidden, {n: InputStats.observe(x.astype(np.float32), gram=True, rows=512) for n, x in inputs.items()}

    return make


def measured_error(x, weights, s, scheme):
    """Squared output error of rounding x/s and W*s to the nearest codes."""
    total = 0.0
    for weight in weights:
        rounded = RoundToNearest()((weight * s).astype(np.float32), scheme.weight, None).dequantize().astype(np.float64)
        y = (x / s).astype(np.float32)
        largest = np.abs(y).max(axis=1, keepdims=True) if scheme.activation.dynamic else np.abs(y).max(keepdims=True)
        step = scale_from_absmax(largest.astype(np.float32), PRESETS["w8a8"].activation).astype(np.float64)
        total += float(np.square(np.rint(y / step) * step @ rounded.T - x.astype(np.float64) @ weight.T).sum())
    return total


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_error_is_close_to_the_measured_one_for_uncorrelated_inputs(scheme):
    """For normal values and scales that leave most weights larger than half a step."""
    generator = np.random.default_rng(1)
    channels, rel = generator.lognormal(sigma=0.7, size=64), 0.2 if scheme.weight.bits == 8 else 0.4
    x = (generator.normal(size=(500, 64)) * channels).astype(np.float32)
    weights = [generator.normal(size=(outputs, 64)).astype(np.float32) for outputs in (40, 24)]
    seen = InputStats.observe(x, gram=True, rows=500)
    for exponent in (0.0, 0.3, 0.6):
        s = (channels**exponent).astype(np.float32)
        assert output_error(s, weights, seen, scheme) == pytest.approx(measured_error(x, weights, s, scheme), rel=rel)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_output_counts_once_however_few_of_its_layer_are_sampled(scheme):
    """For layers of equal rows, whose error is that of one row as often as they have rows."""
    generator = np.random.default_rng(3)
    seen = InputStats.observe(generator.normal(size=(50, 16)).astype(np.float32), rows=50)
    one, other = generator.normal(size=(2, 1, 16)).astype(np.float32) * np.array([[[1]], [[3]]], np.float32)
    for s in generator.lognormal(size=(3, 16)).astype(np.float32):
        alone = [output_error(s, [row], seen, scheme) for row in (one, other)]
        for count in (1, 511, 512, 513, 768, 1024, 4096, 4100):
            got = output_error(s, [np.repeat(one, count, axis=0), np.repeat(other, 1024, axis=0)], seen, scheme)
            assert got == pytest.approx(count * alone[0] + 1024 * alone[1], rel=1e-9)


def test_the_sampled_outputs_are_spread_over_the_whole_layer():
    generator = np.random.default_rng(4)
    seen = InputStats.observe(generator.normal(size=(50, 16)).astype(np.float32), rows=50)
    weight = (generator.normal(size=(512, 16)) * np.linspace(0.1, 3, 512)[:, None]).astype(np.float32)
    s = generator.lognormal(size=16).astype(np.float32)
    for scheme in SCHEMES.values():
        one, eight = (output_error(s, [np.repeat(weight, times, axis=0)], seen, scheme) for times in (1, 8))
        assert eight == pytest.approx(8 * one, rel=1e-9)


@pytest.fixture
def missed():
    """A layer, its input's statistics with a sample of all rows, and with one of 50 that misses channel 3's outlier."""
    generator = np.random.default_rng(5)
    x, weight = (generator.normal(size=(rows, 64)).astype(np.float32) for rows in (3000, 32))
    sample = InputStats.observe(x, rows=50).sample
    x[2000, 3] = 100
    whole = InputStats.observe(x, rows=3000)
    return weight, whole, dataclasses.replace(whole, sample=sample)


@pytest.mark.parametrize("scheme", [PRESETS["w8a8"], PRESETS["w8a8_static"]], ids=["w8a8", "w8a8_static"])
def test_an_outlier_that_the_sample_missed_does_not_look_cheap(missed, scheme):
    """Dividing it pays, although no sampled row says so; without it, the same scale costs more than it saves."""
    weight, _, loud = missed
    quiet = dataclasses.replace(loud, absmax=np.abs(loud.sample.rows).max(axis=0))
    ones = np.ones(64, np.float32)
    s = np.where(np.arange(64) == 3, 5, ones).astype(np.float32)
    assert output_error(s, [weight], loud, scheme) < 0.5 * output_error(ones, [weight], loud, scheme)
    assert output_error(s, [weight], quiet, scheme) > 2 * output_error(ones, [weight], quiet, scheme)


def test_the_range_of_a_static_activation_is_known_however_few_tokens_are_sampled(missed):
    weight, whole, few = missed
    for s in np.random.default_rng(6).lognormal(size=(5, 64)).astype(np.float32):
        assert len({output_error(s, [weight], seen, SCHEMES["w8a8_static"]) for seen in (whole, few)}) == 1


def test_a_common_factor_of_the_scale_changes_nothing():
    generator = np.random.default_rng(2)
    seen = InputStats.observe(generator.normal(size=(50, 16)).astype(np.float32), gram=True, rows=50)
    weight, s = generator.normal(size=(8, 16)).astype(np.float32), generator.lognormal(size=16).astype(np.float32)
    for scheme in SCHEMES.values():
        assert output_error(4 * s, [weight], seen, scheme) == pytest.approx(
            output_error(s, [weight], seen, scheme), rel=1e-5
        )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_searched_scale_preserves_the_function_and_the_statistics(calibrated, forward, kv_heads, scheme):
    block, hidden, stats = calibrated(kv_heads)
    smoothed, returned = SmoothSearch()(block, stats, every(scheme))
    (wanted, _), (got, inputs) = forward(block, hidden), forward(smoothed, hidden)
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()
    for name, x in inputs.items():
        np.testing.assert_allclose(returned[name].absmax, np.abs(x).max(axis=0), rtol=3e-5)
        np.testing.assert_allclose(
            np.sort(np.abs(returned[name].sample.rows).max(axis=1)), np.sort(np.abs(x).max(axis=1)), rtol=1e-3
        )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_scale_of_smoothquants_or_awqs_is_better(calibrated, scheme):
    """For the last input searched, whose weights no later scale changes."""
    block, _, stats = calibrated()
    smoothed, _ = SmoothSearch(inputs=["mlp_hidden"])(block, stats, every(scheme))
    down = layout.sites_reading("mlp_hidden")[0]
    weight, seen = block.weight(down), stats["mlp_hidden"]
    chosen = smoothed.weight(down)[0] / weight[0]
    least = output_error(chosen, [weight], seen, scheme)
    x, w = seen.absmax.astype(np.float64), np.abs(weight).max(axis=0).astype(np.float64)
    rms = np.sqrt(np.diag(seen.gram) / seen.tokens)
    for a, b in itertools.product(np.linspace(0, 1, 11), repeat=2):
        for size in (x, rms):
            assert least <= output_error((size**a / w**b).astype(np.float32), [weight], seen, scheme)
    assert least <= output_error(smooth_scale(seen.absmax, w.astype(np.float32), 0.5), [weight], seen, scheme)
    assert least < 0.9 * output_error(np.ones_like(chosen), [weight], seen, scheme)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("input_name", layout.INPUT_NAMES)
def test_no_other_scale_near_it_is_better_by_more_than_the_power_mean_hides(calibrated, scheme, input_name):
    block, _, stats = calibrated()
    cost = OutputCost([block.weight(site) for site in layout.sites_reading(input_name)], stats[input_name], scheme)
    best = best_scale(block, input_name, cost)
    least, generator = cost(expand_to_input(block, input_name, best)), np.random.default_rng(8)
    for size in (0.01, 0.1, 0.5, 1.0):
        for _ in range(20):
            other = (best * np.exp(size * generator.normal(size=len(best)))).astype(np.float32)
            assert cost(expand_to_input(block, input_name, other)) >= least * 0.98


@pytest.fixture
def costs():
    """Of each scheme, of a layer with a channel that no token uses and one that no weight reads."""
    generator = np.random.default_rng(7)
    x = (generator.normal(size=(60, 16)) * generator.lognormal(sigma=2, size=16)).astype(np.float32)
    weights = [generator.normal(size=(outputs, 16)).astype(np.float32) for outputs in (12, 5)]
    x[:, 3] = 0
    for weight in weights:
        weight[:, 5] = 0
    seen = InputStats.observe(x, rows=60)
    return [OutputCost(weights, seen, scheme) for scheme in SCHEMES.values()]


@pytest.mark.parametrize(("rows", "groups", "width"), [(1, 1, 8), (33, 4, 32), (50, 1, 61), (16, 3, 5), (513, 1, 640)])
def test_the_kernel_takes_the_means_that_numpy_takes(monkeypatch, rows, groups, width):
    """On every path of this CPU the same bits, however many threads there are."""
    generator = np.random.default_rng(12)
    values = np.abs(generator.normal(size=(rows, groups * width))).astype(np.float32)
    values[:, ::5], values[rows // 2] = 0, 0  # channels of nothing, and a row of nothing
    given = values, generator.lognormal(sigma=3, size=groups * width), generator.uniform(1, 9, rows), groups
    monkeypatch.setenv(SETTING, "off")
    wanted = weighed_means(*given)
    monkeypatch.delenv(SETTING)
    best = library()
    if best is None:
        pytest.skip("no C++ compiler, or kernels switched off")
    found, before = [], best.threads
    try:
        for path in PATHS[: PATHS.index(best.best) + 1]:
            monkeypatch.setenv(SETTING, path)
            for threads in (1, 3):
                library().functions.pangu_threads(threads)
                found.append(weighed_means(*given))
    finally:
        monkeypatch.undo()
        library().functions.pangu_threads(before)
    for squares, shares in found:
        np.testing.assert_allclose(squares, wanted[0], rtol=1e-12)
        np.testing.assert_allclose(shares, wanted[1], rtol=1e-12)
        assert squares.tobytes() == found[0][0].tobytes()
        assert shares.tobytes() == found[0][1].tobytes()


def test_the_smooth_cost_is_the_cost_up_to_the_power_means(costs):
    """A power mean of n values is at most n^(1/16) of their largest; for the static range of all 61 * 16 values."""
    for cost in costs:
        for s in np.random.default_rng(9).lognormal(sigma=2, size=(10, 16)):
            exact, (smooth, _) = cost(s.astype(np.float32)), cost.smooth(s)
            assert exact * (1 - 1e-5) <= smooth <= exact * (61 * 16) ** (2 / 16)


def test_its_gradient_is_that_of_its_differences(costs):
    for cost in costs:
        for log_s in np.random.default_rng(10).normal(size=(5, 16)):
            _, gradient = cost.smooth(np.exp(log_s))
            for j in range(16):
                step = np.eye(16)[j] * 1e-5
                difference = (cost.smooth(np.exp(log_s + step))[0] - cost.smooth(np.exp(log_s - step))[0]) / 2e-5
                assert gradient[j] == pytest.approx(difference, rel=1e-5, abs=1e-7 * np.abs(gradient).max())


def test_its_logarithm_is_convex_in_that_of_the_scale(costs):
    for cost in costs:
        for one, other in np.random.default_rng(11).normal(scale=3, size=(20, 2, 16)):
            ends = [np.log(cost.smooth(np.exp(log_s))[0]) for log_s in (one, other)]
            for share in (0.1, 0.5, 0.9):
                between = np.log(cost.smooth(np.exp((1 - share) * one + share * other))[0])
                assert between <= (1 - share) * ends[0] + share * ends[1] + 1e-9


def test_a_channel_that_is_not_used_is_not_scaled(calibrated):
    block, _, stats = calibrated()  # channel 5 of attention_input is dead
    cost = OutputCost(
        [block.weight(site) for site in layout.sites_reading("attention_input")], stats["attention_input"], W4
    )
    best = best_scale(block, "attention_input", cost)
    assert best[5] == 1
    assert np.isfinite(best).all()
    assert (best > 0).all()


def test_an_input_whose_layers_stay_float_is_left_alone(calibrated):
    block, _, stats = calibrated()
    schemes = {site.name: None if site.input_name == "mlp_hidden" else W4 for site in layout.SITES}
    smoothed, _ = SmoothSearch()(block, stats, schemes)
    assert np.array_equal(smoothed["mlp.down_proj.weight"], block["mlp.down_proj.weight"])
    assert not np.array_equal(smoothed["self_attn.o_proj.weight"], block["self_attn.o_proj.weight"])


@pytest.mark.parametrize("kept", layout.INPUT_NAMES)
@pytest.mark.parametrize("searched", [layout.INPUT_NAMES, ("attention_output", "mlp_input")], ids="+".join)
def test_what_the_search_says_it_changes_is_what_it_changes(calibrated, kept, searched):
    block, _, stats = calibrated()
    schemes = {site.name: None if site.input_name == kept else W4 for site in layout.SITES}
    search = SmoothSearch(inputs=searched)
    smoothed, _ = search(block, stats, schemes)
    changed = {name for name in block.tensors if not np.array_equal(block[name], smoothed[name])}
    assert changed == {name for name in block.tensors if search.changes(name, schemes)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"inputs": []}, "smooth_search.inputs"),
        ({"inputs": ["x"]}, "smooth_search.inputs"),
    ],
)
def test_senseless_settings_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        SmoothSearch(**settings)
