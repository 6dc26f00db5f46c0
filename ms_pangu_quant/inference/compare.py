"""How far a quantized checkpoint's next-token distributions are from the float one's: KL, agreement, perplexity.

Both models are streamed block by block and the vocabulary slice by slice, so two 7B models compare in the memory of one
block. Quantized blocks run as they are served where the backend has integer kernels, else with their codes and scales as
float32 values (see calibration.stream), which gives the served network's results up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import check_same_model
from ms_pangu_quant.checkpoint.reader import embedding_rows
from ms_pangu_quant.errors import EndpointError
from ms_pangu_quant.formats.reader import Reader, open_checkpoint
from ms_pangu_quant.inference.endpoint import PromptLogprobs, Server
from ms_pangu_quant.network import runtime

_SLICE_BYTES = 64 << 20
_LEAST_REST = 1e-6  # of a probability 1 less twenty float32 ones


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


@dataclass(frozen=True)
class ServedComparison:
    """Over every token that has a next one, of what a server gives: its most likely tokens and the text's own, on average
    `given` of them, which have `covered` of its probability.

    kl_mean, kl_p99, kl_se  as in Comparison, of distributions in which all other tokens are one event. That is at most the
                            KL of the whole ones (the log-sum inequality), and no more can be said from these.
    top1_agreement, ppl_*   as in Comparison.
    """

    texts: int
    tokens: int
    given: float
    covered: float
    kl_mean: float
    kl_se: float | None
    kl_p99: float
    top1_agreement: float
    ppl_reference: float
    ppl_served: float


def compare(
    reference: Path, quantized: Path, sequences: Sequence[NDArray[np.int32]], on_block: Callable[[], None] = lambda: None
) -> Comparison:
    """Compare two directories (float or quantized) on token sequences, each [length >= 2].

    on_block  called after each of the blocks_to_run() blocks.
    Raises    CheckpointError if the two are not the same model's.
    """
    readers = open_checkpoint(reference), open_checkpoint(quantized)
    check_same_model(quantized, readers[1].config, reference, readers[0].config)
    states = [final_states(reader, sequences, on_block) for reader in readers]
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


def compare_served(
    reference: Path,
    server: Server,
    sequences: Sequence[NDArray[np.int32]],
    top: int,
    on_text: Callable[[], None] = lambda: None,
    on_block: Callable[[], None] = lambda: None,
) -> ServedComparison:
    """Compare a server's next-token distributions with those of a directory, float or quantized, on token sequences.

    top       tokens of each distribution that the server is asked for.
    on_text   called for each sequence that the server has answered; on_block after each block of the reference.
    Raises    EndpointError where the server gives no such distributions, or those of another vocabulary.
    """
    reader = open_checkpoint(reference)
    said = PromptLogprobs(server, top).ask([[int(token) for token in sequence] for sequence in sequences], on_text)
    ids, log_q = _table([each for text in said for each in text])
    if ids.max() >= reader.config.vocab_size:
        raise EndpointError(
            f"{server.url}: has a token {ids.max()}, and {reference} only {reader.config.vocab_size}: not the same model's"
        )
    targets = np.concatenate([sequence[1:] for sequence in sequences])
    log_p, best = log_likelihoods(
        lambda start, stop: head_rows(reader, start, stop),
        reader.config.vocab_size,
        final_states(reader, sequences, on_block),
        np.concatenate([ids, targets[:, None]], axis=1),
    )
    kl = lumped_kl(log_p[:, :-1], log_q)
    ends = np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1]
    of_text = log_q[np.arange(len(targets)), (ids == targets[:, None]).argmax(axis=1)]
    return ServedComparison(
        texts=len(sequences),
        tokens=len(targets),
        given=float((ids >= 0).sum(axis=1).mean()),
        covered=float(np.exp(log_q).sum(axis=1).mean()),
        kl_mean=float(kl.mean()),
        kl_se=cluster_error(np.split(kl, ends)),
        kl_p99=float(np.percentile(kl, 99)),
        top1_agreement=float((ids[:, 0] == best).mean()),
        ppl_reference=_perplexity(-log_p[:, -1]),
        ppl_served=_perplexity(-of_text),
    )


def _table(said: Sequence[dict[int, float]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids and log-probabilities [tokens, most], -1 and -inf where there are fewer; the likeliest first, of equal ones
    the least id, as an argmax takes it."""
    most = max(map(len, said))
    ids, log_q = np.full((len(said), most), -1, np.int64), np.full((len(said), most), -np.inf)
    for row, each in enumerate(said):
        sorted_ids = sorted(each, key=lambda token: (-each[token], token))
        ids[row, : len(each)], log_q[row, : len(each)] = sorted_ids, [each[token] for token in sorted_ids]
    return ids, log_q


