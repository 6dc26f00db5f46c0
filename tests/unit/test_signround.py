"""quantizers/signround.py: never worse than where it starts, and where a better rounding is known it finds some of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.quantizers.grid import is_bfloat16
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.quantizers.signround import SignRound
from ms_pangu_quant.recipe.parse import parse_recipe
from ms_pangu_quant.recipe.scheme import PRESETS, TensorScheme

SCHEMES = [PRESETS[name].weight for name in ("w4a8", "w8a8")] + [TensorScheme(4, "group", group_size=8)]


def correlated(rng, tokens, inputs):
    return (rng.normal(size=(tokens, inputs)) @ rng.normal(size=(inputs, inputs))).astype(np.float32)


def cost(weight, rounded, gram):
    """tr(E G E^T) of each output."""
    error = weight.astype(np.float64) - rounded.dequantize()
    return np.einsum("oi,ij,oj->o", error, gram, error)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scheme=st.sampled_from(SCHEMES), steps=st.integers(1, 30))
def test_no_output_errs_more_than_rounded_to_nearest(seed, scheme, steps):
    rng = np.random.default_rng(seed)
    stats = InputStats.observe(correlated(rng, 64, 24), gram=True)
    weight = rng.normal(size=(7, 24)).astype(np.float32)
    learned = SignRound(steps=steps)(weight, scheme, stats)
    nearest = RoundToNearest(scale="mse", weighted=True)(weight, scheme, stats)
    assert (cost(weight, learned, stats.gram) <= cost(weight, nearest, stats.gram) * (1 + 1e-4)).all()
    assert learned.codes.min() >= scheme.code_min
    assert learned.codes.max() <= scheme.code_max
    assert (learned.scale > 0).all()
    assert is_bfloat16(learned.scale) or not scheme.bfloat16_scale


def test_it_finds_much_of_what_trying_every_rounding_finds():
    """Of 2^6 ways to round each row up or down on the grid it starts from."""
    rng = np.random.default_rng(0)
    scheme = PRESETS["w4a8"].weight
    stats = InputStats.observe(correlated(rng, 64, 6), gram=True)
    weight = rng.normal(size=(64, 6)).astype(np.float32)
    nearest = RoundToNearest(scale="mse", weighted=True)(weight, scheme, stats)
    down = np.clip(np.floor(weight / nearest.scale), scheme.code_min, scheme.code_max - 1)
    ups = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
    errors = weight[:, None] - (down[:, None] + ups) * nearest.scale[:, None]
    best = np.einsum("oki,ij,okj->ok", errors, stats.gram, errors).min(axis=1).sum()
    learned, start = (cost(weight, each, stats.gram).sum() for each in (SignRound()(weight, scheme, stats), nearest))
    assert best < start / 2
    assert learned < (start + best) / 2


def test_the_outputs_do_not_depend_on_each_other():
    rng = np.random.default_rng(1)
    stats = InputStats.observe(correlated(rng, 64, 16), gram=True)
    weight = rng.normal(size=(1100, 16)).astype(np.float32)
    whole = SignRound(steps=5)(weight, PRESETS["w4a8"].weight, stats)
    part = SignRound(steps=5)(weight[600:700], PRESETS["w4a8"].weight, stats)
    np.testing.assert_allclose(part.dequantize(), whole.dequantize()[600:700], rtol=1e-5, atol=1e-6)


def test_it_is_a_rounding_of_recipes_and_needs_data():
    recipe = parse_recipe("scheme: w4a8\nrounding: {signround: {steps: 50}}", "recipe")
    assert recipe.quantizer == SignRound(steps=50)
    assert recipe.needs_calibration
    with pytest.raises(RecipeError, match=r"signround.steps: got 0"):
        SignRound(steps=0)


def test_a_damaged_gram_is_refused():
    stats = InputStats.observe(np.ones((3, 4), np.float32), gram=True)
    stats.gram[0, 0] = np.nan
    with pytest.raises(DataError, match="the statistics are damaged"):
        SignRound()(np.ones((2, 4), np.float32), PRESETS["w4a8"].weight, stats)
