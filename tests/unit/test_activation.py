"""quantizers/activation.py: static ranges."""

import numpy as np
import pytest

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.activation import ActivationRange
from ms_pangu_quant.quantizers.grid import as_divisor, is_bfloat16
from ms_pangu_quant.recipe.scheme import PRESETS

SCHEME = PRESETS["w8a8_static"].activation
METHODS = ("absmax", "percentile", "mse")


def observed(x, rows=512):
    return InputStats.observe(x.astype(np.float32), rows=rows)


def rounding_error(x, factor):
    return float(np.square(np.clip(np.rint(x * factor), -128, 127) / factor - x).sum())


def test_absmax_maps_the_largest_value_to_at_most_127():
    stats = observed(np.random.default_rng(0).normal(size=(64, 8)) * 3)
    factor = ActivationRange().factor(stats, SCHEME)
    assert 126 <= stats.absmax.max() * factor <= 127


def test_the_percentile_is_that_of_all_values():
    x = np.arange(1, 1001, dtype=np.float32).reshape(100, 10)
    factor = ActivationRange("percentile", 90).factor(observed(x), SCHEME)
    assert 127 / factor == pytest.approx(900, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_holds_the_step_in_bfloat16_multiplies_by_the_same_factor(method):
    """As vllm-ascend does. The ranges here go through every bfloat16 mantissa, of which 22 are not such factors."""
    mantissas = (np.arange(0x3F80, 0x4000, dtype=np.uint32) << 16).view(np.float32)
    assert (as_divisor(mantissas) != mantissas).sum() == 22
    for mantissa in mantissas:
        stats = observed(np.random.default_rng(3).uniform(-1, 1, (40, 4)) * mantissa)
        factor = np.array([ActivationRange(method).factor(stats, SCHEME)], np.float32)
        assert as_divisor(factor) == factor
        exact = 127 / ActivationRange(method)._largest(stats, SCHEME)
        assert 1 - 2 * 2**-7 <= factor / exact <= 1


@pytest.mark.parametrize("method", METHODS)
def test_every_range_is_a_bfloat16_factor(method):
    stats = observed(np.random.default_rng(1).standard_t(3, size=(300, 16)))
    assert is_bfloat16(np.array([ActivationRange(method).factor(stats, SCHEME)], np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_an_input_that_was_never_active_gets_a_finite_factor(method):
    factor = ActivationRange(method).factor(observed(np.zeros((4, 4))), SCHEME)
    assert np.isfinite(factor)
    assert factor > 0


def test_the_mse_range_beats_absmax_where_one_value_stands_out():
    x = np.random.default_rng(2).normal(size=(500, 64)).astype(np.float32)
    x[3, 5] = 60
    stats = observed(x)
    absmax, mse = (ActivationRange(method).factor(stats, SCHEME) for method in ("absmax", "mse"))
    assert rounding_error(x, mse) < 0.9 * rounding_error(x, absmax)
    assert mse > absmax


def test_the_mse_range_is_the_best_of_a_fine_grid():
    x = np.random.default_rng(3).standard_t(4, size=(400, 32)).astype(np.float32)
    stats = observed(x)
    seen = np.vstack([np.abs(stats.sample.rows), stats.absmax])  # the peaks count as a row
    found = rounding_error(seen, ActivationRange("mse").factor(stats, SCHEME))
    least = min(
        rounding_error(seen, SCHEME.divisor / (stats.absmax.max() * shrink)) for shrink in np.geomspace(1, 0.05, 500)
    )
    assert found <= least * 1.03


def test_an_outlier_that_the_sample_missed_is_not_clipped_away_as_if_it_did_not_exist():
    x = np.random.default_rng(4).normal(size=(5000, 16)).astype(np.float32)
    quiet = observed(x, rows=50)
    loud = InputStats(quiet.tokens, np.where(np.arange(16) == 3, 40, quiet.absmax).astype(np.float32), None, quiet.sample)
    ranges = [127 / ActivationRange("mse").factor(stats, SCHEME) for stats in (quiet, loud)]
    assert ranges[1] > 2 * ranges[0]


@pytest.mark.parametrize(
    ("settings", "said"), [({"method": "max"}, "method: got 'max'"), ({"percentile": 20}, "percentile: got 20")]
)
def test_senseless_settings_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        ActivationRange(**settings)
