#!/usr/bin/env python3
"""How much slower is one checkpoint served than another of the same model? In turns, in one process.

CPU time is what to look at where other work shares the machine, and with OMP_NUM_THREADS=1, since threads that wait for
one another spin. The first checkpoint is loaded twice: where its memory lies decides as much as a per cent or two, and the
ratio of its two networks shows it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.job.arguments import Parser


def measure(calls: Sequence[Callable[[], Any]], repeats: int) -> NDArray[np.float64]:
    """Seconds [wall and CPU, calls, repeats], after two calls that warm up; their order changes every time."""
    generator, seconds = np.random.default_rng(0), np.empty((2, len(calls), repeats))
    for call in [*calls, *calls]:
        call()
    for repeat in range(repeats):
        for index in generator.permutation(len(calls)):
            started = time.perf_counter(), time.process_time()
            calls[index]()
            seconds[:, index, repeat] = time.perf_counter() - started[0], time.process_time() - started[1]
    return seconds


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> str:
    """Median of the pairs' ratios and its 95 % interval, from 2000 resamples."""
    pairs = above / below
    drawn = np.random.default_rng(0).integers(0, len(pairs), (2000, len(pairs)))
    low, high = np.percentile(np.median(pairs[drawn], axis=1), [2.5, 97.5])
    return f"{np.median(pairs):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = Parser(description=__doc__, example="python tools/dev/turns.py offline online --prefills 20")
    parser.add_argument("first", type=Path, help="checkpoint that the other is compared with")
    parser.add_argument("second", type=Path, help="checkpoint of the same shape")
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--prefills", type=int, default=12, help="of each network (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="decode steps of each network (default: %(default)s)")
    given = parser.parse_args()
    from ms_pangu_quant.inference.bench import blocks_needed
    from ms_pangu_quant.inference.model import BLOCK_SIZE, load

    table = list(range(blocks_needed(given.prompt, 1, 1)))
    models = [load(path, kv_cache_tokens=BLOCK_SIZE * len(table)) for path in (given.first, given.first, given.second)]
    prompt = np.random.default_rng(0).integers(0, models[0].config.vocab_size, given.prompt).tolist()
    for phase, tokens, context, repeats in (
        ("prefill", prompt, 0, given.prefills),
        ("decode", prompt[:1], len(prompt), given.steps),
    ):
        calls = [partial(model.forward, [tokens], [context], [table], phase=phase) for model in models]
        for clock, (first, again, second) in zip(("wall", "CPU"), measure(calls, repeats), strict=True):
            print(
                f"{phase}, {clock}: {1e3 * np.median(first):.2f} ms; second / first {ratio(second, first)}, "
                f"first / itself {ratio(again, first)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
