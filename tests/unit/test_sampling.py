"""inference/sampling.py: the distribution drawn from, and that a draw depends on seed and prompt alone."""

import functools
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.inference.sampling import GenerationSettings, Keywords

Sampling = functools.partial(GenerationSettings, 1)  # how many tokens an answer may have is no part of a draw

LOGITS = hnp.arrays(np.float32, st.integers(1, 12), elements=st.floats(-20, 20, width=16), unique=True)
TIED = hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-2, 2).map(float))


def reference(logits, temperature, top_p, top_k):
    """Probability of each token, one at a time: temperature, then the top_k, then the fewest that fill top_p."""
    ranked = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    ranked = ranked[:top_k] if top_k else ranked
    largest = float(logits[ranked[0]])
    weights = {token: np.exp((float(logits[token]) - largest) / temperature) for token in ranked}
    total = sum(weights.values())
    kept, filled = [], 0.0
    for token in ranked:
        if filled >= top_p:
            break
        kept.append(token)
        filled += weights[token] / total
    kept_total = sum(weights[token] for token in kept)
    return [weights[token] / kept_total if token in kept else 0.0 for token in range(len(logits))]


@given(LOGITS | TIED, st.floats(0.1, 4), st.sampled_from([0.03, 0.31, 0.77, 0.93, 1.0]), st.integers(0, 14))
def test_probabilities_equal_a_slow_reference(logits, temperature, top_p, top_k):
    found = Sampling(temperature, top_p, top_k).probabilities(logits)
    assert found.shape == logits.shape
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, reference(logits, temperature, top_p, top_k), rtol=1e-9, atol=1e-300)


def test_hand_computed_probabilities():
    logits = np.log(np.array([1, 4, 2, 1], np.float32))
    assert Sampling(1.0).probabilities(logits) == pytest.approx([1 / 8, 1 / 2, 1 / 4, 1 / 8])
    assert Sampling(0.5).probabilities(logits) == pytest.approx([1 / 22, 16 / 22, 4 / 22, 1 / 22])
    assert Sampling(1.0, top_k=2).probabilities(logits) == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert Sampling(1.0, top_p=0.49).probabilities(logits) == pytest.approx([0, 1, 0, 0])
    assert Sampling(1.0, top_p=0.51).probabilities(logits) == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert Sampling(1.0, top_p=0.8).probabilities(logits) == pytest.approx([1 / 7, 4 / 7, 2 / 7, 0])
    assert Sampling(1.0, top_k=3, top_p=0.6).probabilities(logits) == pytest.approx([0, 2 / 3, 1 / 3, 0])


@given(LOGITS | TIED, st.integers(0, 1000), st.floats(0.01, 1), st.integers(0, 5))
def test_temperature_zero_takes_the_largest_and_the_first_of_equals(logits, seed, top_p, top_k):
    sampling = Sampling(0.0, top_p, top_k, seed)
    assert sampling.next_token(logits, sampling.generator(0)) == int(np.argmax(logits))


@given(LOGITS, st.integers(0, 1000))
def test_top_k_of_one_a_tiny_top_p_and_a_tiny_temperature_are_greedy(logits, seed):
    for sampling in (Sampling(1.0, 1.0, 1, seed), Sampling(1.0, 1e-9, 0, seed), Sampling(1e-10, 1.0, 0, seed)):
        assert sampling.next_token(logits, sampling.generator(0)) == int(logits.argmax())


def test_logits_as_large_as_float32_gives_do_not_overflow():
    logits = np.array([3e38, 2.9e38, -3e38], np.float32)
    assert Sampling(1.0).probabilities(logits).tolist() == [1, 0, 0]
    masked = np.array([-np.inf, 0, 0], np.float32)
    assert Sampling(1.0).probabilities(masked) == pytest.approx([0, 0.5, 0.5])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.8), Sampling(1.2, top_p=0.9, top_k=6)],
    ids=str,
)
def test_frequencies_of_twenty_thousand_draws_are_the_probabilities(sampling):
    logits = np.random.default_rng(0).normal(scale=1.5, size=9).astype(np.float32)
    wanted = np.array(reference(logits, sampling.temperature, sampling.top_p, sampling.top_k))
    generator, draws = sampling.generator(0), 20_000
    counts = np.bincount([sampling.next_token(logits, generator) for _ in range(draws)], minlength=9)
    assert (np.abs(counts - draws * wanted) <= 5 * np.sqrt(draws * wanted * (1 - wanted)) + 1e-9).all()


def draws(sampling, prompt_index, count=50):
    logits = np.random.default_rng(1).normal(size=40).astype(np.float32)
    generator = sampling.generator(prompt_index)
    return [sampling.next_token(logits, generator) for _ in range(count)]


def test_a_draw_depends_on_seed_and_prompt_index_and_on_nothing_else():
    sampling = Sampling(1.0, seed=3)
    assert draws(sampling, 0) == draws(Sampling(1.0, seed=3), 0)
    different = [draws(sampling, 0), draws(sampling, 1), draws(Sampling(1.0, seed=4), 0), draws(Sampling(1.0, seed=1), 3)]
    assert len({tuple(tokens) for tokens in different}) == 4


def test_what_else_is_drawn_in_between_does_not_change_a_draw():
    logits = np.random.default_rng(1).normal(size=40).astype(np.float32)
    sampling = Sampling(1.0, seed=3)
    generators = [sampling.generator(index) for index in range(4)]
    together = [[sampling.next_token(logits, generator) for generator in generators] for _ in range(50)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == [draws(sampling, index) for index in range(4)]


class Fixed:
    """A generator whose next number is known."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(
    ("value", "token"), [(0.0, 1), (0.2499, 1), (0.2501, 2), (0.7499, 2), (0.7501, 4), (1 - 2**-53, 4)]
)
def test_a_number_falls_on_the_token_whose_share_of_the_line_it_is_in_and_never_on_one_of_no_share(value, token):
    logits = np.array([-np.inf, 0, np.log(2), -np.inf, 0, -np.inf], np.float32)
    assert Sampling(1.0).next_token(logits, Fixed(value)) == token


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.01}, "top_p: got 1.01"),
        ({"top_p": float("nan")}, "top_p: got nan"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(settings, named):
    with pytest.raises(RequestError, match=named):
        GenerationSettings(**settings)


def test_every_setting_is_a_keyword_of_generate():
    assert [field.name for field in fields(GenerationSettings)] == ["max_new_tokens", *Keywords.__annotations__]
