"""A recipe: which layers get which scheme, after which transforms, rounded how, calibrated on how much. YAML -> Recipe.

Reading is strict. An unknown key is an error with a suggestion, a pattern that matches no layer is an error, and so are
layers that MindFormers computes as one (q/k/v, gate/up) but that would get different schemes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import NOTHING, InputStats, Needs
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import RecipeError, located
from ms_pangu_quant.mixed.budget import Assignment, Budget
from ms_pangu_quant.quantizers.activation import ActivationRange
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.quantizers.kv_cache import Int8Cache
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import INT8_CACHE, PRESETS, QuantScheme, TensorScheme
from ms_pangu_quant.recipe.settings import check_types, digest_of


class Transform(Protocol):
    """(block, stats, schemes of its layers) -> (block, stats); the function of the block is unchanged.

    inputs are those of the block that it changes; needs says what it wants to know of each input;
    changes(name, schemes) says whether it rewrites a tensor of a block with these schemes.
    """

    @property
    def inputs(self) -> Sequence[str]: ...

    @property
    def needs(self) -> Needs: ...

    def changes(self, name: str, schemes: Mapping[str, QuantScheme | None]) -> bool: ...

    def __call__(
        self, block: Block, stats: Mapping[str, InputStats], schemes: Mapping[str, QuantScheme | None]
    ) -> tuple[Block, dict[str, InputStats]]: ...


class Rewrite(Protocol):
    """reader -> reader of the same function; done to the whole checkpoint before any block is looked at."""

    def changes(self, name: str) -> bool:
        """Whether it rewrites this tensor of a block."""

    def states(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hidden states [tokens, hidden] between two blocks, as the rewritten checkpoint has them."""

    def __call__(self, reader: CheckpointReader) -> CheckpointReader: ...


class WeightQuantizer(Protocol):
    """(weight [out, in], scheme, statistics of its input or None, rows) -> those rows of it, rounded; pure.

    The weight is that of all layers that read the input, one below the other: what is worked out of the input, or chosen
    for it, is for all of them, and the same whichever rows are asked for.
    """

    @property
    def needs(self) -> Needs:
        """What it wants to know of the input."""

    def operations(self, outputs: int, inputs: int) -> float:
        """What rounding a weight [outputs, inputs] takes, in float32 operations, roughly."""

    def __call__(
        self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None, rows: slice = slice(None)
    ) -> QuantizedWeight: ...


KEEP_FLOAT = "float"


@dataclass(frozen=True)
class TransformChoice:
    """One of what `transforms: auto` is decided between."""

    name: str
    rewrites: tuple[Rewrite, ...]
    transforms: tuple[Transform, ...]


