"""measure(): the sensitivity of every group of layers of a checkpoint, in one pass over its blocks and one back.

The float model runs on two parts of the calibration data. One gives the statistics that transforms and rounding need. The
other goes through each block once more for each group of layers, with this group alone quantized, and what that changes
behind the block is kept. On the way back every block has the gradients of the float model's own samples (inference/fisher),
by which a change behind it is a KL of the next-token distributions: KL is quadratic in a small error. All layers quantized
together go to the head, and are measured there.

What it costs: for each block some 14 + DRAWS passes of the measured tokens, and its rounding in both schemes. On disk lie
(5 * blocks + 2 * DRAWS) * tokens * hidden * 4 bytes. A killed run goes on at the block where it stopped.

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
from ms_pangu_quant.calibration.gradients import LONGEST, BlockGradients
from ms_pangu_quant.calibration.runner import BlockRunner, Hidden
from ms_pangu_quant.calibration.statistics import NOTHING, Needs
from ms_pangu_quant.calibration.stream import NoStream, relative_error
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, RoundedBlock
from ms_pangu_quant.checkpoint.files import write_json
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.inference.compare import cluster_error, divergences, final_norm, head_rows
from ms_pangu_quant.inference.fisher import sampled_gradients
from ms_pangu_quant.mixed.sensitivity import (
    DEFAULT_TOKENS,
    DRAWS,
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

_ARRAYS = ("statistics-", "quantized-", "float-", "changes-", "gradients-")  # names of _State's files


def measure(
    reader: CheckpointReader,
    recipe: Recipe,
    folder: Path,
    *,
    data: TokenData,
    tokens: int = DEFAULT_TOKENS,
    resume: bool = False,
    on_step: Callable[[int], None] = lambda count: None,
) -> Sensitivity:
    """Sensitivities to the recipe's schemes_to_measure() under its transforms and its rounding.

    folder   for the hidden states of a run under way; removed when it is done.
    data     the last texts, of at least `tokens` tokens together, are measured on; the others give the statistics.
    resume   go on with the run in `folder`.
    on_step  called with how many steps each part of the work has had; total_steps() is their sum.
    Raises   PanguQuantError for what is wrong with data, recipe or folder.
    """
    check_data(reader.config, recipe, data)
    schemes = schemes_to_measure(recipe)
    reader = recipe.rewritten(reader)
    recipes = [recipe.uniform(name) for name in schemes]
    plans = [each.plan(reader.config) for each in recipes]  # what does not fit is said before hours have passed
    known, texts = split(data, tokens, 1 + bool(recipe.quantizer.needs.held_out))
    measured = [text[start : start + LONGEST] for text in texts for start in range(0, len(text), LONGEST)]
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
    state = _State(folder, {**origin, "schemes": list(schemes)}, reader.config.num_hidden_layers, resume)
    lengths = [len(sequence) for sequence in known], [len(sequence) for sequence in measured]
    if not state.finished:
        begun = embedding_rows(reader.files, np.concatenate(measured))
        state.begin(embedding_rows(reader.files, np.concatenate(known)), begun, np.stack([begun] * len(schemes)))
    for part in range(state.finished):
        on_step(steps(part, state.blocks))
    if state.finished < state.blocks:
        held_out = _held_out(recipes, lengths[0])
        with BlockRunner(reader.config, lengths[0], held_out=held_out, also=[lengths[1]]) as runner:
            for index in range(state.finished, state.blocks):
                planned = [(each, plan.blocks[index]) for each, plan in zip(recipes, plans, strict=True)]
                _measure_block(runner, reader.block(index), planned, state, lengths, index)
                on_step(steps(index, state.blocks))
    if state.finished == state.blocks:
        _measure_head(reader, state, recipe.calibration.seed)
        on_step(steps(state.blocks, state.blocks))
    with BlockGradients(reader.config, DRAWS // 2) as pullback:
        for index in range(2 * state.blocks - state.finished, -1, -1):
            _go_back(pullback, reader, state, lengths[1], index)
            on_step(steps(2 * state.blocks - index, state.blocks))
    groups = tuple(
        GroupSensitivity(**{**record, **_mean(record["kl"], lengths[1])})
        for record in state.records  # of a text each
    )
    found = Sensitivity(schemes, groups, dict(zip(schemes, state.together, strict=True)), origin)
    state.remove()
    return found


def _mean(kl: Sequence[float], lengths: Sequence[int]) -> dict[str, float | None]:
    """Of a token, and its standard error; kl: of the texts."""
    tokens = [np.full(length, each / length) for each, length in zip(kl, lengths, strict=True)]
    return {"kl": float(np.concatenate(tokens).mean()), "kl_se": cluster_error(tokens)}


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
) -> None:
    measured, quantized = Hidden(state.read("float", index), lengths[1]), state.read("quantized", index)
    known_states = Hidden(state.read("statistics", index), lengths[0], _held_out([each for each, _ in planned], lengths[0]))
    stats, observed = runner.observe(block, known_states, _needs([each for each, _ in planned]), f"block {index}")
    reference = runner.advance(RoundedBlock(block), measured, state.room("float", index + 1, measured.states.shape)).states
    behind = state.room("quantized", index + 1, quantized.shape)
    changes = state.room("changes", index, (len(layout.FUSED), *measured.states.shape))

    def error(changed: RoundedBlock, output: NDArray[np.float32] | None = None) -> float:
        return relative_error(runner.advance(changed, measured, output).states, reference)

    errors: dict[str, dict[str, float]] = {group: {} for group in layout.FUSED}
    for place, (each, plan) in enumerate(planned):
        changed, known = transform_block(block, stats, each, plan)
        rounded = round_block(changed, known, each, plan, NoStream())
        runner.advance(rounded, Hidden(quantized[place], lengths[1]), behind[place])
        for number, group in enumerate(layout.FUSED):
            own = {site.name: rounded.linears[site.name] for site in layout.fused(group)}
            errors[group][each.scheme] = error(RoundedBlock(changed, own), changes[number] if place == 0 else None)
            if place == 0:
                changes[number] -= reference
        del changed, rounded
    records = [{"block": index, "group": group, "output_error": errors[group]} for group in layout.FUSED]
    assert observed is not None
    state.room("statistics", index + 1, observed.states.shape)[:] = observed.states
    state.finish(records=[*state.records, *records])


def _measure_head(reader: CheckpointReader, state: _State, seed: int) -> None:
    """KL of all layers quantized together, and the gradients that the way back begins with."""
    states, quantized = (state.read(name, state.blocks) for name in ("float", "quantized"))
    normalised = [final_norm(reader, each) for each in (states, *quantized)]

    def head(first: int, last: int) -> list[NDArray[np.float32]]:
        return [head_rows(reader, first, last)] * len(normalised)

    kl, _, _ = divergences(head, reader.config.vocab_size, normalised, np.zeros(len(states), np.int32))  # no target
    sampled_gradients(reader, states, seed, state.room("gradients", state.blocks, (DRAWS, *states.shape)))
    state.finish(together=kl[1:].mean(axis=1).tolist())


def _go_back(pullback: BlockGradients, reader: CheckpointReader, state: _State, lengths: list[int], index: int) -> None:
    """The KL of what the block's groups change behind it, of each text; and to the front of the block."""
    gradients, changes = state.read("gradients", index + 1), state.read("changes", index)
    starts, records = np.cumsum([0, *lengths[:-1]]), list(state.records)
    first = len(layout.FUSED) * index
    for place, change in enumerate(changes, first):
        along = np.einsum("dth,th->dt", gradients, change, dtype=np.float64)
        kl = np.square(np.add.reduceat(along, starts, axis=1)).mean(axis=0) / 2
        records[place] = {**records[place], "kl": kl.tolist()}
    if index:
        hidden = Hidden(state.read("float", index), lengths)
        pullback.pull_back(reader.block(index), hidden, gradients, state.room("gradients", index, gradients.shape))
    state.finish(records=records)


