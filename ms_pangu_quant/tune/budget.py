"""The time that a search may take: before a step, what it will take is set against what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ms_pangu_quant.tune.search import OutOfBudget


class Clock:
    """seconds: None for no limit. A step takes what those of its kind took for as much work, the slowest of them; the first
    of its kind what `estimated` says."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._now, self._began = seconds, now, now()
        self._slowest: dict[str, float] = {}  # seconds for each unit of work

    @property
    def passed(self) -> float:
        return self._now() - self._began

    @contextmanager
    def step(self, kind: str, work: float, estimated: float = 0.0) -> Iterator[None]:
        """Raises OutOfBudget before anything is done."""
        expected = self._slowest[kind] * work if kind in self._slowest else estimated
        if self._limit is not None and self.passed + expected > self._limit:
            raise OutOfBudget(
                f"the budget of {self._limit:.0f} s ended before {kind}, which takes about {expected:.0f} s; "
                f"{max(0.0, self._limit - self.passed):.0f} s were left"
            )
        began = self._now()
        yield
        self._slowest[kind] = max(self._slowest.get(kind, 0.0), (self._now() - began) / work)

    def release(self) -> None:
        """What follows is not limited."""
        self._limit = None
