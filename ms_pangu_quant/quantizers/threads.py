"""Linear algebra whose bits do not depend on the number of threads: OpenBLAS works on one, on several pieces at a time.

With several threads it splits the sums of factorisations, and it computes the columns at the edge of what it splits, which
are others for another number, with other kernels: codes would depend on how many there are. So rows are split here, into
pieces whose size does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController

_MOST = 64  # pieces at a time
LARGE = 8  # of such that have tens of MB of working copies each


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries


def one_thread() -> AbstractContextManager[object]:
    limit: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limit


def pieces(start: int, stop: int, width: int) -> Iterator[slice]:
    """From start to stop, each of this width but for the last."""
    for first in range(start, stop, width):
        yield slice(first, min(first + width, stop))


def in_parallel(work: Callable[[slice], object], parts: Iterable[slice], most: int = _MOST) -> None:
    """work(part) for each part, as many at a time as OpenBLAS has threads, up to `most`."""
    threads = _threads()
    with one_thread(), ThreadPoolExecutor(min(threads, most)) as pool:
        for _ in pool.map(work, parts):
            pass


def by_element(work: Callable[[slice], object], parts: Sequence[slice]) -> None:
    """The same for work that calls no linear algebra, whatever it costs to begin: a single part is done at once."""
    threads = min(_threads(), _MOST, len(parts)) if len(parts) > 1 else 1
    if threads == 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, parts):
            pass


def _threads() -> int:
    libraries = [library for library in _controller().lib_controllers if library.user_api == "blas"]
    return max((int(library.num_threads) for library in libraries), default=1)
