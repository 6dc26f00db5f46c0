"""The ranks of a job as threads of this process, linked by pipes."""

from __future__ import annotations

import threading
from multiprocessing import Pipe

from ms_pangu_quant.job.ranks import Ranks


def linked(size: int) -> list[Ranks]:
    """The ranks of a job, in this process."""
    pairs = [Pipe() for _ in range(1, size)]
    first = Ranks(0, size, [one for one, _ in pairs])
    return [first, *(Ranks(number, size, [other]) for number, (_, other) in enumerate(pairs, 1))]


def at_once(job, work):
    """work(rank) of every rank, each in a thread; an exception is a result."""
    results: list[object] = [None] * len(job)

    def run(rank):
        try:
            results[rank.rank] = work(rank)
        except BaseException as error:
            results[rank.rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in job]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results
