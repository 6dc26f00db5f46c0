"""How far a quantized checkpoint's next-token distributions are from the float one's: KL, agreement, perplexity.

Both models are streamed block by block and the vocabulary slice by slice, so two 7B models compare in the memory of one
block. Quantized blocks run as they are served where the backend has integer kernels, else with their codes and scales as
float32 values (see calibration.stream), which gives the served network's results up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import check_same_model
from ms_pangu_quant.checkpoint.reader import embedding_rows
from ms_pangu_quant.formats.reader import Reader, open_checkpoint
from ms_pangu_quant.network import runtime

_SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class Comparison:
    """Over every token that has a next one.

    kl_mean, kl_p99   nats, KL(reference || quantized): mean and 99th percentile over tokens.
    kl_se             standard error of kl_mean over sequences (tokens of one text are not independent); None for one.
    top1_agreement    share of tokens whose most likely next token is the same.
    ppl_*             perplexity of the text itself; infinite where it is beyond what a float holds.

    A figure is NaN where a model's logits are infinite. In JSON both are null.
    """

    texts: int
    tokens: int
    kl_mean: float
    kl_se: float | None
    kl_p99: float
    top1_agreement: float
    ppl_reference: float
    ppl_quantized: float


def compare(
    reference: Path, quantized: Path, sequences: Sequence[NDArray[np.int32]], on_block: Callable[[], None] = lambda: None
) -> Comparison:
    """Compare two directories (float or quantized) on token sequences, each [length >= 2].

    on_block  called after each of the blocks_to_run() blocks.
    Raises    CheckpointError if the two are not the same model's.
    """
    readers = open_checkpoint(reference), open_checkpoint(quantized)
    check_same_model(quantized, readers[1].config, reference, readers[0].config)
    states = [_final_states(reader, sequences, on_block) for reader in readers]
    targets = np.concatenate([sequence[1:] for sequence in sequences])
    kl, agree, nll = divergences(
        lambda start, stop: [head_rows(reader, start, stop) for reader in readers],
        readers[0].config.vocab_size,
        states,
        targets,
    )
    ends = np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1]
    return Comparison(
        texts=len(sequences),
        tokens=len(targets),
        kl_mean=float(kl[1].mean()),
        kl_se=cluster_error(np.split(kl[1], ends)),
        kl_p99=float(np.percentile(kl[1], 99)),
        top1_agreement=float(agree[1].mean()),
        ppl_reference=_perplexity(nll[0]),
        ppl_quantized=_perplexity(nll[1]),
    )


def _perplexity(nll: NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(nll.mean()))


def _final_states(
    reader: Reader, sequences: Sequence[NDArray[np.int32]], on_block: Callable[[], None]
) -> NDArray[np.float32]:
    """Normalised hidden states [tokens, hidden] of every token that has a next one."""
    runtime.ensure_started()
    from ms_pangu_quant.calibration.runner import BlockRunner, Hidden

    inputs = [sequence[:-1] for sequence in sequences]
    hidden = Hidden(embedding_rows(reader.files, np.concatenate(inputs)), [len(sequence) for sequence in inputs])
    runner = BlockRunner(reader.config, hidden.lengths)
    for index in range(reader.config.num_hidden_layers):
        hidden = runner.advance(reader.rounded_block(index), hidden)
        on_block()
    return final_norm(reader, hidden.states)


def final_norm(reader: Reader, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the head reads [tokens, hidden] of hidden states behind the last block."""
    scale = 1 / np.sqrt(np.mean(np.square(states), axis=1, keepdims=True) + np.float32(reader.config.rms_norm_eps))
    normalised: NDArray[np.float32] = states * scale * reader.files.read_float32(layout.FINAL_NORM)
    return normalised


@np.errstate(over="ignore", invalid="ignore")  # logits beyond float32 are told by the NaN that they make
def divergences(
    head: Callable[[int, int], Sequence[NDArray[np.float32]]],
    vocab: int,
    states: Sequence[NDArray[np.float32]],
    targets: NDArray[np.int32],
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Of models 0, the reference, 1, 2, ...: KL(0 || model), whether the argmax is the same, -log likelihood of `targets`.

    head     (start, stop) -> rows [stop - start, hidden] of each model's head.
    states   normalised hidden states [tokens, hidden] of each model; targets [tokens].
    Returns  three arrays [models, tokens], nats; the first row of the first is 0.

    One pass over slices of the vocabulary; the normalisers are kept as running log-sum-exps (Milakov and Gimelshein 2018,
    arXiv:1805.02867).
    """
    shape = len(states), len(targets)
    top, total, chosen = np.full(shape, -np.inf), np.zeros(shape), np.zeros(shape)
    best = np.zeros(shape, np.int64)
    weighted = np.zeros(shape)  # sum over the vocabulary of exp(a - top of a) * (a - b), a the reference's logits
    step = max(1, _SLICE_BYTES // (4 * max(len(targets), 1)))
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        inside = np.flatnonzero((targets >= start) & (targets < stop))
        for model, (state, rows) in enumerate(zip(states, head(start, stop), strict=True)):
            values = (state @ rows.T).astype(np.float64)
            peak = values.max(axis=1)
            best[model] = np.where(peak > top[model], values.argmax(axis=1) + start, best[model])
            raised = np.maximum(top[model], peak)
            chosen[model][inside] = values[inside, targets[inside] - start]
            if model == 0:
                shrink, reference = np.exp(top[0] - raised), values
                probability = np.exp(values - raised[:, None])
                total[0] = total[0] * shrink + probability.sum(axis=1)
            else:
                total[model] = total[model] * np.exp(top[model] - raised) + np.exp(values - raised[:, None]).sum(axis=1)
                weighted[model] = weighted[model] * shrink + np.einsum("tv,tv->t", probability, reference - values)
            top[model] = raised
    log_total = top + np.log(total)
    kl = np.maximum(weighted / total[0] - log_total[0] + log_total, 0.0)
    kl[0] = 0.0
    return kl, best == best[0], log_total - chosen


def head_rows(reader: Reader, start: int, stop: int) -> NDArray[np.float32]:
    name = layout.EMBEDDING if reader.config.tie_word_embeddings else layout.HEAD
    return reader.files.read_float32(name, start, stop)


def cluster_error(groups: Sequence[NDArray[np.float64]]) -> float | None:
    """Standard error of the mean over all values when values of one group depend on each other (ratio estimator); None of
    one group."""
    if len(groups) < 2:
        return None
    sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    residual = sums - sums.sum() / counts.sum() * counts
    return float(np.sqrt(len(groups) / (len(groups) - 1) * np.sum(residual**2)) / counts.sum())
