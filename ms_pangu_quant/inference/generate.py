"""Continuous batching: prompts wait for room in the cache, are prefilled, decode together, and make room as they end.

Each request reserves the cache blocks of its whole answer when it is admitted, so a running answer never has to be
evicted. Requests are admitted in order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.inference.sampling import GenerationSettings

if TYPE_CHECKING:
    from ms_pangu_quant.inference.model import Model

MAX_BATCH = 64


@dataclass(frozen=True)
class Request:
    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    generator: np.random.Generator


@dataclass(frozen=True)
class Completion:
    """token_ids without what follows the end; the end-of-sequence token, end_id, is not among them."""

    token_ids: tuple[int, ...]
    finish_reason: str
    stopped_by: str | None = None
    end_id: int | None = None


@dataclass(frozen=True)
class Room:
    """What a model takes at a time.

    num_blocks, block_size  of the cache: so many blocks of so many tokens each.
    prefill_tokens          prompt tokens of a pass.
    split_prompts           False keeps each prompt in one pass, for a backend whose prefill cannot continue from the cache.
    """

    num_blocks: int
    block_size: int
    prefill_tokens: int
    split_prompts: bool = True


@dataclass
class _Sequence:
    """A request under way; `cached` tokens of prompt + answer are in the cache blocks `table`."""

    request: Request
    table: list[int]
    cached: int = 0
    answer: list[int] = field(default_factory=list)


class Scheduler:
    """settings give the next token and the texts that end an answer; max_new_tokens is each request's own.

    stop_ids   tokens that end an answer; they are not part of it.
    barred     [vocab], True for ids that are never taken; None where every one may be.
    max_batch  requests under way at a time; None is MAX_BATCH.
    on_tokens  called after each pass with how many tokens it gave.
    """

    def __init__(
        self,
        model: Model,
        room: Room,
        settings: GenerationSettings,
        stop_ids: frozenset[int],
        *,
        barred: NDArray[np.bool_] | None = None,
        max_batch: int | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._barred = barred
        self._max_batch = max_batch or MAX_BATCH
        self._on_tokens = on_tokens
        self._model, self._room, self._settings = model, room, settings
        self._free = list(range(room.num_blocks))
        self._stop_ids = stop_ids

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        """Requests with their completions, in the order in which they end; none is kept here, for there may be many.

        Raises RequestError if one could never fit in the cache.
        """
        for request in requests:
            if self._needs(request) > len(self._free):
                raise RequestError(
                    f"a prompt of {len(request.prompt)} tokens with max_new_tokens {request.max_new_tokens} "
                    f"needs more than the cache's {len(self._free) * self._room.block_size} tokens; lower "
                    "max_new_tokens or load with a larger kv_cache_tokens"
                )
        waiting: list[Request] = list(reversed(requests))
        running: list[_Sequence] = []
        while waiting or running:
            admitted: list[_Sequence] = []
            while (
                waiting and len(running) + len(admitted) < self._max_batch and self._needs(waiting[-1]) <= len(self._free)
            ):
                request = waiting.pop()
                admitted.append(_Sequence(request, [self._free.pop() for _ in range(self._needs(request))]))
            self._prefill(admitted)
            running = yield from self._without_ended(running + admitted)
            self._decode(running)
            running = yield from self._without_ended(running)

    def _needs(self, request: Request) -> int:
        return -(-(len(request.prompt) + request.max_new_tokens) // self._room.block_size)

    def _prefill(self, sequences: Sequence[_Sequence]) -> None:
        """Fill the cache with the prompts, at most prefill_tokens a pass, and take each first token."""
        left = [sequence for sequence in sequences if sequence.cached < len(sequence.request.prompt)]
        while left:
            chosen: list[_Sequence] = []
            pieces, room = [], self._room.prefill_tokens
            for sequence in left:
                piece = sequence.request.prompt[sequence.cached :]
                if self._room.split_prompts:
                    piece = piece[:room]
                elif chosen and len(piece) > room:
                    break
                chosen.append(sequence)
                pieces.append(piece)
                room -= len(piece)
                if room <= 0:
                    break
            logits = self._model.forward(
                pieces, [sequence.cached for sequence in chosen], [sequence.table for sequence in chosen], phase="prefill"
            )
            before = sum(len(sequence.answer) for sequence in chosen)
            for sequence, piece, row in zip(chosen, pieces, logits, strict=True):
                sequence.cached += len(piece)
                if sequence.cached == len(sequence.request.prompt):
                    self._take(sequence, row)
            self._on_tokens(sum(len(sequence.answer) for sequence in chosen) - before)
            left = [sequence for sequence in left if sequence.cached < len(sequence.request.prompt)]

    def _decode(self, sequences: Sequence[_Sequence]) -> None:
        if not sequences:
            return
        logits = self._model.forward(
            [sequence.answer[-1:] for sequence in sequences],
            [sequence.cached for sequence in sequences],
            [sequence.table for sequence in sequences],
            phase="decode",
        )
        for sequence, row in zip(sequences, logits, strict=True):
            sequence.cached += 1
            self._take(sequence, row)
        self._on_tokens(len(sequences))

    def _take(self, sequence: _Sequence, logits: NDArray[np.float32]) -> None:
        if self._barred is not None:
            logits = np.where(self._barred, np.float32(-np.inf), logits)
        sequence.answer.append(self._settings.next_token(logits, sequence.request.generator))

    def _without_ended(
        self, sequences: Sequence[_Sequence]
    ) -> Generator[tuple[Request, Completion], None, list[_Sequence]]:
        """The sequences that go on; those that are complete are yielded, and their blocks are free again."""
        going_on = []
        for sequence in sequences:
            completion = self._completion(sequence)
            if completion is None:
                going_on.append(sequence)
                continue
            self._free.extend(sequence.table)
            yield sequence.request, completion
        return going_on

    def _completion(self, sequence: _Sequence) -> Completion | None:
        answer = sequence.answer
        if answer[-1] in self._stop_ids:
            return Completion(tuple(answer[:-1]), "eos", end_id=answer[-1])
        found = self._stop_text(answer)
        if found is not None:
            return Completion(tuple(answer), "stop", found)
        if len(answer) >= sequence.request.max_new_tokens:
            return Completion(tuple(answer), "length")
        return None

    def _stop_text(self, answer: Sequence[int]) -> str | None:
        """Of the texts that end an answer, the one that comes first in its tail."""
        stops = self._settings.stop
        if not stops:
            return None
        window = 4 * max(map(len, stops)) + 4  # a character is at most four byte tokens
        tail = self._model.tokenizer.decode(answer[-window:])
        return min((stop for stop in stops if stop in tail), key=tail.find, default=None)
