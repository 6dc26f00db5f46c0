"""budget.py: the assignment is the best of all, a larger budget never makes it worse, and what cannot be met is named."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.mixed.budget import Budget, Choice, choose

WEIGHTS = 1000


@st.composite
def choices(draw):
    """Up to nine groups of three shapes; one of them may be smaller in the dearer scheme, as int4 stored in bytes is."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 400), st.integers(-50, 400)), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 9))):
        cheap, added = draw(st.sampled_from(shapes))
        dear_kl = draw(st.integers(0, 40))
        found.append(Choice((cheap, cheap + added), ((dear_kl + draw(st.integers(0, 100))) / 64, dear_kl / 64)))
    return found


def outcome(each, dear):
    bits = sum(choice.bits[place] for choice, place in zip(each, dear, strict=True))
    return bits / WEIGHTS, sum(choice.kl[place] for choice, place in zip(each, dear, strict=True))


def outcomes(each):
    return [outcome(each, dear) for dear in itertools.product((False, True), repeat=len(each))]


@given(choices(), st.floats(0.001, 4.0))
def test_no_assignment_within_the_bits_has_a_smaller_kl(each, limit):
    allowed = [found for found in outcomes(each) if found[0] <= limit]
    if not allowed:
        with pytest.raises(RecipeError, match=r"budget\.bits_per_weight: got .* give .* to .* here"):
            choose(each, Budget(bits_per_weight=limit), weights=WEIGHTS)
        return
    bits, kl = outcome(each, choose(each, Budget(bits_per_weight=limit), weights=WEIGHTS))
    assert bits <= limit
    assert kl == min(found[1] for found in allowed)  # multiples of 1/64: sums are exact
    assert bits == min(found[0] for found in allowed if found[1] == kl)


@given(choices(), st.floats(0.001, 20.0))
def test_no_assignment_within_the_kl_has_fewer_bits(each, limit):
    allowed = [found for found in outcomes(each) if found[1] <= limit]
    if not allowed:
        with pytest.raises(RecipeError, match=r"budget\.max_kl: got .* give .* to .* here"):
            choose(each, Budget(max_kl=limit), weights=WEIGHTS)
        return
    bits, kl = outcome(each, choose(each, Budget(max_kl=limit), weights=WEIGHTS))
    assert kl <= limit
    assert bits == min(found[0] for found in allowed)


@given(choices(), st.floats(0.3, 4.0), st.floats(0.0, 2.0))
def test_more_bits_are_never_predicted_to_lose_more(each, limit, more):
    try:
        fewer = choose(each, Budget(bits_per_weight=limit), weights=WEIGHTS)
    except RecipeError:
        return
    assert outcome(each, choose(each, Budget(bits_per_weight=limit + more), weights=WEIGHTS))[1] <= outcome(each, fewer)[1]


def test_what_is_no_choice_counts_too():
    each = [Choice((100, 200), (1.0, 0.5))]
    assert choose(each, Budget(bits_per_weight=0.2), weights=WEIGHTS) == [True]
    assert choose(each, Budget(bits_per_weight=0.2), weights=WEIGHTS, bits=1) == [False]
    assert choose(each, Budget(max_kl=1.0), weights=WEIGHTS) == [False]
    assert choose(each, Budget(max_kl=1.0), weights=WEIGHTS, kl=0.25) == [True]


def test_the_range_that_can_be_reached_is_in_the_error():
    each = [Choice((4000, 8000), (0.5, 0.125))] * 3
    with pytest.raises(RecipeError, match=r"got 11\.9, but w4a8_g128 and w8a8 give 12 to 24 here"):
        choose(each, Budget(bits_per_weight=11.9), weights=WEIGHTS)
    with pytest.raises(RecipeError, match=r"got 0\.3, but w4a8_g128 and w8a8 give 0\.375 to 1\.5 here"):
        choose(each, Budget(max_kl=0.3), weights=WEIGHTS)


@pytest.mark.slow
def test_a_model_of_a_hundred_blocks_is_decided_at_once():
    each = [Choice((4 * size, 8 * size), (block / 64, 0.0)) for block in range(100) for size in (3, 5, 7, 11)]
    dear = choose(each, Budget(bits_per_weight=6.0), weights=100 * 26)
    bits, kl = outcome(each, dear)
    assert bits * WEIGHTS <= 6.0 * 2600
    assert 0 < kl < outcome(each, [False] * 400)[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "budget: got no limit"),
        ({"bits_per_weight": 4.5, "max_kl": 0.1}, "budget: got bits_per_weight and max_kl"),
        ({"bits_per_weight": 0}, "budget.bits_per_weight: got 0"),
        ({"max_kl": "small"}, "budget.max_kl: got 'small'"),
        ({"max_kl": float("nan")}, "budget.max_kl: got nan"),
        ({"bits_per_weight": True}, "budget.bits_per_weight: got True"),
        ({"bits_per_weight": 4.5, "schemes": ["w8a8"]}, "budget.schemes: got"),
        ({"bits_per_weight": 4.5, "schemes": "w8a8"}, "budget.schemes: got 'w8a8'"),
        ({"bits_per_weight": 4.5, "schemes": ["w8a8", "w8a8"]}, "budget.schemes: got"),
        ({"bits_per_weight": 4.5, "schemes": ["w4a8", "float"]}, "budget.schemes: got"),
        ({"bits_per_weight": 4.5, "schemes": [["w4a8"], "w8a8"]}, "budget.schemes: got"),
    ],
)
def test_senseless_budgets_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said.replace(".", r"\.").replace("[", r"\[")):
        Budget(**settings)
