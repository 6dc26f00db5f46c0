"""inference/generate.py: however requests share batches and cache, each gets the answer it would get alone.

The model is a fake whose cache holds tokens instead of keys and values. Its logits follow from all tokens it finds
through a sequence's table, so a block that two sequences shared, lost or mixed up would change an answer.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.inference import generate
from ms_pangu_quant.inference.generate import Completion, Request, Room, Scheduler
from ms_pangu_quant.inference.sampling import GenerationSettings

VOCAB = 8
LETTERS = "abcdefgh"  # token -> text
GREEDY = GenerationSettings()


@functools.cache
def logits_after(tokens: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([1, *tokens]).normal(size=VOCAB).astype(np.float32)


class FakeModel:
    def __init__(self, num_blocks, block_size, next_logits=logits_after, texts=LETTERS):
        self.cache = np.full((num_blocks, block_size), -1)
        self.block_size, self.next_logits, self.texts = block_size, next_logits, texts
        self.calls = []  # (phase, tokens in each piece, contexts, tables)

    def forward(self, pieces, contexts, tables, *, phase):
        self.calls.append((phase, list(map(tuple, pieces)), list(contexts), list(map(tuple, tables))))
        for piece, context, table in zip(pieces, contexts, tables, strict=True):
            for position, token in enumerate(piece, context):
                self.cache[table[position // self.block_size], position % self.block_size] = token
        seen = [
            tuple(
                int(self.cache[table[position // self.block_size], position % self.block_size])
                for position in range(context + len(piece))
            )
            for piece, context, table in zip(pieces, contexts, tables, strict=True)
        ]
        return np.stack([self.next_logits(tokens) for tokens in seen])

    @property
    def tokenizer(self):
        return self

    def decode(self, ids, *, skip_special_tokens=False):
        return "".join(self.texts[token] for token in ids)


def alone(prompt, max_new_tokens, sampling, generator, stop_ids=frozenset(), stop=(), next_logits=logits_after):
    """What generation means, one request and one token at a time."""
    answer = []
    while True:
        token = sampling.next_token(next_logits((*prompt, *answer)), generator)
        answer.append(token)
        text = "".join(LETTERS[token] for token in answer)
        if token in stop_ids:
            return Completion(tuple(answer[:-1]), "eos", end_id=answer[-1])
        if any(some in text for some in stop):
            return Completion(tuple(answer), "stop", next(some for some in stop if some in text))
        if len(answer) == max_new_tokens:
            return Completion(tuple(answer), "length")


def requests_of(pairs, sampling):
    return [Request(index, tuple(prompt), most, sampling.generator(index)) for index, (prompt, most) in enumerate(pairs)]


def scheduler(model, *, prefill_tokens=100, sampling=None, stop_ids=(), stop=(), barred=None):
    room = Room(len(model.cache), model.block_size, prefill_tokens)
    return Scheduler(model, room, replace(sampling or GREEDY, stop=stop), frozenset(stop_ids), barred=barred)


def completions(made, requests):
    """In the order of requests."""
    found = {request.index: completion for request, completion in made.run(requests)}
    return [found[request.index] for request in requests]


def run(pairs, *, num_blocks=100, block_size=4, **settings_of_scheduler):
    model = FakeModel(num_blocks, block_size)
    sampling = settings_of_scheduler.get("sampling") or GREEDY
    return completions(scheduler(model, **settings_of_scheduler), requests_of(pairs, sampling)), model


def always(*tokens):
    """Logits after which the answer to a one-token prompt is tokens, then tokens again."""
    return lambda seen: np.eye(VOCAB, dtype=np.float32)[tokens[(len(seen) - 1) % len(tokens)]]


PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
SAMPLINGS = st.sampled_from(
    [GREEDY, GenerationSettings(temperature=1.0, seed=5), GenerationSettings(temperature=0.8, top_p=0.9, top_k=4, seed=6)]
)


@st.composite
def workloads(draw):
    """Requests, the limits they share, and a cache that holds at least the largest of them."""
    pairs = draw(st.lists(st.tuples(PROMPT, st.integers(1, 10)), min_size=1, max_size=7))
    block_size = draw(st.integers(1, 5))
    largest = max(-(-(len(prompt) + most) // block_size) for prompt, most in pairs)
    return {
        "pairs": pairs,
        "block_size": block_size,
        "num_blocks": largest + draw(st.integers(0, 12)),
        "max_batch": draw(st.integers(1, 5)),
        "prefill_tokens": draw(st.integers(1, 25)),
    }


@given(workloads(), SAMPLINGS, st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB - 1))
def test_a_barred_id_is_never_taken_and_the_others_are_as_if_it_were_not_there(work, sampling, ids):
    barred = np.isin(np.arange(VOCAB), list(ids))

    def without(seen):
        return np.where(barred, np.float32(-1e30), logits_after(seen))

    pairs = work.pop("pairs")
    answers, _ = run(pairs, num_blocks=100, block_size=work["block_size"], sampling=sampling, barred=barred)
    for (prompt, most), request, answer in zip(pairs, requests_of(pairs, sampling), answers, strict=True):
        assert not ids & set(answer.token_ids)
        assert answer == alone(prompt, most, sampling, request.generator, next_logits=without)


@settings(max_examples=300)
@given(
    workloads(),
    SAMPLINGS,
    st.sets(st.integers(0, VOCAB - 1), max_size=2),
    st.sampled_from([(), ("ab",), ("c", "dd"), ("efg", "h", "ba")]),
)
def test_answers_are_those_of_one_request_at_a_time_whatever_is_shared(work, sampling, stop_ids, stop):
    pairs, model = work["pairs"], FakeModel(work["num_blocks"], work["block_size"])
    with mock.patch.object(generate, "MAX_BATCH", work["max_batch"]):
        made = scheduler(model, prefill_tokens=work["prefill_tokens"], sampling=sampling, stop_ids=stop_ids, stop=stop)
        found = completions(made, requests_of(pairs, sampling))
    assert found == [
        alone(prompt, most, sampling, sampling.generator(index), stop_ids, stop)
        for index, (prompt, most) in enumerate(pairs)
    ]


@settings(max_examples=150)
@given(workloads(), SAMPLINGS)
def test_limits_are_kept_in_every_pass(work, sampling):
    pairs, model = work["pairs"], FakeModel(work["num_blocks"], work["block_size"])
    with mock.patch.object(generate, "MAX_BATCH", work["max_batch"]):
        completions(
            scheduler(model, prefill_tokens=work["prefill_tokens"], sampling=sampling), requests_of(pairs, sampling)
        )
    for phase, pieces, contexts, tables in model.calls:
        assert 1 <= len(pieces) <= work["max_batch"]
        assert all(pieces)
        used = [block for table in tables for block in table]
        assert len(used) == len(set(used)), "two live sequences share a block"
        for piece, context, table in zip(pieces, contexts, tables, strict=True):
            assert context + len(piece) <= len(table) * work["block_size"]
        if phase == "prefill":
            assert sum(map(len, pieces)) <= work["prefill_tokens"]
        else:
            assert phase == "decode"
            assert {len(piece) for piece in pieces} == {1}


@settings(max_examples=100)
@given(workloads(), st.sets(st.integers(0, VOCAB - 1), max_size=3))
def test_every_block_is_free_again_at_the_end(work, stop_ids):
    """Shown by a last request that needs the whole cache."""
    model, sampling = FakeModel(work["num_blocks"], work["block_size"]), GREEDY
    made = scheduler(model, prefill_tokens=work["prefill_tokens"], stop_ids=stop_ids)
    completions(made, requests_of(work["pairs"], sampling))
    prompt, most = (1,), work["num_blocks"] * work["block_size"] - 1
    if most:
        found = completions(made, requests_of([(prompt, most)], sampling))
        assert found == [alone(prompt, most, sampling, None, stop_ids)]


def test_an_answer_is_not_kept_once_it_was_given():
    requests, given = requests_of([((token % VOCAB,), 3) for token in range(100)], GREEDY), []
    for _, completion in scheduler(FakeModel(100, 4)).run(requests):
        given.append(weakref.ref(completion))
        del completion
        assert sum(each() is not None for each in given) <= 1
    assert len(given) == 100


def test_a_cache_without_a_block_to_spare_is_enough():
    pairs = [((1, 2, 3), 5)] * 6
    found, model = run(pairs, num_blocks=4, block_size=4)
    assert found == [alone((1, 2, 3), 5, GREEDY, None)] * 6
    assert max(len(pieces) for _, pieces, _, _ in model.calls) == 2


def test_requests_are_decoded_together():
    """Eight answers of ten tokens take nine decode passes after their prefill, not seventy-two."""
    _, model = run([((token, 7), 10) for token in range(8)])
    assert [(phase, len(pieces)) for phase, pieces, _, _ in model.calls] == [("prefill", 8), *[("decode", 8)] * 9]


def test_a_finished_answer_makes_room_at_once():
    pairs = [((1,), 2), ((2,), 6), ((3,), 2), ((4,), 2)]
    with mock.patch.object(generate, "MAX_BATCH", 2):
        found, model = run(pairs)
    assert [len(pieces) for phase, pieces, _, _ in model.calls if phase == "decode"] == [2, 2, 2, 1, 1]
    assert [len(completion.token_ids) for completion in found] == [2, 6, 2, 2]


def test_requests_are_admitted_in_order_even_if_a_later_one_would_fit():
    """Of 4 blocks the first takes 3; the third needs the one that is left, but the second was there before it."""
    pairs = [((1, 1, 1), 9), ((2, 2, 2), 9), ((3,), 1)]
    _, model = run(pairs, num_blocks=4, block_size=4)
    assert [pieces for phase, pieces, _, _ in model.calls if phase == "prefill"] == [[(1, 1, 1)], [(2, 2, 2), (3,)]]


def test_a_long_prompt_is_prefilled_in_pieces_and_short_ones_fill_up_the_pass():
    _, model = run([(tuple(range(7)), 1), ((1, 2), 1), ((3, 4, 5), 1)], prefill_tokens=5)
    assert [(pieces, contexts) for _, pieces, contexts, _ in model.calls] == [
        ([(0, 1, 2, 3, 4)], [0]),
        ([(5, 6), (1, 2), (3,)], [5, 0, 0]),
        ([(4, 5)], [1]),
    ]


def test_answers_come_in_the_order_of_requests_not_of_completion():
    with mock.patch.object(generate, "MAX_BATCH", 2):
        found, _ = run([((token,), most) for token, most in enumerate([9, 1, 5, 2, 7])])
    assert [len(completion.token_ids) for completion in found] == [9, 1, 5, 2, 7]


def test_nothing_to_do_calls_nothing():
    found, model = run([])
    assert found == []
    assert model.calls == []


@pytest.mark.parametrize("pair", [((1,) * 30, 11), ((1,), 40), ((1,) * 41, 1)])
def test_a_request_that_can_never_fit_is_refused_before_anything_runs(pair):
    model = FakeModel(10, 4)
    said = rf"{len(pair[0])} tokens with max_new_tokens {pair[1]} .*40 tokens.*kv_cache_tokens"
    with pytest.raises(RequestError, match=said):
        completions(scheduler(model), requests_of([((1,), 2), pair, ((2,), 2)], GREEDY))
    assert model.calls == []


def test_a_request_that_fills_the_cache_exactly_fits():
    found, _ = run([((1,) * 30, 10)], num_blocks=10, block_size=4)
    assert len(found[0].token_ids) == 10


def answer(next_logits, most=6, **settings_of_scheduler):
    texts = settings_of_scheduler.pop("texts", LETTERS)
    model = FakeModel(20, 4, next_logits, texts)
    (completion,) = completions(scheduler(model, **settings_of_scheduler), requests_of([((0,), most)], GREEDY))
    return completion


def test_an_answer_ends_for_one_of_three_reasons():
    assert answer(always(1, 2, 3)) == Completion((1, 2, 3, 1, 2, 3), "length")
    assert answer(always(1, 2, 3), stop_ids={3}) == Completion((1, 2), "eos", end_id=3)
    assert answer(always(1, 2, 3), stop=["cd"]) == Completion((1, 2, 3), "stop", "cd")


def test_an_end_token_at_once_gives_an_empty_answer():
    assert answer(always(5), stop_ids={5}) == Completion((), "eos", end_id=5)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_end_token_wins_over_the_length_on_the_last_place(most):
    assert answer(always(1, 2, 3), most, stop_ids={3}) == (
        Completion((1, 2), "eos", end_id=3) if most == 3 else Completion((1, 2, 3)[:most], "length")
    )


def test_the_length_is_counted_in_new_tokens():
    for most in range(1, 6):
        assert len(answer(always(1, 2, 3), most).token_ids) == most


def test_a_stop_text_in_the_prompt_does_not_end_the_answer():
    assert answer(always(1, 2, 3), stop=["a"]) == Completion((1, 2, 3, 1, 2, 3), "length")


def test_a_stop_text_is_found_across_tokens_and_inside_one():
    texts = ["", "def", " f", "():\n", "\nassert", " x", "", ""]
    for stop, tokens in (("\n\nassert", 4), ("ssert", 4), ("ef f(", 3), ("def", 1)):
        found = answer(always(1, 2, 3, 4, 5), texts=texts, stop=[stop])
        assert found == Completion((1, 2, 3, 4)[:tokens], "stop", stop)


def test_of_two_stop_texts_in_one_token_the_one_that_comes_first_in_the_text_ends_the_answer():
    """The text is cut at the stop that is reported: with the other one, a stop text would stay in the answer."""
    texts = ["", "one", "\nif x\nprint", "", "", "", "", ""]
    assert answer(always(1, 2), texts=texts, stop=["\nprint", "\nif"]) == Completion((1, 2), "stop", "\nif")


class ByteTokens(FakeModel):
    """Every token is one byte of UTF-8, as byte fallback makes of rare characters."""

    def decode(self, ids, *, skip_special_tokens=False):
        return bytes(self.texts[token] for token in ids).decode("utf-8", errors="replace")


def test_a_stop_text_of_four_byte_characters_is_found_in_a_long_answer():
    letters = "🙂".encode()
    model = ByteTokens(100, 4, always(0, 1, 2, 3), [*letters, 65, 66, 67, 68])
    before = "🙂" * 3
    (completion,) = completions(scheduler(model, stop=[before]), requests_of([((4,), 50)], GREEDY))
    assert completion == Completion((0, 1, 2, 3) * 3, "stop", before)


def test_only_the_end_of_a_long_answer_is_decoded_for_stop_texts():
    """Decoding all of it after every token would take quadratic time."""
    decoded = []
    model = FakeModel(2000, 4, always(1, 2, 3))
    decode = model.decode
    model.decode = lambda ids, **settings_of_decode: decoded.append(len(ids)) or decode(ids)
    completions(scheduler(model, stop=["xyz"]), requests_of([((0,), 300)], GREEDY))
    assert max(decoded) <= 20
