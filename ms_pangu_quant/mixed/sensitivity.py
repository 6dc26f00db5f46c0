"""What each layer costs when it alone is quantized: the figures that `pangu-quant sensitivity` saves and a budget reads.

KL is measured for the cheaper scheme, one group of layers (what MindFormers computes as one) at a time in the float model.
That of the dearer scheme follows from it: KL is quadratic in a small error, so it is in the ratio of the squared errors of
the block's output, which are measured for both. Measured KLs add up to that of the whole model only roughly; `together`,
measured with every layer quantized, says by how much they miss, and predictions are scaled by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig, read_json
from ms_pangu_quant.checkpoint.files import json_bytes, write_json
from ms_pangu_quant.errors import CheckpointError, DataError, RecipeError
from ms_pangu_quant.formats.reader import Format, layer_bytes
from ms_pangu_quant.mixed.budget import Assignment, Choice, choose
from ms_pangu_quant.recipe.recipe import KEEP_FLOAT, Recipe
from ms_pangu_quant.recipe.scheme import PRESETS
from ms_pangu_quant.recipe.settings import digest_of

VERSION = 3  # 1: KL of each group was measured at the head; 2: and errors of each layer of a group
DEFAULT_TOKENS = 4096
_DEARER = "w8a8"
DRAWS = 8  # of a next token at each: a text's KL is their mean, so its own error is the KL times the root of 2/DRAWS
_FORWARD_STEPS, _HEAD_STEPS, _BACKWARD_STEPS = 3, 1, 1


@dataclass(frozen=True)
class GroupSensitivity:
    """One group of layers of one block.

    output_error  scheme name -> ||quantized - float|| / ||float|| of the block's output, this group alone quantized.
    kl, kl_se     nats a token to the float model with the cheaper scheme; standard error over texts,
                  None for a single one.
    """

    block: int
    group: str
    output_error: Mapping[str, float]
    kl: float
    kl_se: float | None

    @property
    def layers(self) -> list[str]:
        """Full names."""
        return [f"{layout.block_prefix(self.block)}{site.name}" for site in layout.fused(self.group)]


@dataclass(frozen=True)
class Sensitivity:
    """schemes: (cheaper, dearer). together: scheme name -> KL with all layers quantized so. origin: what it was measured of
    (checkpoint, method: hashes) and on (data)."""

    schemes: tuple[str, str]
    groups: tuple[GroupSensitivity, ...]
    together: Mapping[str, float]
    origin: Mapping[str, Any]

    def predicted(self, group: GroupSensitivity) -> tuple[float, float]:
        """KL of the group in the whole quantized model, (cheaper, dearer scheme)."""
        cheap, dear = (group.output_error[name] for name in self.schemes)
        kl = group.kl * self.additivity
        return kl, kl * min(1.0, dear / cheap) ** 2 if cheap else kl

    @property
    def additivity(self) -> float:
        """KL of all layers in the cheaper scheme over the sum of each one's."""
        total = sum(group.kl for group in self.groups)
        return self.together[self.schemes[0]] / total if total else 1.0

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json_bytes(self._json())).hexdigest()

    def save(self, path: Path) -> None:
        write_json(path, self._json())

    def _json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Raises CheckpointError naming the file if it is not one of ours."""
        try:
            raw = read_json(path)
            if raw["version"] != VERSION:
                raise CheckpointError(
                    f"{path}: is version {raw['version']!r} of the format, wanted {VERSION}; measure again"
                )
            groups = tuple(GroupSensitivity(**group) for group in raw["groups"])
            if not all(isinstance(group.block, int) and isinstance(group.group, str) for group in groups):
                raise ValueError("a group without a block's number and a name")
            if len({(group.block, group.group) for group in groups}) < len(groups):
                raise ValueError("a group that is there twice")
            cheap, dear = raw["schemes"]
            found = cls((cheap, dear), groups, raw["together"], raw["origin"])
            figures = [found.together[cheap], found.together[dear]]
            for group in groups:
                figures += [group.kl, group.kl_se or 0.0, group.output_error[cheap], group.output_error[dear]]
            if not groups or not all(isinstance(each, (int, float)) and 0 <= each < float("inf") for each in figures):
                raise ValueError("figures that are not finite numbers of at least 0")
            if not isinstance(found.origin["checkpoint"], str):
                raise ValueError("origin.checkpoint is not a hash")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: is not what `pangu-quant sensitivity` writes ({type(error).__name__}: {error})"
            ) from None
        return found


def split(data: TokenData, tokens: int, least: int = 1) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """(texts for statistics, the last ones with at least `tokens` tokens together). Raises DataError if fewer than `least`
    are left, two where one of them is held out."""
    start, held = len(data.sequences), 0
    while start and held < tokens:
        start -= 1
        held += len(data.sequences[start])
    if start < least:
        raise DataError(
            f"calibration data: has {data.tokens} tokens in {len(data.sequences)} texts, and {tokens} of them are to be "
            f"measured on; {start or 'none'} are left for the statistics, which want {least} or more: give more "
            "(calibration.samples) or measure on fewer (--tokens)"
        )
    return list(data.sequences[:start]), list(data.sequences[start:])


def total_steps(blocks: int) -> int:
    """What measuring takes, in steps of about the same time."""
    return sum(steps(part, blocks) for part in range(2 * blocks + 1))


def steps(part: int, blocks: int) -> int:
    """Of the blocks, the head and the blocks backwards, one after another."""
    if part == blocks:
        return _HEAD_STEPS
    return _FORWARD_STEPS if part < blocks else _BACKWARD_STEPS


def schemes_to_measure(recipe: Recipe) -> tuple[str, str]:
    """(cheaper, dearer): those of a recipe's budget, or its scheme and the dearest that there is.

    Raises RecipeError where there is nothing to compare.
    """
    if recipe.budget is not None:
        cheap, dear = recipe.budget.schemes
        return cheap, dear
    if recipe.scheme in (_DEARER, KEEP_FLOAT):
        raise RecipeError(
            f"{recipe.where}: scheme is {recipe.scheme}; wanted a budget, or a scheme to compare with {_DEARER}"
        )
    return recipe.scheme, _DEARER


def method_digest(recipe: Recipe) -> str:
    """sha256 of how the figures are made, and what they depend on in a recipe: its transforms, rounding and ranges, not its
    schemes."""
    names = ("rewrites", "transforms", "quantizer", "activation_range", "full_range")
    return digest_of(draws=DRAWS, **{name: getattr(recipe, name) for name in names})


def assigned(recipe: Recipe, config: ModelConfig, found: Sensitivity, stored_as: Format) -> Recipe:
    """The recipe with its budget spent; layers that it names under `layers` keep what it says. Transforms that it leaves to
    be decided are those that the sensitivities were measured with.

    Bits are those of the tensors that `stored_as` stores, so that inspect finds the same.
    Raises   RecipeError if the sensitivities are of another method or model, or the budget cannot be met.
    """
    budget = recipe.budget
    if budget is None:
        return recipe
    recipe = _as_measured(recipe, found)
    _check_fits(recipe, config, found)
    layers = [layer for group in found.groups for layer in group.layers]
    named = recipe.named(layers)
    open_groups, choices, bits, kl = [], [], 0, 0.0
    for group in found.groups:
        stored = [_bits(config, group, name, stored_as) for name in budget.schemes]
        expected = found.predicted(group)
        fixed = {named[layer] for layer in group.layers if layer in named}
        if not fixed:
            open_groups.append(group)
            choices.append(Choice((stored[0], stored[1]), expected))
            continue
        scheme = fixed.pop()
        if scheme == KEEP_FLOAT:
            bits += _float_bits(recipe, config, group, named)
        elif scheme in budget.schemes:
            place = list(budget.schemes).index(scheme)
            bits, kl = bits + stored[place], kl + expected[place]
        else:
            raise RecipeError(
                f"{recipe.where}: layers: {group.layers[0]} is {scheme}; beside a budget of {' and '.join(budget.schemes)} "
                f"layers can be one of these or {KEEP_FLOAT}, since the cost of others was not measured"
            )
    weights = sum(layout.weight_count(config, layout.fused(group.group)) for group in found.groups)
    try:
        raised = choose(choices, budget, weights=weights, bits=bits, kl=kl)
    except RecipeError as error:
        raise RecipeError(f"{recipe.where}: {error} (stored as {stored_as.NAME})") from None
    schemes = {}
    for group, choice, dear in zip(open_groups, choices, raised, strict=True):
        schemes.update(dict.fromkeys(group.layers, budget.schemes[dear]))
        bits, kl = bits + choice.bits[dear], kl + choice.kl[dear]
    made = Assignment(schemes, bits / weights, kl, stored_as.NAME, found.sha256, found.origin["checkpoint"])
    return dataclasses.replace(recipe, assignment=made)


def _as_measured(recipe: Recipe, found: Sensitivity) -> Recipe:
    for choice in recipe.choices:
        each = recipe.decided(choice.name, found.origin.get("transforms", f"{choice.name}: as the sensitivities"))
        if found.origin.get("method") == method_digest(each):
            return each
    return recipe


def _check_fits(recipe: Recipe, config: ModelConfig, found: Sensitivity) -> None:
    assert recipe.budget is not None
    if found.schemes != tuple(recipe.budget.schemes):
        raise RecipeError(
            f"{recipe.where}: budget of {' and '.join(recipe.budget.schemes)}, but the sensitivities are of "
            f"{' and '.join(found.schemes)}; measure them with this recipe"
        )
    if found.origin.get("method") != method_digest(recipe):
        raise RecipeError(
            f"{recipe.where}: the sensitivities were measured with other transforms, rounding or ranges; measure them with "
            "this recipe"
        )
    names = {layer for group in found.groups for layer in group.layers}
    wanted = layout.layer_names(config)
    if names != {*wanted}:
        raise RecipeError(
            f"{recipe.where}: the sensitivities are of {len(names)} layers, the model has {len(wanted)}; they are another "
            "model's"
        )


def _float_bits(recipe: Recipe, config: ModelConfig, group: GroupSensitivity, named: Mapping[str, str]) -> int:
    """Of a group that stays float: float32 where the recipe changes a weight, else as wide as the checkpoint has it."""
    prefix, own = layout.block_prefix(group.block), 32 if config.torch_dtype == "float32" else 16
    schemes = {site.name: PRESETS.get(named.get(f"{prefix}{site.name}", recipe.scheme)) for site in layout.SITES}
    return sum(
        layout.weight_count(config, [site]) * (32 if recipe.changes(f"{site.name}.weight", schemes) else own)
        for site in layout.fused(group.group)
    )


def _bits(config: ModelConfig, group: GroupSensitivity, scheme: str, stored_as: Format) -> int:
    return 8 * sum(layer_bytes(stored_as, config, site, PRESETS[scheme]) for site in layout.fused(group.group))
