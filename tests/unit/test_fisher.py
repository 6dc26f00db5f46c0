"""fisher.py: half the mean square of a score along a small error is the KL that the error makes."""

from __future__ import annotations

import numpy as np
import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.inference import compare
from ms_pangu_quant.inference.compare import divergences, final_norm, head_rows
from ms_pangu_quant.inference.fisher import sampled_gradients
from tools.dev import make_checkpoint

TOKENS, DRAWS = 5, 4000


@pytest.fixture(scope="module", params=["tied", "untied"])
def reader(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher") / "float"
    config = make_checkpoint.make_config("tiny", tie_word_embeddings=request.param == "tied")
    make_checkpoint.write_checkpoint(folder, config, seed=1, dtype="float32")
    return CheckpointReader(folder)


@pytest.mark.parametrize("columns", [1, 40, 10_000])
def test_the_mean_square_along_an_error_is_twice_its_kl(reader, columns, monkeypatch):
    """The samples of one token are as the distribution has them, up to 1 / DRAWS, so the mean is nearly exact. `columns` of
    the head are looked at together."""
    monkeypatch.setattr(compare, "_SLICE_BYTES", columns * 4 * TOKENS)
    generator = np.random.default_rng(0)
    states = generator.standard_normal((TOKENS, reader.config.hidden_size)).astype(np.float32) * 3
    found = np.full((DRAWS, *states.shape), np.nan, np.float32)
    sampled_gradients(reader, states, 7, found)
    for _ in range(3):
        error = generator.standard_normal(states.shape).astype(np.float32) * np.float32(0.02)
        moved = [final_norm(reader, each) for each in (states, states + error)]
        kl, _, _ = divergences(
            lambda start, stop: [head_rows(reader, start, stop)] * 2,
            reader.config.vocab_size, moved, np.zeros(TOKENS, np.int32),
        )  # fmt: skip
        along = np.einsum("dth,th->dt", found.astype(np.float64), error)
        assert (along**2).mean(axis=0) / 2 == pytest.approx(kl[1], rel=0.05)
        assert np.abs(along.mean(axis=0)).max() < 0.02 * np.abs(along).mean()  # a score's mean is zero


def test_draws_of_different_tokens_and_seeds_differ(reader):
    states = np.ones((2, reader.config.hidden_size), np.float32)
    one, other = np.empty((3, *states.shape), np.float32), np.empty((3, *states.shape), np.float32)
    sampled_gradients(reader, states, 1, one)
    assert not np.array_equal(one[:, 0], one[:, 1])
    sampled_gradients(reader, states, 1, other)
    assert np.array_equal(one, other)
    sampled_gradients(reader, states, 2, other)
    assert not np.array_equal(one, other)
