"""What a model is asked for its calibration text: lines of a file, and who is asked what.

A line is {"prompt": text}, or {"messages": [...]} of a chat that ends with what the user says; "kind" and "language" beside
it say what it is, and answers are balanced over the kinds. Lines that hold a benchmark's problem are refused.

A place in the file of answers has a mode and a kind, in turn. It is filled by the next prompt of its kind; where that
answer is of no use, by one more, and so on. Who is asked what therefore follows from the seed and the answers so far.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from ms_pangu_quant.calibration.overlap import find_benchmark
from ms_pangu_quant.checkpoint.messages import read_message
from ms_pangu_quant.errors import DataError, located
from ms_pangu_quant.evaluation.samples import read_records

OWN = "prompts.jsonl"  # in a checkpoint's folder, for one that knows a narrow thing only
SHIPPED = Path(str(files("ms_pangu_quant") / "assets" / "prompts.jsonl"))
OTHER = "other"  # kind and language of what names none
_NAMED = 5  # offending lines that a message names


@dataclass(frozen=True)
class Prompt:
    """number is the line's. messages are role, content and thought each; the last is the user's."""

    number: int
    kind: str
    language: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Prompts:
    sha256: str
    all: tuple[Prompt, ...]


@dataclass(frozen=True)
class Question:
    """A prompt put in a mode for the `draw`-th time."""

    mode: str
    prompt: Prompt
    draw: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.mode, self.prompt.number, self.draw

    @property
    def stream(self) -> int:
        """Number of its random draws, which nothing else that is asked can change."""
        return int.from_bytes(hashlib.sha256(json.dumps(self.key).encode()).digest()[:8], "big")


def prompts_of(directory: Path) -> Path:
    """What a checkpoint is asked where nobody says."""
    own = directory / OWN
    return own if own.exists() else SHIPPED


def load_prompts(path: Path) -> Prompts:
    """Raises DataError naming file and line, also for lines that hold a benchmark's problem (calibration/overlap.py)."""
    found = tuple(_read(f"{path}: line {number}", number, record) for number, record in read_records(path))
    if not found:
        raise DataError(f'{path}: no prompts; wanted lines of {{"prompt": ...}} or {{"messages": [...]}}')
    texts = ((prompt, "\n".join(message["content"] for message in prompt.messages)) for prompt in found)
    benchmarks = [f"line {prompt.number}: {name}" for prompt, text in texts if (name := find_benchmark(text)) is not None]
    if benchmarks:
        more = f" and {len(benchmarks) - _NAMED} more" if len(benchmarks) > _NAMED else ""
        raise DataError(
            f"{path}: {len(benchmarks)} of {len(found)} prompts hold a benchmark problem ({'; '.join(benchmarks[:_NAMED])}"
            f"{more}); scores measured after calibrating on their answers would flatter. Remove these lines"
        )
    return Prompts(hashlib.sha256(path.read_bytes()).hexdigest(), found)


def _read(where: str, number: int, record: dict[str, Any]) -> Prompt:
    text, messages = record.get("prompt"), record.get("messages")
    if (text is None) == (messages is None):
        got = "both" if text is not None else f"keys {', '.join(map(repr, record)) or 'none'}"
        raise DataError(f"{where}: got {got}, wanted 'prompt', a text, or 'messages', a chat")
    chat = [{"role": "user", "content": text}] if messages is None else messages
    if not isinstance(chat, list):
        raise DataError(f"{where}: messages: got {short(chat)}, wanted a list")
    with located(f"{where}: ", DataError):
        read = tuple(read_message(message, f"messages[{index}]") for index, message in enumerate(chat))
    if not read or read[-1]["role"] != "user" or not read[-1]["content"].strip():
        raise DataError(f"{where}: wanted something that the user says at its end")
    said = {name: record.get(name, OTHER) for name in ("kind", "language")}
    for name, value in said.items():
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: {name}: got {short(value)}, wanted a word")
    return Prompt(number, said["kind"], said["language"], read)


class Asked:
    """places[i] is (mode, kind) of the i-th row: every mode meets every kind, as evenly as the number of rows allows."""

    def __init__(self, prompts: Sequence[Prompt], modes: Sequence[str], samples: int, seed: int) -> None:
        kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
        self.places = [(modes[place % len(modes)], kinds[place // len(modes) % len(kinds)]) for place in range(samples)]
        generator = np.random.Generator(np.random.PCG64(seed))
        self._prompts = {kind: _mixed([each for each in prompts if each.kind == kind], generator) for kind in kinds}
        self._next = dict.fromkeys(kinds, 0)
        self._draws: Counter[tuple[str, int]] = Counter()

    def fill(self, places: Sequence[int]) -> list[Question]:
        """What is asked next for these places, in their order; each call goes on where the last one ended."""
        return [self._question(*self.places[place]) for place in places]

    def _question(self, mode: str, kind: str) -> Question:
        prompts = self._prompts[kind]
        prompt = prompts[self._next[kind] % len(prompts)]
        self._next[kind] += 1
        self._draws[mode, prompt.number] += 1
        return Question(mode, prompt, self._draws[mode, prompt.number] - 1)


def _mixed(prompts: Sequence[Prompt], generator: np.random.Generator) -> list[Prompt]:
    """Shuffled, each language spread evenly over the whole: however many are taken, the shares are about the same."""
    placed: list[tuple[float, str, Prompt]] = []
    for language in sorted({prompt.language for prompt in prompts}):
        mine = [prompt for prompt in prompts if prompt.language == language]
        order = generator.permutation(len(mine))
        placed += [((place + 0.5) / len(mine), language, mine[index]) for place, index in enumerate(order)]
    return [prompt for _, _, prompt in sorted(placed, key=lambda each: each[:2])]
