"""measure(): the sensitivity of every group of layers of a checkpoint, in one pass over its blocks.

The float model runs on two parts of the calibration data. One gives the statistics that transforms and rounding need. On
the other a copy of the hidden states is taken for each group of layers, goes through the group's block with this group
alone quantized, and then beside the float model's own through the rest of the float model to the head, where its KL is
that group's. All copies go through a block when it is loaded, so each is read once.

What it costs: blocks^2 * 2 passes of the measured tokens through a block, and a head for every group. The copies lie on
disk: (4 * blocks + 3) * tokens * hidden * 4 bytes, twice. A killed run goes on at the block where it stopped.

What it does not do: correct for drift (`correct: true` of gptq has nothing to correct where all else is float, so what it
gains is not in the figures).
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.calibration.runner import BlockRunner, Hidden
from ms_pangu_quant.calibration.statistics import NOTHING, Needs
from ms_pangu_quant.calibration.stream import NoStream, relative_error
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, RoundedBlock
from ms_pangu_quant.checkpoint.files import write_json
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.inference.compare import cluster_error, divergences, final_norm, head_rows
from ms_pangu_quant.mixed.sensitivity import (
    DEFAULT_TOKENS,
    FIRST_STREAMS,
    GroupSensitivity,
    Sensitivity,
    method_digest,
    schemes_to_measure,
    split,
    steps,
)
from ms_pangu_quant.pipeline.block import round_block, transform_block
from ms_pangu_quant.pipeline.prepare import check_data, checkpoint_hash
from ms_pangu_quant.recipe.parse import text_of
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.recipe import Recipe

_AT_A_TIME = 16  # streams that go through a block between two calls of on_step


def measure(
    reader: CheckpointReader,
    recipe: Recipe,
    folder: Path,
    *,
    data: TokenData,
    tokens: int = DEFAULT_TOKENS,
    resume: bool = False,
    on_step: Callable[[int], None] = lambda streams: None,
) -> Sensitivity:
    """Sensitivities to the recipe's schemes_to_measure() under its transforms and its rounding.

    folder   for the hidden states of a run under way; removed when it is done.
    data     the last texts, of at least `tokens` tokens together, are measured on; the others give the statistics.
    resume   go on with the run in `folder`.
    on_step  called with how many streams have passed a block, or the head; total_steps() is their sum.
    Raises   PanguQuantError for what is wrong with data, recipe or folder.
    """
    check_data(reader.config, recipe, data)
    schemes = schemes_to_measure(recipe)
    reader = recipe.rewritten(reader)
    recipes = [recipe.uniform(name) for name in schemes]
    plans = [each.plan(reader.config) for each in recipes]  # what does not fit is said before hours have passed
    known, measured = split(data, tokens, 1 + bool(recipe.quantizer.needs.held_out))
    origin = {
        "checkpoint": checkpoint_hash(reader),
        "method": method_digest(recipe),
        "data": data.sha256,
        "seed": recipe.calibration.seed,
        "statistics": {"texts": len(known), "tokens": sum(map(len, known))},
        "measured": {"texts": len(measured), "tokens": sum(map(len, measured))},
        "recipe": text_of(recipe),
        **({"transforms": recipe.decision} if recipe.decision else {}),
        "version": version("ms_pangu_quant"),
    }
    state = _State(folder, {**origin, "schemes": list(schemes)}, resume)
    lengths = [len(sequence) for sequence in known], [len(sequence) for sequence in measured]
    held_out = _held_out(recipes, lengths[0])
    runner = BlockRunner(reader.config, lengths[0], held_out=held_out, also=[list(lengths[1]) * _AT_A_TIME])
    if not state.finished:
        begun = embedding_rows(reader.files, np.concatenate(measured))
        state.begin(embedding_rows(reader.files, np.concatenate(known)), np.stack([begun] * FIRST_STREAMS))
    for index in range(state.finished):
        on_step(steps(index))
    for index in range(state.finished, reader.config.num_hidden_layers):
        planned = [(each, plan.blocks[index]) for each, plan in zip(recipes, plans, strict=True)]
        _measure_block(runner, reader.block(index), planned, state, lengths, index, on_step)
    kl = _final_kl(reader, state, on_step)
    ends = np.cumsum(lengths[1])[:-1]
    groups = [
        GroupSensitivity(**record, kl=float(values.mean()), kl_se=cluster_error(np.split(values, ends)))
        for record, values in zip(state.records, kl[FIRST_STREAMS:], strict=True)
    ]
    together = dict(zip(schemes, (float(values.mean()) for values in kl[1:FIRST_STREAMS]), strict=True))
    found = Sensitivity(schemes, tuple(groups), together, origin)
    state.remove()
    return found


def _needs(recipes: Sequence[Recipe]) -> Needs:
    return reduce(operator.or_, (each.observed | (each.seen or NOTHING) for each in recipes))


def _held_out(recipes: Sequence[Recipe], texts: Sequence[int]) -> int:
    """How many of the texts for statistics are held out of them, where roundings try something on such."""
    return -(-len(texts) // 9) if _needs(recipes).held_out and len(texts) > 1 else 0


def _measure_block(
    runner: BlockRunner,
    block: Block,
    planned: Sequence[tuple[Recipe, BlockPlan]],
    state: _State,
    lengths: tuple[list[int], list[int]],
    index: int,
    on_step: Callable[[int], None],
) -> None:
    before, after = state.open(index)
    known_states = Hidden(state.statistics(index), lengths[0], _held_out([each for each, _ in planned], lengths[0]))
    stats, observed = runner.observe(block, known_states, _needs([each for each, _ in planned]), f"block {index}")
    runner.advance(RoundedBlock(block), Hidden(before[0], lengths[1]), after[0])

    def error(changed: RoundedBlock, output: NDArray[np.float32] | None = None) -> float:
        return relative_error(runner.advance(changed, Hidden(before[0], lengths[1]), output).states, after[0])

    errors: dict[str, dict[str, float]] = {group: {} for group in layout.FUSED}
    alone: dict[str, dict[str, float]] = {group: {} for group in layout.FUSED}
    for place, (each, plan) in enumerate(planned):
        changed, known = transform_block(block, stats, each, plan)
        rounded = round_block(changed, known, each, plan, NoStream())
        runner.advance(rounded, Hidden(before[1 + place], lengths[1]), after[1 + place])
        for number, group in enumerate(layout.FUSED):
            own = {site.name: rounded.linears[site.name] for site in layout.fused(group)}
            stream = after[FIRST_STREAMS + len(layout.FUSED) * index + number] if place == 0 else None
            errors[group][each.scheme] = error(RoundedBlock(changed, own), stream)
            if place == 0:
                whole = errors[group][each.scheme] if len(own) == 1 else None
                alone[group] = {name: whole or error(RoundedBlock(changed, {name: own[name]})) for name in own}
        del changed, rounded
    on_step(FIRST_STREAMS + len(layout.FUSED))
    for start in range(FIRST_STREAMS, len(before), _AT_A_TIME):
        carried = before[start : start + _AT_A_TIME]
        flat = (len(carried) * before.shape[1], before.shape[2])
        out = after[start : start + len(carried)].reshape(flat)
        runner.advance(RoundedBlock(block), Hidden(carried.reshape(flat), lengths[1] * len(carried)), out)
        on_step(len(carried))
    records = [
        {"block": index, "group": group, "output_error": errors[group], "site_error": alone[group]}
        for group in layout.FUSED
    ]
    assert observed is not None
    state.finish(index, observed.states, after, records)


def _final_kl(reader: CheckpointReader, state: _State, on_step: Callable[[int], None]) -> NDArray[np.float64]:
    """KL [streams, tokens] to the float model, over tokens as the texts have them; the next token plays no part."""
    streams = state.streams(reader.config.num_hidden_layers)
    rows: list[NDArray[np.float64]] = []
    reference, targets = final_norm(reader, streams[0]), np.zeros(streams.shape[1], np.int32)
    for start in range(0, len(streams), _AT_A_TIME):
        others = [final_norm(reader, stream) for stream in streams[start : start + _AT_A_TIME]]

        def head(first: int, last: int, count: int = len(others)) -> list[NDArray[np.float32]]:
            return [head_rows(reader, first, last)] * (1 + count)

        rows.extend(divergences(head, reader.config.vocab_size, [reference, *others], targets)[0][1:])
        on_step(len(others))
    return np.stack(rows)


class _State:
    """The hidden states of a run under way: a journal, and two arrays behind the last finished block."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, object], resume: bool) -> None:
        """Raises OutputError if the folder is there and not to be resumed, or is another run's."""
        self.folder, self._fingerprint = folder, dict(fingerprint)
        self.finished, self.records = 0, list[dict[str, Any]]()
        journal = folder / "journal.json"
        if journal.exists():
            if not resume:
                raise OutputError(f"{folder}: holds an unfinished run; go on with --resume, or remove it")
            try:
                found = json.loads(journal.read_text(encoding="utf-8"))
                self.finished, self.records = int(found["finished"]), list(found["records"])
                begun = found["fingerprint"]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{journal}: damaged ({error}); remove {folder} and start again") from None
            missing = [
                path for path in (self._statistics(self.finished), self._streams(self.finished)) if not path.exists()
            ]
            if missing:
                raise OutputError(f"{missing[0]}: is missing; remove {folder} and start again")
            changed = sorted(key for key in self._fingerprint if begun.get(key) != self._fingerprint[key])
            if changed:
                raise OutputError(f"{folder}: was begun with another {', '.join(changed)}; remove it to start again")
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot write here ({error.strerror}); choose another --output") from None
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(("streams-", "statistics-")))
        if others:
            raise OutputError(f"{folder}: is not a run's (it holds {others[0]}); choose another --output")

    def begin(self, statistics: NDArray[np.float32], streams: NDArray[np.float32]) -> None:
        np.save(self._statistics(0), statistics)
        np.save(self._streams(0), streams)
        self._journal()

    def statistics(self, index: int) -> NDArray[np.float32]:
        return np.asarray(np.load(self._statistics(index)))

    def streams(self, index: int) -> NDArray[np.float32]:
        """[streams, tokens, hidden] in front of block `index`, mapped."""
        return np.asarray(np.load(self._streams(index), mmap_mode="r"))

    def open(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(streams in front of the block, room for those behind it: the same and one for each group)."""
        before = self.streams(index)
        shape = (len(before) + len(layout.FUSED), *before.shape[1:])
        after = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            self._streams(index + 1), mode="w+", dtype=np.float32, shape=shape
        )
        return before, after

    def finish(
        self, index: int, statistics: NDArray[np.float32], streams: NDArray[np.float32], records: list[dict[str, Any]]
    ) -> None:
        """Everything behind the block is on disk when this returns, and what was in front of it is gone."""
        np.save(self._statistics(index + 1), statistics)
        if isinstance(streams, np.memmap):
            streams.flush()
        self.finished, self.records = index + 1, [*self.records, *records]
        self._journal()
        self._statistics(index).unlink(missing_ok=True)
        self._streams(index).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _statistics(self, index: int) -> Path:
        return self.folder / f"statistics-{index:05d}.npy"

    def _streams(self, index: int) -> Path:
        return self.folder / f"streams-{index:05d}.npy"

    def _journal(self) -> None:
        found = {"fingerprint": self._fingerprint, "finished": self.finished, "records": self.records}
        write_json(self.folder / "journal.json", found)
