"""Speed of a served model, float and quantized in turns, beside what the machine can do at most.

Every repetition measures each model once, and then the machine's peaks (on the CPU only), so a disturbance hits all of them
alike and the ratios stay true: a virtual machine's share of its host's memory moves by a factor of two within minutes. The
limit of a phase is the time its multiplications take at the peak or its weights take to be read from memory, whichever is
longer. Prompts are random ids: speed does not depend on which.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.inference.model import BLOCK_SIZE, PREFILL_TOKENS, Model
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.recipe.plan import Plan


@dataclass(frozen=True)
class MachineLimits:
    """All threads together: multiplications and additions a second, and bytes a second from memory."""

    int8: float
    fp32: float
    bandwidth: float

    @staticmethod
    def measure() -> MachineLimits:
        kernels = library()
        if kernels is not None:
            functions = kernels.functions
            return MachineLimits(functions.pangu_peak(1), functions.pangu_peak(0), functions.pangu_bandwidth(256, 5))
        matrix, memory = np.ones((1024, 1024), np.float32), np.ones(1 << 27, np.uint8)
        fp32 = 2 * 1024**3 / min(_seconds(lambda: matrix @ matrix) for _ in range(10))
        return MachineLimits(
            fp32, fp32, memory.nbytes / min(_seconds(lambda: memory.view(np.uint64).sum()) for _ in range(5))
        )

    @staticmethod
    def median(measured: Sequence[MachineLimits]) -> MachineLimits:
        return MachineLimits(*(float(np.median(each)) for each in zip(*map(astuple, measured), strict=True)))


@dataclass(frozen=True)
class Work:
    """What one token costs a model: weights of quantized and float layers and of the head, the bytes that hold them, and
    whether the head is computed in integers."""

    quantized: int
    floating: int
    head: int
    layer_bytes: int
    head_bytes: int
    integer_head: bool = False

    def seconds(self, limits: MachineLimits, tokens: int, logits: int, passes: int) -> float:
        """Least time for `tokens` through the layers and `logits` through the head, in so many passes."""
        compute = 2 * tokens * self.quantized / limits.int8 + 2 * tokens * self.floating / limits.fp32
        compute += 2 * logits * self.head / (limits.int8 if self.integer_head else limits.fp32)
        return max(compute, passes * (self.layer_bytes + self.head_bytes) / limits.bandwidth)


def work_of(model: Model, plan: Plan) -> Work:
    quantized = floating = 0
    config: ModelConfig = model.config
    for _, site, scheme in plan:
        outputs, inputs = layout.site_shape(config, site)
        if scheme is None:
            floating += outputs * inputs
        else:
            quantized += outputs * inputs
    layers = head = 0
    integer_head = False
    for name, parameter in model.network.model.parameters_and_names():
        if name.endswith(("key_cache", "value_cache", ".run.table")):  # no weights
            continue
        if parameter is model.network.model.output_layer.weight:
            head = parameter.nbytes
            integer_head = str(parameter.dtype) == "Int8"
        elif "embedding" not in name:
            layers += parameter.nbytes
    return Work(quantized, floating, config.vocab_size * config.hidden_size, layers, head, integer_head)


@dataclass(frozen=True)
class Subject:
    """name: "float" or "quantized"."""

    name: str
    model: Model
    work: Work


def bench(
    subjects: Sequence[Subject],
    prompt_lens: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    with_limits: bool = True,
    on_measured: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], MachineLimits | None]:
    """Rows for each prompt length, batch size, phase and subject; on_measured is called len(subjects) times for each pair.

    latency_ms      median over repetitions: prefill until all first tokens are known; decode for one step of the batch.
    spread          (third - first quartile) / median of the latency.
    limit_fraction  least possible time / latency; None without limits, which are this CPU's (with_limits): medians of what
                    was measured in turns with the row's repetitions. Those that are returned are medians of the whole run.
    time_to_first_token_ms  prefill rows: until the first sequence's first token is known.
    peak_rss_gib    of the process with all subjects, up to this pair, before any limit was measured.
    """
    generator, vocab = np.random.default_rng(0), subjects[0].model.config.vocab_size
    pairs = [
        (prompt_len, batch, generator.integers(0, vocab, (batch, prompt_len)).tolist())
        for prompt_len in prompt_lens
        for batch in batch_sizes
    ]
    peaks = [_warm_up(subjects, prompts, new_tokens) for _, _, prompts in pairs]
    measured: list[MachineLimits] = []
    rows = []
    for (prompt_len, batch, prompts), peak in zip(pairs, peaks, strict=True):
        times: dict[tuple[str, str], list[float]] = {}
        for repeat in range(1, repeats + 1):
            for subject in subjects:
                prefill, first, steps = _answer(subject.model, prompts, new_tokens)
                times.setdefault((subject.name, "prefill"), []).append(prefill)
                times.setdefault((subject.name, "first"), []).append(first)
                times.setdefault((subject.name, "decode"), []).extend(steps)
                if repeat == repeats:
                    on_measured()
            if with_limits:
                measured.append(MachineLimits.measure())
        limits = MachineLimits.median(measured[-repeats:]) if with_limits else None
        for subject in subjects:
            for phase, tokens in (("prefill", batch * prompt_len), ("decode", batch)):
                passes = len(list(_passes(prompts, subject.model))) if phase == "prefill" else 1
                least = subject.work.seconds(limits, tokens, batch, passes) if limits else None
                row = _row(np.array(times[subject.name, phase]), tokens, least)
                row = {"model": subject.name, "phase": phase, "batch_size": batch, "prompt_len": prompt_len, **row}
                row["peak_rss_gib"] = peak / 2**30
                row["cache_mib"] = cache_bytes(subject.model) / 2**20
                if phase == "prefill":
                    row["time_to_first_token_ms"] = 1e3 * float(np.median(times[subject.name, "first"]))
                rows.append(row)
    return rows, MachineLimits.median(measured) if with_limits else None


def _warm_up(subjects: Sequence[Subject], prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Compiles, and returns the peak of memory in bytes. All pairs are warmed up before the first limit is measured, which
    takes more memory than a small model and would count as theirs from then on."""
    for subject in subjects:
        _answer(subject.model, prompts, new_tokens)
    return _peak_rss()


