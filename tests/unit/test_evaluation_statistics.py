"""evaluation/statistics.py and lengths.py against scipy, published examples, and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation import statistics
from ms_pangu_quant.evaluation.lengths import COPIES, Tail, lengths_of, periodic_tail, spread


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 4, 3), (4, 4, 4), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n, c, k):
    samples = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(samples, k)]
    assert statistics.pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_equals_the_published_numerically_stable_form():
    """Chen et al. 2021, figure 3: 1 - prod(1 - k / arange(n - c + 1, n + 1))."""
    for n, c, k in [(200, 13, 10), (200, 1, 100), (100, 57, 5)]:
        assert statistics.pass_at_k(n, c, k) == pytest.approx(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_of_more_samples_than_there_are_is_refused(k):
    with pytest.raises(RequestError, match="got 2 samples"):
        statistics.pass_at_k(2, 1, k)


def test_wilson_is_newcombes_published_example():
    """Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81/263 and 15/148, 0/20, 1/29."""
    for passed, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = statistics.wilson(passed, total)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert found.value == passed / total


def test_mcnemar_is_the_exact_binomial_test():
    """lost 12, gained 5 of 140/164 -> 133/164: p = 0.143; and without chance of gain 0.016."""
    assert statistics.mcnemar(12, 5) == pytest.approx(0.1435, abs=5e-5)
    assert statistics.mcnemar(7, 0) == pytest.approx(2 * 0.5**7)
    assert statistics.mcnemar(0, 0) == statistics.mcnemar(4, 4) == 1
    for lost, gained in [(3, 9), (10, 10), (1, 0), (28, 10)]:
        tail = sum(stats.binom.pmf(k, lost + gained, 0.5) for k in range(min(lost, gained) + 1))
        assert statistics.mcnemar(lost, gained) == pytest.approx(min(1, 2 * tail))


def test_flips_name_the_problems_that_both_runs_have():
    found = statistics.flips({"a": True, "b": True, "c": False, "d": True}, {"a": True, "b": False, "c": True, "e": True})
    assert (found.lost, found.gained, found.p) == (("b",), ("c",), 1.0)


def binary(seed: int, size: int = 164) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    reference = (generator.random(size) < 0.8).astype(float)
    new = np.where(generator.random(size) < 0.1, 1 - reference, reference)
    return reference.tolist(), new.tolist()


def test_the_paired_bootstrap_of_lengths_agrees_with_scipys():
    reference, new = binary(1)
    theirs = stats.bootstrap(
        (np.array(reference), np.array(new)),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        random_state=np.random.default_rng(3),
    ).confidence_interval
    found = statistics.difference(reference, new)
    assert found.value == pytest.approx(np.mean(new) - np.mean(reference))
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=0.007), pytest.approx(theirs.high, abs=0.007))


def test_the_retention_ratio_agrees_with_scipys():
    reference, new = binary(2)
    theirs = stats.bootstrap(
        (np.array(reference), np.array(new)),
        lambda a, b, axis: b.mean(axis) / a.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        random_state=np.random.default_rng(3),
    ).confidence_interval
    found = statistics.retention(reference, new)
    assert found.ratio.value == pytest.approx(np.mean(new) / np.mean(reference))
    assert (found.ratio.low, found.ratio.high) == (
        pytest.approx(theirs.low, abs=0.012),  # one problem of 164 more at either end
        pytest.approx(theirs.high, abs=0.012),
    )


@pytest.mark.parametrize("wanted", [0.85, 0.9, 0.95, 1.0])
def test_the_retention_test_agrees_with_the_one_sided_t_test(wanted):
    """On 600 problems the two must agree but for the one more lost; small p is evidence for at least `wanted`."""
    reference, new = binary(3, 600)
    theirs = stats.ttest_1samp(np.array(new) - wanted * np.array(reference), 0, alternative="greater").pvalue
    assert theirs - 0.01 < statistics.retention(reference, new, wanted).p < theirs + 0.04


@pytest.mark.parametrize(("passed", "lost", "failed"), [(24, 0, 16), (24, 1, 16), (40, 0, 0), (220, 9, 80), (3, 0, 1)])
def test_where_nothing_is_gained_retention_is_the_exact_binomial_tests(passed, lost, failed):
    reference, new = [1.0] * passed + [0.0] * failed, [0.0] * lost + [1.0] * (passed - lost) + [0.0] * failed
    exact = stats.binomtest(passed - lost, passed, 0.9, alternative="greater")
    found = statistics.retention(reference, new, 0.9)
    assert found.p == pytest.approx(exact.pvalue, abs=0.02)
    low = stats.binomtest(passed - lost, passed).proportion_ci(0.95, method="exact").low
    assert found.ratio.low == pytest.approx(low, abs=0.01)
    assert found.ratio.high >= found.ratio.value


def test_runs_that_agree_on_everything_are_not_certain_to_agree():
    reference, _ = binary(4)
    same = statistics.retention(reference, reference, 0.9)
    assert 0.9 < same.ratio.low < same.ratio.value == 1 < same.ratio.high
    assert statistics.retention(reference, reference, 1.01).p > 0.5
    assert statistics.retention([0.0, 0.0], [1.0, 0.0]) is None
    few = statistics.score_difference(reference[:20], reference[:20])
    assert few.low < -0.05 < few.value == 0 < 0.05 < few.high


@pytest.mark.parametrize("problems", [40, 257])
@pytest.mark.parametrize("gained", [0.0, 0.2])
def test_the_retention_test_keeps_its_level(problems, gained):
    """Where the true ratio is 0.9, a 5 % test says "at least 0.9" in no more than about 5 % of runs."""
    generator, rejected, runs = np.random.default_rng(5), 0, 300
    kept = 0.9 - gained * 0.2 / 0.8  # of what the reference passes, so that with the gains the ratio is 0.9
    for _ in range(runs):
        reference = (generator.random(problems) < 0.8).astype(float)
        new = np.where(reference, generator.random(problems) < kept, generator.random(problems) < gained).astype(float)
        rejected += statistics.retention(reference.tolist(), new.tolist(), 0.9).p < 0.05
    assert rejected / runs < 0.08


# What 40 problems showed of a run: problems that both pass, lost, gained, and that neither passes.
PILOTS = {"loses a little": (30, 1, 0, 9), "loses and gains": (24, 2, 3, 11), "loses nothing": (36, 0, 0, 4)}


def scores_of(both: int, lost: int, gained: int, neither: int) -> tuple[list[float], list[float]]:
    return [1.0] * (both + lost) + [0.0] * (gained + neither), [1.0] * both + [0.0] * lost + [1.0] * gained + [
        0.0
    ] * neither


@pytest.mark.parametrize(
    "counts", [(30, 1, 0, 9), (24, 2, 3, 11), (29, 0, 0, 0), (130, 9, 4, 21), (10, 8, 0, 2), (0, 1, 6, 0)]
)
def test_the_p_that_is_planned_with_is_the_retention_tests(counts):
    reference, new = scores_of(*counts)
    values = np.array([0.1, -0.9, 1.0, 0.0])
    planned = statistics._retention_p(values, np.array([counts]), 0.9)[0]
    assert planned == pytest.approx(statistics.retention(reference, new).p, abs=0.012)


@pytest.mark.parametrize("pilot", PILOTS)
def test_so_many_problems_show_the_retention_as_often_as_is_said(pilot):
    """Runs of that size, drawn from the pilot's problems and judged by the test itself; half as many show it less often."""
    reference, new = map(np.array, scores_of(*PILOTS[pilot]))
    needed = statistics.problems_needed(reference.tolist(), new.tolist())
    generator = np.random.default_rng(7)

    def power(problems: int, runs: int) -> float:
        drawn = generator.integers(len(reference), size=(runs, problems))
        return float(np.mean([statistics.retention([*reference[row]], [*new[row]]).p < 0.05 for row in drawn]))

    assert 0.72 <= power(needed, 200) <= 0.9
    assert power(needed // 2, 60) < 0.7


def test_the_problems_that_are_needed_have_known_bounds():
    """.9 ** 29 < .05 < .9 ** 28; of less than what is wanted no number shows it, of a narrow margin none that there is."""
    assert statistics.problems_needed(*scores_of(40, 0, 0, 0)) == 29
    assert statistics.problems_needed(*scores_of(40, 0, 0, 0), level=0.05 / 6) == 46
    assert statistics.problems_needed(*scores_of(34, 6, 0, 0)) is None
    assert statistics.problems_needed(*scores_of(0, 0, 4, 4)) is None
    assert statistics.problems_needed(*scores_of(900, 99, 0, 1)) == statistics.MOST_PROBLEMS
    stricter = [statistics.problems_needed(*scores_of(30, 1, 0, 9), wanted) for wanted in (0.8, 0.9, 0.95)]
    assert stricter == sorted(stricter)
    several = statistics.problems_needed([0.75, 0.5, 1.0, 0.25] * 10, [0.5, 0.75, 1.0, 0.25] * 10)
    assert 8 <= several < 200


def test_intervals_do_not_depend_on_the_machine_or_the_day():
    reference, new = binary(6)
    assert statistics.difference(reference, new) == statistics.difference(reference, new)


def test_holm_is_the_published_procedure():
    """R's p.adjust(c(.01, .02, .03, .04, .05), "holm") and Wright 1992 (Biometrics 48)'s step-down rule."""
    assert statistics.holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert statistics.holm([0.03, 0.005, 0.04, 0.01]) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_exactly_what_its_definition_rejects(p_values):
    adjusted = statistics.holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if (len(p_values) - rank) * p_values[index] > level:
                break
            rejected.add(index)
        assert {index for index, value in enumerate(adjusted) if value <= level} == rejected


def test_paired_values_must_be_pairs():
    with pytest.raises(RequestError, match="got 1 and 2"):
        statistics.difference([1.0], [1.0, 2.0])


def test_the_mean_interval_covers_the_mean():
    found = statistics.mean_interval([0.0, 0.5, 1.0, 1.0])
    assert found.low <= found.value == 0.625 <= found.high


@pytest.mark.parametrize(("passed", "total"), [(0, 20), (7, 20), (20, 20), (250, 300)])
def test_the_mean_interval_of_single_samples_is_clopper_and_pearsons(passed, total):
    found = statistics.mean_interval([1.0] * passed + [0.0] * (total - passed))
    exact = stats.binomtest(passed, total).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == (pytest.approx(exact.low, abs=0.01), pytest.approx(exact.high, abs=0.01))


# --- lengths and repetition -----------------------------------------------------------------------------------------


def slowly(items) -> Tail:
    """The definition: the longest end that its shortest period fits into often enough."""
    for length in range(len(items), 0, -1):
        end = items[len(items) - length :]
        for period in range(1, length // COPIES + 1):
            if all(end[i] == end[i + period] for i in range(length - period)):
                return Tail(period, length / period)
    return Tail(0, 0.0)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=24)
    | st.builds(
        lambda a, b, n: a + b * n,
        st.lists(st.integers(0, 2), max_size=6),
        st.lists(st.integers(0, 2), max_size=4),
        st.integers(0, 7),
    )
)
def test_the_periodic_tail_is_that_of_the_definition(items):
    found, wanted = periodic_tail(items), slowly(items)
    assert (found.period, found.copies) == (wanted.period, pytest.approx(wanted.copies))


