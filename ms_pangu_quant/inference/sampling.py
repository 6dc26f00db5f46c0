"""How answers are generated. From logits to the next token, in NumPy: greedy, or temperature, then top-k, then top-p, then
a seeded draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.tokenizer_files import TokenizerFiles
from ms_pangu_quant.errors import CheckpointError, RequestError, located

OWN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # of a checkpoint that names none: the distribution as it is


class Keywords(TypedDict, total=False):
    """The fields of GenerationSettings behind its first, as keywords of Model.generate()."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Sequence[str]


GREEDY = "greedy"


def decoding_of(told: Any) -> str | None:
    """How answers were drawn, of settings as a file has them: GREEDY, or such as "temperature 0.6, top-p 0.95, top-k 20".
    None where it does not say."""
    if not isinstance(told, dict) or not all(isinstance(told.get(name, 0), int | float) for name in OWN):
        return None
    if not told.get("temperature"):
        return GREEDY if "temperature" in told else None
    cuts = {"top-p": (told.get("top_p", 1.0), 1.0), "top-k": (told.get("top_k", 0), 0)}
    named = [f"{name} {value:g}" for name, (value, none) in cuts.items() if value != none]
    return ", ".join([f"temperature {told['temperature']:g}", *named])


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated and where they end. Raises RequestError for values out of range.

    max_new_tokens  tokens an answer may have, its thought included.
    temperature     0 is greedy; top_k 0 and top_p 1 keep every token; seed makes a draw repeatable.
    stop            texts that end an answer; they are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens: got {self.max_new_tokens}, wanted at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature: got {self.temperature}, wanted a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p: got {self.top_p}, wanted more than 0 and at most 1")
        if self.top_k < 0 or self.seed < 0:
            raise RequestError("top_k and seed: wanted whole numbers of at least 0")

    def of_each(self, count: int, limits: Sequence[int] | None) -> list[GenerationSettings]:
        """Of `count` answers, each with its own of these max_new_tokens where there are any."""
        return [self] * count if limits is None else [replace(self, max_new_tokens=limit) for limit in limits]

    def generator(self, prompt_index: int) -> np.random.Generator:
        """A stream of its own for each prompt, so that what else is in the batch cannot change a draw."""
        return np.random.Generator(np.random.PCG64([self.seed, prompt_index]))

    def next_token(self, logits: NDArray[np.float32], generator: np.random.Generator) -> int:
        """logits [vocab] -> token id."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits)
        cumulative = np.cumsum(probabilities)
        return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right").clip(0, len(logits) - 1))

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """The distribution [vocab] drawn from; tokens cut off by top_k or top_p have probability 0."""
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        weights = np.exp(scaled[order] - scaled[order[0]])
        if self.top_k:
            weights[self.top_k :] = 0
        weights /= weights.sum()
        before = np.cumsum(weights) - weights  # a token stays if those above it do not fill top_p yet
        weights[before >= self.top_p] = 0
        probabilities = np.zeros_like(scaled)
        probabilities[order] = weights / weights.sum()
        return probabilities


def own_settings(
    directory: Path, max_new_tokens: int, seed: int, asked: Mapping[str, float | None] = MappingProxyType({})
) -> GenerationSettings:
    """A checkpoint's own temperature, top_p and top_k, from its generation_config.json, where `asked` has no other; those
    of OWN where that names none. Raises CheckpointError."""
    file, found = directory / "generation_config.json", TokenizerFiles.of(directory).generation
    chosen: dict[str, Any] = {}
    for name, default in OWN.items():
        own, given = found.get(name), asked.get(name)
        if own is not None and (isinstance(own, bool) or not isinstance(own, int | float)):
            raise CheckpointError(f"{file}: {name}: got {own!r}, wanted a number")
        chosen[name] = given if given is not None else default if own is None else own
    chosen["top_k"] = max(int(chosen["top_k"]), 0)  # -1 keeps every token there, 0 here
    with located(f"{file}: ", CheckpointError):
        return GenerationSettings(max_new_tokens, seed=seed, **chosen)