def lumped_kl(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) [tokens] of distributions of which some events are known [tokens, events] and the others taken as one.

    log_q is -inf where no event stands. What q leaves for the others is at least _LEAST_REST, which only lowers the result.
    """
    known = np.isfinite(log_q)
    p, q = np.where(known, np.exp(log_p), 0.0), np.exp(log_q)
    terms = p * np.where(known, log_p - np.where(known, log_q, 0.0), 0.0)
    rest_p, rest_q = np.maximum(1 - p.sum(axis=1), 0.0), np.maximum(1 - q.sum(axis=1), _LEAST_REST)
    rest = rest_p * np.log(np.where(rest_p > 0, rest_p, 1.0) / rest_q)
    lumped: NDArray[np.float64] = np.maximum(terms.sum(axis=1) + np.where(rest_p > 0, rest, 0.0), 0.0)
    return lumped


def _perplexity(nll: NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(nll.mean()))


def final_states(
    reader: Reader, sequences: Sequence[NDArray[np.int32]], on_block: Callable[[], None]
) -> NDArray[np.float32]:
    """Normalised hidden states [tokens, hidden] of every token that has a next one."""
    runtime.ensure_started()
    from ms_pangu_quant.calibration.runner import BlockRunner, Hidden

    inputs = [sequence[:-1] for sequence in sequences]
    hidden = Hidden(embedding_rows(reader.files, np.concatenate(inputs)), [len(sequence) for sequence in inputs])
    with BlockRunner(reader.config, hidden.lengths) as runner:
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
    for start, stop in vocabulary_slices(vocab, len(targets)):
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


@np.errstate(over="ignore", invalid="ignore")
def log_likelihoods(
    head: Callable[[int, int], NDArray[np.float32]], vocab: int, states: NDArray[np.float32], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-probabilities [tokens, n] of the tokens `wanted` [tokens, n], 0 for an id of -1; the most likely token [tokens].

    head and states as in divergences(), of one model.
    """
    count = len(wanted)
    top, total, best = np.full(count, -np.inf), np.zeros(count), np.zeros(count, np.int64)
    logits = np.zeros(wanted.shape)
    for start, stop in vocabulary_slices(vocab, count):
        values = (states @ head(start, stop).T).astype(np.float64)
        rows, columns = np.nonzero((wanted >= start) & (wanted < stop))
        logits[rows, columns] = values[rows, wanted[rows, columns] - start]
        peak = values.max(axis=1)
        best = np.where(peak > top, values.argmax(axis=1) + start, best)
        raised = np.maximum(top, peak)
        total = total * np.exp(top - raised) + np.exp(values - raised[:, None]).sum(axis=1)
        top = raised
    return np.where(wanted >= 0, logits - (top + np.log(total))[:, None], 0.0), best


def vocabulary_slices(vocab: int, tokens: int) -> Iterator[tuple[int, int]]:
    """(start, stop), so long that logits of so many tokens are within _SLICE_BYTES."""
    step = max(1, _SLICE_BYTES // (4 * max(tokens, 1)))
    for start in range(0, vocab, step):
        yield start, min(start + step, vocab)


def head_rows(reader: Reader, start: int, stop: int) -> NDArray[np.float32]:
    name = layout.EMBEDDING if reader.config.tie_word_embeddings else layout.HEAD
    return reader.files.read_float32(name, start, stop)


def cluster_error(groups: Sequence[NDArray[np.float64]]) -> float | None:
    """Standard error of the mean over all values when values of one group depend on each other (ratio estimator); None of
    one group."""
    if len(groups) < 2:
        return None
    return ratio_error([float(group.sum()) for group in groups], [len(group) for group in groups])


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """The same of two groups or more, of which only sums and numbers of values are known."""
    totals, numbers = np.asarray(sums, np.float64), np.asarray(counts)
    residual = totals - totals.sum() / numbers.sum() * numbers
    return float(np.sqrt(len(totals) / (len(totals) - 1) * np.sum(residual**2)) / numbers.sum())
