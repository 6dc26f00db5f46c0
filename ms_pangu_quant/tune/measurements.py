"""The search's questions answered by work: blocks tried, checkpoints quantized, KL and pass@1 measured.

Of the candidates' directories one is kept at a time beside the one under way, the best so far.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import HASHES_FILE, begun_with, hash_file
from ms_pangu_quant.evaluation.job import EvaluationRequest, Judging, evaluate
from ms_pangu_quant.evaluation.summary import scores as shares
from ms_pangu_quant.evaluation.tasks import load_tasks
from ms_pangu_quant.formats.reader import open_checkpoint
from ms_pangu_quant.inference.compare import divergences, final_states, head_rows
from ms_pangu_quant.mixed.sensitivity import Sensitivity
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline import trial
from ms_pangu_quant.pipeline.estimate import estimate, measuring_cost
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.report import Progress, unheard
from ms_pangu_quant.recipe.recipe import Recipe
from ms_pangu_quant.report.results import load_runs
from ms_pangu_quant.tune.budget import Clock
from ms_pangu_quant.tune.candidates import DEARER, Served, mixture, option_of, plain
from ms_pangu_quant.tune.history import History
from ms_pangu_quant.tune.retention import Scores
from ms_pangu_quant.tune.search import Option
from ms_pangu_quant.tune.target import Divergence

SENSITIVITY_TOKENS = 2048
QUANTIZED = "quantized"
_CANDIDATES, _ANSWERS = "candidates", "evaluation"
Texts = Sequence[NDArray[np.int32]]


@dataclass(frozen=True)
class TuneProgress:
    """What is called while a search is under way.

    on_open  with the reader of the checkpoint, once all data is read.
    on_note  with a line that is not a step: what is not tried, and why.
    on_step  with what is begun.
    on_part  with how many of how many parts of it are done.
    on_done  with what it came to, and seconds. Steps of an earlier run are not told again.
    """

    on_open: Callable[[CheckpointReader], None] = unheard
    on_note: Callable[[str], None] = unheard
    on_step: Callable[[str], None] = unheard
    on_part: Callable[[int, int], None] = unheard
    on_done: Callable[[str, float], None] = unheard


SILENT = TuneProgress()


@dataclass(frozen=True)
class Questions:
    """What pass@1 is measured on."""

    request: EvaluationRequest  # its checkpoint and output are replaced
    judging: Judging

    @cached_property
    def count(self) -> int:
        return sum(len(each.by_id) for each in load_tasks(self.request.tasks, self.request.data).values())


@dataclass(frozen=True)
class Opened:
    """What a search is about. few, more: texts for choosing, and final, which none is chosen on; each [length >= 2]."""

    reader: CheckpointReader
    recipes: Mapping[str, Recipe]
    data: TokenData
    few: Texts
    more: Texts
    final: Texts
    served: Served
    wanted: str
    questions: Questions | None


class Measurements:
    """A search.Measurer. recipes: candidate -> the plain recipe that makes it."""

    def __init__(self, about: Opened, folder: Path, history: History, clock: Clock, progress: TuneProgress) -> None:
        self._about, self._folder, self._history = about, folder, history
        self._clock, self._progress = clock, progress
        self.recipes: dict[str, Recipe] = {}
        self._decided: dict[str, Recipe] = {}
        self._float_states: dict[str, NDArray[np.float32]] = {}
        self._best: Option | None = None

    # --- candidates --------------------------------------------------------------------------------------------------

    def uniform(self) -> list[Option]:
        """int4 schemes after the first are tried with the transforms that this one took."""
        found, taken = [], ""
        for name, recipe in self._about.recipes.items():
            choices = [each for each in recipe.choices if name == DEARER or not taken or each.name == taken]
            said = self._blocks(name, replace(recipe, choices=tuple(choices)))
            taken = taken if name == DEARER else trial.chosen_in(said["transforms"])
            decided = recipe.decided(trial.chosen_in(said["transforms"]), said["transforms"])
            self._decided[name], self.recipes[name] = decided, plain(decided, name, self._about.wanted)
            error = min(said["errors"].values())
            found.append(option_of(name, self.recipes[name], self._about.reader, self._about.served, error))
        return found

    def _blocks(self, name: str, recipe: Recipe) -> Mapping[str, Any]:
        def answer() -> dict[str, Any]:
            about, kind = self._about, f"trying {_width(recipe)} blocks"
            decided = recipe.decided(recipe.choices[-1].name, "")
            whole, rest = (estimate(about.reader, each, about.data).seconds for each in (recipe, decided))
            with self._step(f"{name}: some blocks", kind, len(recipe.choices), max(0.0, whole - rest)) as done:
                means = trial.tried(about.reader, recipe, about.data, self._progress.on_part)
                said = trial.told(means, about.reader.config.num_hidden_layers)
                done(said)
            return {"transforms": said, "errors": means}

        return self._history.ask("blocks", answer, candidate=name)

    def curve(self, base: Option) -> MeasuredCurve:
        recipe, path = self._decided[base.name], self._folder / f"sensitivity-{base.name}.json"
        found = Sensitivity.load(path) if path.exists() else self._sensitivity(recipe, path)
        curve = MeasuredCurve(self, base.name, found)
        together = dict(found.together)
        facts = {"sha256": found.sha256, "together": together, "predicted": list(curve.ends)}
        self._history.ask("sensitivity", lambda: facts, candidate=base.name)
        return curve

    def _sensitivity(self, recipe: Recipe, path: Path) -> Sensitivity:
        runtime.ensure_started()
        from ms_pangu_quant.mixed.measure import measure
        from ms_pangu_quant.mixed.sensitivity import total_steps

        about = self._about
        expected = measuring_cost(about.reader.config, recipe, about.data, SENSITIVITY_TOKENS).seconds
        with self._step(f"{recipe.scheme}: sensitivity of every layer", "sensitivities", 1, expected) as done:
            passed, total = 0, total_steps(about.reader.config.num_hidden_layers)

            def count(streams: int) -> None:
                nonlocal passed
                passed += streams
                self._progress.on_part(passed, total)

            partial = path.with_name(f"{path.name}.partial")
            found = measure(
                about.reader, recipe, partial, data=about.data, tokens=SENSITIVITY_TOKENS, resume=True, on_step=count
            )
            found.save(path)
            done(f"KL {found.together[recipe.scheme]:.3g} with all layers in {recipe.scheme}, before correction")
        return found

    def mixed(self, base: str, found: Sensitivity, **limit: float) -> Option | None:
        made = mixture(self._decided[base], self._about.reader.config, found, **limit)
        if made is None:
            return None
        raised, predicted = made
        unnamed = plain(self._decided[base], "mixed", self._about.wanted, raised)
        option = option_of("mixed", unnamed, self._about.reader, self._about.served, predicted=predicted)
        name = f"{base}+{DEARER} {option.bits:.4f}"
        self.recipes[name] = plain(self._decided[base], name, self._about.wanted, raised)
        return replace(option, name=name)

    # --- KL ----------------------------------------------------------------------------------------------------------

    def divergence(self, option: Option, *, few: bool) -> Divergence:
        found = self._measured(option, "few", self._about.few)
        return found if few else found + self._measured(option, "more", self._about.more)

    def final(self, option: Option) -> Divergence:
        return self._measured(option, "final", self._about.final)

    def _measured(self, option: Option, part: str, texts: Texts) -> Divergence:
        def answer() -> dict[str, Any]:
            directory = self.directory(option)
            tokens = sum(map(len, texts))
            with self._step(f"{option.name}: KL on {len(texts)} {part} texts", "measuring KL", tokens) as done:
                sums = [float(each.sum()) for each in self._divergences(directory, part, texts)]
                counts = [len(text) - 1 for text in texts]
                found = Divergence(tuple(sums), tuple(counts))
                done(f"{found.mean:.3g} +- {found.error:.2g}")
            return {"sums": sums, "tokens": counts}

        record = self._history.ask("kl", answer, candidate=option.name, texts=part)
        return Divergence(tuple(record["sums"]), tuple(record["tokens"]))

    def _divergences(self, directory: Path, part: str, texts: Texts) -> list[NDArray[np.float64]]:
        """KL of each token, of each text."""
        readers = open_checkpoint(self._about.reader.directory), open_checkpoint(directory)
        blocks, passed = self._about.reader.config.num_hidden_layers * (1 + (part not in self._float_states)), 0

        def count() -> None:
            nonlocal passed
            passed += 1
            self._progress.on_part(passed, blocks)

        if part not in self._float_states:
            self._float_states[part] = final_states(readers[0], texts, count)
        states = [self._float_states[part], final_states(readers[1], texts, count)]
        kl, _, _ = divergences(
            lambda start, stop: [head_rows(reader, start, stop) for reader in readers],
            self._about.reader.config.vocab_size,
            states,
            np.concatenate([text[1:] for text in texts]),
        )
        return np.split(kl[1], np.cumsum([len(text) - 1 for text in texts])[:-1])

    # --- pass@1 ------------------------------------------------------------------------------------------------------

    def problems(self) -> int:
        assert self._about.questions is not None
        return self._about.questions.count

    def scores(self, option: Option | None, limit: int | None) -> Scores:
        asked, name = self._about.questions, option.name if option else "float"
        assert asked is not None

        def answer() -> dict[str, Any]:
            directory = self.directory(option) if option else self._about.reader.directory
            output = self._folder / _ANSWERS / _slug(name)
            request = replace(asked.request, checkpoint=directory, output=output, limit=limit)
            count = min(limit * len(request.tasks), asked.count) if limit else asked.count
            with self._step(f"{name}: answers to {count} problems", "answering", count) as done:
                totals, passed = [count], [0]

                def advance() -> None:
                    passed[0] += 1
                    self._progress.on_part(passed[0], totals[0])

                evaluate(request, asked.judging, on_begin=lambda total: totals.__setitem__(0, total), on_answer=advance)
                found = _pass_rates(output)
                done(f"pass@1 {np.mean([*found.values()]):.2%}")
            return {"scores": found}

        record = self._history.ask("answers", answer, candidate=name, limit=limit)
        scores: dict[str, float] = record["scores"]
        return scores

    # --- files -------------------------------------------------------------------------------------------------------

    def directory(self, option: Option) -> Path:
        """Where it is quantized, now if it was not before."""
        recipe, final = self.recipes[option.name], self._folder / QUANTIZED
        if begun_with(final).get("recipe") == recipe.digest:
            return final
        directory = self._folder / _CANDIDATES / _slug(option.name)
        if (directory / HASHES_FILE).exists() and self._history.known("quantize", candidate=option.name):
            return directory
        about = self._about
        self._make_room(option)
        expected = estimate(about.reader, recipe, about.data).seconds
        with self._step(f"{option.name}: quantizing", f"quantizing to {_width(recipe)}", 1, expected) as done:
            blocks = about.reader.config.num_hidden_layers
            progress = Progress(on_block=lambda report: self._progress.on_part(report.index + 1, blocks))
            quantize(about.reader, recipe, directory, data=about.data, resume=True, progress=progress)
            done(f"{option.bits:.3f} bits per weight")
        facts = {
            "bits_per_weight": option.bits,
            "bytes": option.nbytes,
            "predicted_kl": option.predicted,
            "recipe": recipe.digest,
            "sha256": hash_file(directory / HASHES_FILE),
        }
        self._history.ask("quantize", lambda: facts, candidate=option.name)
        return directory

    def settled(self, kept: Option | None) -> None:
        """What is not kept goes when the next is quantized: a resumed search settles once more what it had settled, and
        what it has come to since must be there then."""
        self._best = kept

    def _make_room(self, option: Option) -> None:
        names = {_slug(each.name) for each in (option, self._best) if each}
        folder = self._folder / _CANDIDATES
        for each in folder.iterdir() if folder.is_dir() else ():
            if each.name not in names:
                shutil.rmtree(each)

    def finish(self, winner: Option | None) -> None:
        """The winner's directory gets its name."""
        if winner is not None and (found := self.directory(winner)) != self._folder / QUANTIZED:
            found.rename(self._folder / QUANTIZED)
        shutil.rmtree(self._folder / _CANDIDATES, ignore_errors=True)

    @contextmanager
    def _step(self, said: str, kind: str, work: float, expected: float = 0.0) -> Iterator[Callable[[str], None]]:
        """Tells what is begun, and with what is called, what it came to."""
        came_to = ""

        def done(text: str) -> None:
            nonlocal came_to
            came_to = text

        with self._clock.step(kind, work, expected):
            self._progress.on_step(said)
            began = time.monotonic()
            yield done
        self._progress.on_done(f"{said}: {came_to}", time.monotonic() - began)


class MeasuredCurve:
    """A search.Curve."""

    def __init__(self, measurements: Measurements, base: str, found: Sensitivity) -> None:
        self._measurements, self._base, self._found = measurements, base, found

    @property
    def ends(self) -> tuple[float, float]:
        predicted = [self._found.predicted(group) for group in self._found.groups]
        return sum(cheap for cheap, _ in predicted), sum(dear for _, dear in predicted)

    def at(self, kl: float) -> Option | None:
        return self._measurements.mixed(self._base, self._found, max_kl=kl)

    def within(self, bits: float) -> Option | None:
        return self._measurements.mixed(self._base, self._found, bits_per_weight=bits)


def _pass_rates(output: Path) -> dict[str, float]:
    """task/problem -> mean over thinking modes."""
    (run,) = load_runs([output])
    rates: dict[str, list[float]] = {}
    for cell, results in run.results.items():
        for problem, share in shares(results).items():
            rates.setdefault(f"{cell[0]} {problem}", []).append(share)
    return {name: sum(each) / len(each) for name, each in rates.items()}


def _width(recipe: Recipe) -> str:
    """What a recipe's time is like that of others."""
    return "int8" if recipe.scheme == DEARER else "int4"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name)
