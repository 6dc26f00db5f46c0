"""Scores of a model's own samples: what their mean outer product is, is the Fisher information.

The model is moved by a small error d of its hidden states, from next-token distributions p to q. Summed over the tokens of
a text, KL(p || q) = E[(g . d)^2] / 2 + O(|d|^3), g the gradient of the sum of log p(y) by the hidden states, each y drawn
from p at its token (Amari 1998; Martens 2020, arXiv:1412.1193): terms between tokens vanish, as a score's mean is zero. So
gradients of a few draws stand for the whole model behind an error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.formats.reader import Reader
from ms_pangu_quant.inference.compare import final_norm, head_rows, vocabulary_slices


def sampled_gradients(reader: Reader, states: NDArray[np.float32], seed: int, found: NDArray[np.float32]) -> None:
    """Write gradients of log p(y) by states [tokens, hidden] behind the last block into `found` [draws, tokens, hidden].

    Each token has a y for each draw. A token's draws are a systematic sample: in the distribution function they are 1/draws
    apart.
    """
    vocab, (draws, tokens, width) = reader.config.vocab_size, found.shape
    normalised = final_norm(reader, states)
    log_total = _log_total(reader, normalised)
    first = np.random.default_rng(seed).random(tokens)
    wanted = (first + np.arange(draws)[:, None] / draws) % 1.0
    expected, below = np.zeros_like(states), np.zeros(tokens)
    for start, stop in vocabulary_slices(vocab, tokens):
        rows = head_rows(reader, start, stop)
        probability = np.exp((normalised @ rows.T).astype(np.float64) - log_total[:, None])
        expected += probability.astype(np.float32) @ rows
        reached = below[:, None] + np.cumsum(probability, axis=1)
        if stop == vocab:
            reached[:, -1] = np.inf  # what rounding leaves is the last token's
        for draw in range(draws):
            here = np.flatnonzero((wanted[draw] >= below) & (wanted[draw] < reached[:, -1]))
            found[draw, here] = rows[(reached[here] <= wanted[draw, here, None]).sum(axis=1)]
        below = reached[:, -1]
    # Through the norm: with r = 1 / rms(x) and g times its weight, r g - r^3 x mean(x g).
    scale = 1 / np.sqrt(np.mean(np.square(states), axis=1, keepdims=True) + np.float32(reader.config.rms_norm_eps))
    weight = reader.files.read_float32(layout.FINAL_NORM)
    for each in found:
        behind = (each - expected) * weight
        along = np.einsum("th,th->t", states, behind)[:, None] / np.float32(width)
        each[:] = scale * behind - scale**3 * along * states


def _log_total(reader: Reader, normalised: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the exponentials of each token's logits."""
    top, total = np.full(len(normalised), -np.inf), np.zeros(len(normalised))
    for start, stop in vocabulary_slices(reader.config.vocab_size, len(normalised)):
        logits = (normalised @ head_rows(reader, start, stop).T).astype(np.float64)
        raised = np.maximum(top, logits.max(axis=1))
        total = total * np.exp(top - raised) + np.exp(logits - raised[:, None]).sum(axis=1)
        top = raised
    return top + np.log(total)