class _State:
    """A run under way: a journal, and arrays of what the parts to come need.

    Its parts are the blocks, the head, and the blocks backwards; `finished` of them are. Arrays are of a place: in front of
    the block of this index, `changes` behind it.

    statistics  [tokens, hidden] the texts that statistics are of, in front of the block whose turn it is.
    quantized   [2, tokens, hidden] the measured texts there, all layers in the cheaper and the dearer scheme.
    float       [tokens, hidden] the measured texts in the float model, in front of every block.
    changes     [groups, tokens, hidden] what each group changes.
    gradients   [DRAWS, tokens, hidden] on the way back.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, object], blocks: int, resume: bool) -> None:
        """Raises OutputError if the folder is there and not to be resumed, or is another run's."""
        self.folder, self._fingerprint, self.blocks = folder, dict(fingerprint), blocks
        self.finished, self.records, self.together = 0, list[dict[str, Any]](), list[float]()
        self._open: list[np.memmap[Any, Any]] = []
        journal = folder / "journal.json"
        if journal.exists():
            if not resume:
                raise OutputError(f"{folder}: holds an unfinished run; go on with --resume, or remove it")
            try:
                found = json.loads(journal.read_text(encoding="utf-8"))
                begun = found["fingerprint"]
                changed = sorted(key for key in self._fingerprint if begun.get(key) != self._fingerprint[key])
                if not changed:
                    self.finished, self.records = int(found["finished"]), list(found["records"])
                    self.together = list(found["together"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise OutputError(f"{journal}: damaged ({error}); remove {folder} and start again") from None
            if changed:
                raise OutputError(f"{folder}: was begun with another {', '.join(changed)}; remove it to start again")
            missing = [path for path in self._wanted() if not path.exists()]
            if missing:
                raise OutputError(f"{missing[0]}: is missing; remove {folder} and start again")
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot write here ({error.strerror}); choose another --output") from None
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_ARRAYS))
        if others:
            raise OutputError(f"{folder}: is not a run's (it holds {others[0]}); choose another --output")

    def begin(self, statistics: NDArray[np.float32], floats: NDArray[np.float32], quantized: NDArray[np.float32]) -> None:
        for name, states in (("statistics", statistics), ("float", floats), ("quantized", quantized)):
            self.room(name, 0, states.shape)[:] = states
        self._save()

    def read(self, name: str, index: int) -> NDArray[np.float32]:
        """Mapped."""
        return np.asarray(np.load(self._path(name, index), mmap_mode="r"))

    def room(self, name: str, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """To be written into before finish()."""
        path = self._path(name, index)
        made = np.lib.format.open_memmap(path, "w+", np.float32, shape)  # type: ignore[no-untyped-call]
        self._open.append(made)
        return np.asarray(made)

    def finish(self, *, records: list[dict[str, Any]] | None = None, together: list[float] | None = None) -> None:
        """One more part: all that was written is on disk when this returns, and what no part needs any more is gone."""
        self.finished += 1
        self.records, self.together = records or self.records, together or self.together
        self._save()
        for path in {*self.folder.glob("*.npy")} - self._wanted():  # a folder with others' is refused
            path.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _wanted(self) -> set[Path]:
        """What the parts to come read."""
        done, there = self.finished, min(self.finished, self.blocks)
        left = there if done <= self.blocks else 2 * self.blocks - done + 1  # blocks that the way back still has
        names = [("changes", index) for index in range(left)]
        names += [("float", index) for index in range(left if done > self.blocks else there + 1)]
        if done <= self.blocks:
            names += [("quantized", there), *([("statistics", there)] if done < self.blocks else [])]
        elif left:
            names.append(("gradients", left))
        return {self._path(*each) for each in names}

    def _path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}-{index:05d}.npy"

    def _save(self) -> None:
        for each in self._open:
            each.flush()
        self._open.clear()
        found = {"finished": self.finished, "records": self.records, "together": self.together}
        write_json(self.folder / "journal.json", {"fingerprint": self._fingerprint, **found})
