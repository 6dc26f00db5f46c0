"""What each rank of a job does of the work on a block: which calibration sequences it sees, which rows it rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ms_pangu_quant.errors import DataError


@dataclass(frozen=True)
class Share:
    """sequences of the calibration data from `begin` to `end`; the first of their tokens is token first_row of them all."""

    begin: int
    end: int
    first_row: int


def share_of(lengths: Sequence[int], rank: int, size: int, least: int = 1) -> Share:
    """Neighbouring sequences, as many for each rank, since they lie in random order. lengths: tokens of every sequence;
    least: sequences that each rank needs, 1 or 0."""
    if len(lengths) < least * size:
        raise DataError(f"calibration data: got {len(lengths)} sequences for {size} ranks, wanted one for each at least")
    own = part_of(len(lengths), rank, size)
    return Share(own.start, own.stop, sum(lengths[: own.start]))


def part_of(count: int, rank: int, size: int) -> slice:
    """Which of so many sequences, or rows of a weight, are a rank's: neighbouring ones, as many for each but for one."""
    begin, end = (count * number // size for number in (rank, rank + 1))
    return slice(begin, end)
