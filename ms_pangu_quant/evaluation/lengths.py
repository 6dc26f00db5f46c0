"""How long answers are, and whether they end in repetition."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_pangu_quant.evaluation.extract import split_text

COPIES = 4  # of a period at the end make a sample repetitive ...
SHORTEST_TAIL = 20  # ... if together they are so many tokens or words


@dataclass(frozen=True)
class Tail:
    """The repeated end of a sequence: `copies` (a fraction too) of its last `period` items. copies is 0 for none."""

    period: int
    copies: float

    @property
    def repetitive(self) -> bool:
        return self.period * self.copies >= SHORTEST_TAIL


def periodic_tail(items: Sequence[Hashable]) -> Tail:
    """The longest end of the sequence that holds its shortest period at least COPIES times; linear time.

    The reversed sequence's prefix function (Knuth, Morris and Pratt 1977) gives the shortest period of every suffix:
    a suffix of n items whose longest border is b has the period n - b.
    """
    reverse = list(reversed(items))
    borders = [0] * len(reverse)
    found = Tail(0, 0.0)
    for index in range(1, len(reverse)):
        border = borders[index - 1]
        while border and reverse[index] != reverse[border]:
            border = borders[border - 1]
        borders[index] = border + (reverse[index] == reverse[border])
        length, period = index + 1, index + 1 - borders[index]
        if length >= COPIES * period:
            found = Tail(period, length / period)
    return found


def lengths_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths and repetition of a sample; token counts are None where the file has none, and words are counted then."""
    split = split_text(record["completion"])
    answer = record["answer"] if isinstance(record.get("answer"), str) else split.answer
    repetitive = record.get("repetitive")
    if repetitive is None:
        repetitive = periodic_tail(record["completion"].split()).repetitive
    return {
        **{name: record.get(name) for name in ("tokens", "thought_tokens", "answer_tokens", "finish_reason")},
        "words": _words(split.thought) + _words(answer),
        "thought_words": None if split.thought is None else _words(split.thought),
        "answer_words": _words(answer),
        "repetitive": bool(repetitive),
    }


def _words(text: str | None) -> int:
    return len((text or "").split())


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """mean, median and 95th percentile of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean, median, p95 = float(np.mean(known)), float(np.median(known)), float(np.percentile(known, 95))
    return {"mean": mean, "median": median, "p95": p95, "count": len(known)}