def _peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cache_bytes(model: Model) -> int:
    """Memory of the keys and values of all the tokens that the model has room for."""
    own = model.network.model.parameters_and_names()
    tensors = [parameter for name, parameter in own if name.endswith(("key_cache", "value_cache"))]
    return sum(tensor.nbytes for tensor in tensors + [each for caches in model.caches or () for each in caches])


def blocks_needed(prompt_len: int, batch: int, new_tokens: int) -> int:
    return batch * -(-(prompt_len + new_tokens) // BLOCK_SIZE)


def _answer(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, list[float]]:
    """Seconds of the prefill, until the first token, and of each decode step, with the passes the scheduler would make."""
    count = blocks_needed(len(prompts[0]), 1, new_tokens)
    tables = [list(range(index * count, (index + 1) * count)) for index in range(len(prompts))]
    started = time.perf_counter()
    first = 0.0
    tokens = [0] * len(prompts)
    for chosen in _passes(prompts, model):
        logits = model.forward(
            [prompts[index][start:end] for index, start, end in chosen],
            [start for _, start, _ in chosen],
            [tables[index] for index, _, _ in chosen],
            phase="prefill",
        )
        for (index, _, end), row in zip(chosen, logits, strict=True):
            if end == len(prompts[index]):
                tokens[index] = int(row.argmax())
                first = first or time.perf_counter() - started
    prefill = time.perf_counter() - started
    steps = []
    for step in range(new_tokens):
        started = time.perf_counter()
        logits = model.forward(
            [[token] for token in tokens], [len(prompts[0]) + step] * len(prompts), tables, phase="decode"
        )
        tokens = logits.argmax(1).tolist()
        steps.append(time.perf_counter() - started)
    return prefill, first, steps


def _passes(prompts: Sequence[Sequence[int]], model: Model) -> Iterator[list[tuple[int, int, int]]]:
    """(sequence, start, end) pieces of each prefill pass, at most PREFILL_TOKENS tokens together; the whole batch at once
    on a device that takes no prompt in pieces."""
    if not model.network.backend.chunked_prefill:
        yield [(index, 0, len(prompt)) for index, prompt in enumerate(prompts)]
        return
    chosen: list[tuple[int, int, int]] = []
    room = PREFILL_TOKENS
    for index, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt):
            end = min(start + room, len(prompt))
            chosen.append((index, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield chosen
                chosen, room = [], PREFILL_TOKENS
    if chosen:
        yield chosen


def _row(seconds: NDArray[np.float64], tokens: int, least: float | None) -> dict[str, Any]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {
        "latency_ms": 1e3 * float(median),
        "tokens_per_s": float(tokens / median),
        "spread": float((high - low) / median),
        "limit_fraction": None if least is None else float(least / median),
    }


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