def test_a_tail_is_repetitive_from_four_copies_of_twenty_items():
    text = ["once", "upon", "a", "time", "there", "was"]
    assert not periodic_tail(text * 3).repetitive
    assert periodic_tail(["so", *text * 4]).repetitive
    assert not periodic_tail([*text, *"...."]).repetitive, "four dots are punctuation"
    assert periodic_tail(["x"] * 20).repetitive
    assert periodic_tail([]) == Tail(0, 0.0)


def test_a_long_answer_is_searched_in_linear_time():
    import time

    started = time.process_time()
    periodic_tail(list(np.random.default_rng(0).integers(0, 2, 50_000)) + [7, 8, 9] * 20_000)
    assert time.process_time() - started < 2


def test_a_sample_is_measured_in_tokens_where_it_has_them_and_in_words():
    generated = {
        "completion": "[unused16]a b c[unused17]d e",
        "answer": "d e",
        "tokens": 9,
        "thought_tokens": 3,
        "repetitive": True,
    }
    found = lengths_of(generated)
    assert (found["words"], found["thought_words"], found["answer_words"]) == (5, 3, 2)
    assert (found["tokens"], found["thought_tokens"], found["repetitive"]) == (9, 3, True)
    foreign = lengths_of({"completion": "def f(): " + "pass ; " * 30})
    assert (foreign["tokens"], foreign["thought_words"], foreign["repetitive"]) == (None, None, True)


def test_a_spread_leaves_out_what_is_not_known():
    assert spread([None, 1.0, 3.0]) == {"mean": 2.0, "median": 2.0, "p95": pytest.approx(2.9), "count": 2}
    assert spread([None]) is None
