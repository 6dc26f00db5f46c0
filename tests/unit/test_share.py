"""job/share.py and checkpoint/cut.py: what each rank sees, rounds and holds."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.calibration.statistics import SAMPLE_TOKENS, InputStats, Needs, StatsBuilder
from ms_pangu_quant.calibration.stream import Sample
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.cut import cache_heads, check_cut
from ms_pangu_quant.errors import BackendError, DataError
from ms_pangu_quant.job.share import part_of, share_of
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import PRESETS


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_are_all_sequences_once_in_order_and_none_is_empty(lengths, size):
    if len(lengths) < size:
        with pytest.raises(DataError, match=f"{len(lengths)} sequences for {size} ranks"):
            share_of(lengths, 0, size)
        return
    shares = [share_of(lengths, rank, size) for rank in range(size)]
    assert shares == [share_of(lengths, rank, size, least=0) for rank in range(size)]
    assert shares[0].begin == 0
    assert shares[-1].end == len(lengths)
    for one, two in itertools.pairwise(shares):
        assert one.end == two.begin
    counts = [share.end - share.begin for share in shares]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert [share.first_row for share in shares] == [sum(lengths[: share.begin]) for share in shares]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(1, 9))
def test_the_ranks_samples_are_every_nth_sequence_and_no_rank_is_without(lengths, size):
    """Together as many tokens as are wanted or more, of the calibration data and in its order, whoever has them."""
    if len(lengths) < size:
        return
    shares = [share_of(lengths, rank, size) for rank in range(size)]
    samples = [Sample.draw(lengths, share, size) for share in shares]
    own = [np.arange(share.first_row, sum(lengths[: share.end])) for share in shares]
    rows = np.concatenate([mine[sample.rows] for mine, sample in zip(own, samples, strict=True)])
    edges = np.cumsum([0, *lengths])
    step = next(n for n in range(1, len(lengths) + 1) if sum(lengths[::n]) == len(rows))
    assert rows.tolist() == [row for index in range(0, len(lengths), step) for row in range(*edges[index : index + 2])]
    assert [length for sample in samples for length in sample.lengths] == lengths[::step]
    assert [sample.first_row for sample in samples] == np.cumsum([0, *(len(each.rows) for each in samples)])[:-1].tolist()
    assert min(len(sample.lengths) for sample in samples) >= 1
    if size == 1 and len(set(lengths)) == 1:
        assert min(SAMPLE_TOKENS, sum(lengths)) <= len(rows) <= max(2 * SAMPLE_TOKENS, SAMPLE_TOKENS + max(lengths))


@given(st.lists(st.integers(1, 50), max_size=5), st.integers(1, 9))
def test_where_none_is_needed_a_share_may_be_empty(lengths, size):
    shares = [share_of(lengths, rank, size, least=0) for rank in range(size)]
    assert [index for share in shares for index in range(share.begin, share.end)] == list(range(len(lengths)))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_statistics_of_the_shares_merge_into_those_of_the_whole(size):
    """The sampled rows and absolute maxima bit for bit; sums up to the order of float additions."""
    draw = np.random.default_rng(1)
    lengths = draw.integers(200, 900, 9).tolist()
    x = draw.normal(size=(sum(lengths), 12)).astype(np.float32)
    y = x + draw.normal(size=x.shape).astype(np.float32) / 8

    def seen(begin, end):
        builder = StatsBuilder(Needs(gram=True, rows=100), "x", start=begin)
        builder.add(x[begin:end], y[begin:end])
        return builder.finish()

    rows = [sum(lengths[: share_of(lengths, rank, size).begin]) for rank in range(size)] + [len(x)]
    whole = seen(0, len(x))
    merged = functools.reduce(InputStats.merge, itertools.starmap(seen, itertools.pairwise(rows)))
    assert merged.tokens == whole.tokens
    assert merged.absmax.tobytes() == whole.absmax.tobytes()
    assert merged.sample.keys.tobytes() == whole.sample.keys.tobytes()
    assert merged.sample.rows.tobytes() == whole.sample.rows.tobytes()
    largest = np.abs(whole.gram).max()
    for name in ("gram", "drift", "squares"):
        assert np.abs(getattr(merged, name) - getattr(whole, name)).max() <= 1e-6 * largest
    assert isinstance(merged, InputStats)


@pytest.mark.parametrize("rows", [1, 20, 4097])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_every_row_is_rounded_by_one_rank_and_none_has_two_more_than_another(rows, size):
    shares = [part_of(rows, rank, size) for rank in range(size)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    counts = [share.stop - share.start for share in shares]
    assert max(counts) - min(counts) <= 1


def config(**changed):
    raw = {
        "model_type": "PanguEmbedded",
        "bias": True,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return ModelConfig.from_dict({**raw, **changed}, where="test")


def plan(preset, *sites):
    """These layers of the one block, or all, in this scheme."""
    chosen = {site.name: PRESETS[preset] if site in sites or not sites else None for site in layout.SITES}
    return Plan.of_layers({f"model.layers.0.{name}": scheme for name, scheme in chosen.items()}, 1)


@pytest.mark.parametrize(
    ("changed", "ranks", "said"),
    [
        ({"num_attention_heads": 4}, 8, "num_attention_heads is 4"),
        ({"intermediate_size": 770}, 4, "intermediate_size is 770"),
        ({"vocab_size": 1023}, 2, "vocab_size is 1023"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 32}, 2, "num_key_value_heads is 3"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_named(changed, ranks, said):
    with pytest.raises(BackendError, match=said):
        check_cut(config(**changed), ranks, Plan.uniform(config(**changed)))


def test_key_heads_are_copied_where_there_are_more_ranks():
    check_cut(config(), 8, Plan.uniform(config()))
    assert [cache_heads(config(), ranks) for ranks in (1, 2, 4, 8)] == [2, 1, 1, 1]


def test_an_int4_group_that_a_cut_would_split_is_named():
    check_cut(config(), 2, plan("w4a8_g128"))  # 128 inputs of o_proj and 384 of down_proj on each rank
    with pytest.raises(BackendError, match=r"o_proj has 64 inputs on each rank .* groups of 128"):
        check_cut(config(), 4, plan("w4a8_g128"))
    with pytest.raises(BackendError, match=r"down_proj has 192 inputs on each rank .* groups of 128"):
        check_cut(config(), 4, plan("w4a8_g128", layout.DOWN_PROJ))
    check_cut(config(), 4, plan("w8a8_static", layout.DOWN_PROJ, layout.O_PROJ))  # int8 has no groups
    check_cut(config(), 4, plan("w4a8_g128", layout.UP_PROJ))  # cut along its outputs
    odd = config(intermediate_size=774, num_attention_heads=2)
    with pytest.raises(BackendError, match="two to a byte"):
        check_cut(odd, 2, plan("w4a8"))
    check_cut(dataclasses.replace(odd), 1, plan("w4a8"))
