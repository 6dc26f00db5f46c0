"""transforms/smooth_search.py: the error it minimises is the one that rounding makes, and the block computes the same."""

import itertools

import numpy as np
import pytest

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.grid import scale_from_absmax
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.scheme import PRESETS, QuantScheme, TensorScheme
from ms_pangu_quant.transforms.smooth import smooth_scale
from ms_pangu_quant.transforms.smooth_search import OutputCost, SmoothSearch

W4 = QuantScheme(TensorScheme(4, "group", group_size=8), PRESETS["w4a8"].activation)
SCHEMES = {"w8a8": PRESETS["w8a8"], "w8a8_static": PRESETS["w8a8_static"], "w4a8": PRESETS["w4a8"], "w4a8_g8": W4}


def output_error(s, weights, seen, scheme):
    return OutputCost(weights, seen, scheme)(s)


def every(scheme):
    return {site.name: scheme for site in layout.SITES}


@pytest.fixture
def calibrated(random_block, forward):
    """(key/value heads) -> a block with an outlier and a dead channel, hidden states, its statistics."""

    def make(kv_heads=2, tokens=40):
        block = random_block(num_key_value_heads=kv_heads)
        norm, up = block["input_layernorm.weight"].copy(), block["mlp.up_proj.weight"].copy()
        norm[3], norm[5], up[7] = 300, 0, 90
        block = block.replace({"input_layernorm.weight": norm, "mlp.up_proj.weight": up})
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
    smoothed, returned = SmoothSearch(step=0.5)(block, stats, every(scheme))
    (wanted, _), (got, inputs) = forward(block, hidden), forward(smoothed, hidden)
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()
    for name, x in inputs.items():
        np.testing.assert_allclose(returned[name].absmax, np.abs(x).max(axis=0), rtol=3e-5)
        np.testing.assert_allclose(
            np.sort(np.abs(returned[name].sample.rows).max(axis=1)), np.sort(np.abs(x).max(axis=1)), rtol=1e-3
        )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_scale_of_the_grid_is_better_and_smoothquants_are_on_it(calibrated, scheme):
    """For the last input searched, whose weights no later scale changes."""
    block, _, stats = calibrated()
    inputs, step = ["mlp_hidden"], 0.25
    smoothed, _ = SmoothSearch(step=step, inputs=inputs)(block, stats, every(scheme))
    down = layout.sites_reading("mlp_hidden")[0]
    weight, seen = block.weight(down), stats["mlp_hidden"]
    chosen = smoothed.weight(down)[0] / weight[0]
    least = output_error(chosen, [weight], seen, scheme)
    x, w = seen.absmax.astype(np.float64), np.abs(weight).max(axis=0).astype(np.float64)
    rms = np.sqrt(np.diag(seen.gram) / seen.tokens)
    for a, b in itertools.product(np.linspace(0, 1, 5), repeat=2):
        for size in (x, rms):
            tried = (size**a / w**b).astype(np.float32)
            assert least <= output_error(tried, [weight], seen, scheme) * (1 + 1e-5)
    assert least <= output_error(smooth_scale(seen.absmax, w.astype(np.float32), 0.5), [weight], seen, scheme) * (1 + 1e-5)
    assert least < 0.9 * output_error(np.ones_like(chosen), [weight], seen, scheme)


def test_searching_smoothquants_own_family_gives_one_of_it(calibrated):
    block, _, stats = calibrated()
    smoothed, _ = SmoothSearch(step=0.5, two_exponents=False, inputs=["mlp_hidden"])(block, stats, every(W4))
    down = layout.sites_reading("mlp_hidden")[0]
    weight, seen = block.weight(down), stats["mlp_hidden"]
    ratio = smoothed.weight(down)[0] / weight[0]
    rms = np.sqrt(np.diag(seen.gram) / seen.tokens).astype(np.float32)
    w = np.abs(weight).max(axis=0)
    family = [smooth_scale(size, w, alpha) for size in (seen.absmax, rms) for alpha in (0.0, 0.5, 1.0)]
    assert any(np.allclose(ratio / ratio[0], s / s[0], rtol=1e-4) for s in family)


def test_an_input_whose_layers_stay_float_is_left_alone(calibrated):
    block, _, stats = calibrated()
    schemes = {site.name: None if site.input_name == "mlp_hidden" else W4 for site in layout.SITES}
    smoothed, _ = SmoothSearch(step=0.5)(block, stats, schemes)
    assert np.array_equal(smoothed["mlp.down_proj.weight"], block["mlp.down_proj.weight"])
    assert not np.array_equal(smoothed["self_attn.o_proj.weight"], block["self_attn.o_proj.weight"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"step": 0}, "step: got 0"),
        ({"two_exponents": 2}, "two_exponents: got 2"),
        ({"inputs": ["x"]}, "smooth_search.inputs"),
    ],
)
def test_senseless_settings_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        SmoothSearch(**settings)