@dataclass(frozen=True)
class CalibrationSettings:
    """How much of the calibration file is used: `samples` rows, each cut to `max_length` tokens, drawn with `seed`, of no
    more than `tokens` together; and `held_out` more, as a share of them, which nothing is fitted to."""

    samples: int = 128
    max_length: int = 512
    seed: int = 0
    tokens: int | None = None
    held_out: float = 0.125

    def __post_init__(self) -> None:
        check_types(self, "calibration")
        for name, least in (("samples", 1), ("max_length", 1), ("tokens", 1), ("seed", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise RecipeError(
                    f"calibration.{name}: got {getattr(self, name)}, wanted a whole number of at least {least}"
                )
        if not 0 <= self.held_out <= 1:
            raise RecipeError(f"calibration.held_out: got {self.held_out}, wanted a share of the samples, from 0 to 1")

    @property
    def texts(self) -> int:
        """Rows that are wanted of the file, held-out ones included."""
        return self.samples + int(self.samples * self.held_out)

    @property
    def all_tokens(self) -> int | None:
        """Tokens that those may have."""
        return None if self.tokens is None else self.tokens + int(self.tokens * self.held_out)

    @property
    def said(self) -> str:
        """How much is wanted."""
        beside = f" and {self.texts - self.samples} that are held out" if self.texts > self.samples else ""
        return f"{self.samples} rows{beside}, of up to {self.max_length} tokens"

    @property
    def least(self) -> int | None:
        """Rows of which one is held out; None where none ever is."""
        return next((texts for texts in range(1, self.texts + 1) if self.held_out_of(texts)), None)

    def held_out_of(self, texts: int) -> int:
        """How many are held out of so many rows: what is beyond the samples; of a file that has less, the same share."""
        return max(texts - self.samples, int(min(texts, self.samples) * self.held_out / (1 + self.held_out)))


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. `layers` are (pattern, scheme name) pairs; the last that matches a layer decides.

    kv_cache says how keys and values are cached; None: as floats. With a `budget`, `scheme` is its cheaper one, and
    `assignment`, which the file does not have, says who gets the other. With `choices`, rewrites and transforms are still
    to be taken from one of them; `decision` says which it was and why.
    """

    why: str
    scheme: str
    layers: tuple[tuple[str, str], ...]
    full_range: bool
    rewrites: tuple[Rewrite, ...]
    transforms: tuple[Transform, ...]
    quantizer: WeightQuantizer
    activation_range: ActivationRange
    calibration: CalibrationSettings
    text: str
    where: str
    budget: Budget | None = None
    assignment: Assignment | None = None
    kv_cache: Int8Cache | None = None
    choices: tuple[TransformChoice, ...] = ()
    decision: str = ""

    @property
    def digest(self) -> str:
        """sha256 of what is done and what its budget came to, however a file says it and whatever its `why`."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("why", "text", "where", "decision", *(() if self.choices else ("choices",))):
            del said[name]
        return digest_of(**{**said, "assignment": self.assignment and self.assignment.schemes})

    @property
    def observed(self) -> Needs:
        """What is wanted of the inputs of a float block; a quantizer that aims at the float model sees them itself."""
        needs = reduce(operator.or_, (transform.needs for transform in self.transforms), NOTHING)
        return needs | (self._of_rounding if self.seen is None else NOTHING)

    @property
    def seen(self) -> Needs | None:
        """What is wanted of each input as the layers rounded before it make it; None where nothing is."""
        return self._of_rounding if self.quantizer.needs.drift else None

    @property
    def _of_rounding(self) -> Needs:
        return self.quantizer.needs | (self.activation_range.needs if self._is_static else NOTHING)

    @property
    def _is_static(self) -> bool:
        names = (self.scheme, *(self.budget.schemes if self.budget else ()), *(name for _, name in self.layers))
        return any(name != KEEP_FLOAT and not PRESETS[name].activation.dynamic for name in names)

    @property
    def needs_calibration(self) -> bool:
        beside = self.budget is not None or self.kv_cache is not None or bool(self.choices)
        return beside or (self.observed | (self.seen or NOTHING)).data

    def rewritten(self, reader: CheckpointReader) -> CheckpointReader:
        """The checkpoint as this recipe rounds it. Raises RecipeError if a rewrite does not fit its sizes."""
        self._check_decided()
        for rewrite in self.rewrites:
            reader = rewrite(reader)
        return reader

    def changes(self, name: str, schemes: Mapping[str, QuantScheme | None]) -> bool:
        """Whether a tensor of a block with these schemes is rewritten before layers are rounded."""
        self._check_decided()
        rewritten = any(rewrite.changes(name) for rewrite in self.rewrites)
        return rewritten or any(transform.changes(name, schemes) for transform in self.transforms)

    def _check_decided(self) -> None:
        if self.choices:
            raise RecipeError(
                f"{self.where}: transforms: auto is decided by measuring, as `pangu-quant quantize` does; here name them: "
                f"{' or '.join(f'[{choice.name}]' for choice in self.choices)}"
            )

    def decided(self, name: str, decision: str) -> Recipe:
        """The recipe with the choice of this name."""
        chosen = next(choice for choice in self.choices if choice.name == name)
        return dataclasses.replace(
            self, rewrites=chosen.rewrites, transforms=chosen.transforms, choices=(), decision=decision
        )

    def uniform(self, scheme: str) -> Recipe:
        """The same recipe with one scheme for all layers."""
        return dataclasses.replace(self, scheme=scheme, layers=(), budget=None, assignment=None)

    def named(self, names: Sequence[str]) -> dict[str, str]:
        """Of these layers those that a pattern under `layers` names, and their schemes."""
        return {name: scheme for pattern, scheme in self.layers for name in fnmatch.filter(names, pattern)}

    def plan(self, config: ModelConfig) -> Plan:
        """Raises RecipeError if a pattern matches nothing or the schemes do not fit this model."""
        names = layout.layer_names(config)
        if self.budget is not None and self.assignment is None:
            raise RecipeError(
                f"{self.where}: scheme is a budget, and which layers it raises follows from sensitivities: run it with "
                "`pangu-quant quantize`, or give it to sensitivity.assigned() first"
            )
        chosen = dict.fromkeys(names, self.scheme) | dict(self.assignment.schemes if self.assignment else {})
        for pattern, scheme in self.layers:
            matched = fnmatch.filter(names, pattern)
            if not matched:
                raise RecipeError(
                    f"{self.where}: layers: pattern {pattern!r} matches no layer; layers are called "
                    f"{names[0]} and so on, * matches anything"
                )
            chosen.update(dict.fromkeys(matched, scheme))
        schemes = {name: self._scheme(scheme) for name, scheme in chosen.items()}
        plan = Plan.of_layers(schemes, config.num_hidden_layers, None if self.kv_cache is None else INT8_CACHE)
        self._check_fused(plan, chosen)
        self._check_sizes(config, plan)
        return plan

    def _scheme(self, name: str) -> QuantScheme | None:
        return None if name == KEEP_FLOAT else PRESETS[name].with_range(full_range=self.full_range)

    def _check_fused(self, plan: Plan, chosen: Mapping[str, str]) -> None:
        for index, block in enumerate(plan.blocks):
            for sites in block.split_layers:
                listed = ", ".join(f"{site.name}: {chosen[f'{layout.block_prefix(index)}{site.name}']}" for site in sites)
                raise RecipeError(
                    f"{self.where}: block {index}: {listed}; MindFormers computes these as one layer "
                    "and would use the first scheme for all: give them the same"
                )

    def _check_sizes(self, config: ModelConfig, plan: Plan) -> None:
        for _, site, scheme in plan:
            outputs, inputs = layout.site_shape(config, site)
            if scheme is None:
                continue
            with located(f"{self.where}: {site.name}: "):
                scheme.weight.groups(inputs)
            if scheme.weight.bits == 4 and (outputs % 2 or inputs % 2):
                raise RecipeError(
                    f"{self.where}: {site.name} is [{outputs}, {inputs}]; int4 is stored two a byte and "
                    "needs even sizes: keep it float or in w8a8"
                )
        with located(f"{self.where}: "):
            _ = plan.group_size
