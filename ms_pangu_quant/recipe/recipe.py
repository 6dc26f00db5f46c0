"""A recipe: which layers get which scheme, after which transforms, rounded how, calibrated on how much. YAML -> Recipe.

Reading is strict. An unknown key is an error with a suggestion, a pattern that matches no layer is an error, and so are
layers that MindFormers computes as one (q/k/v, gate/up) but that would get different schemes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import NOTHING, InputStats, Needs
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import PanguQuantError, RecipeError
from ms_pangu_quant.mixed.budget import Assignment, Budget
from ms_pangu_quant.quantizers.activation import ActivationRange
from ms_pangu_quant.quantizers.gptq import Gptq
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.quantizers.kv_cache import Int8Cache
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import INT8_CACHE, PRESETS, QuantScheme, TensorScheme
from ms_pangu_quant.recipe.settings import canonical, check_types, digest_of, setting_names
from ms_pangu_quant.suggestion import did_you_mean, did_you_mean_path
from ms_pangu_quant.transforms.rotate import Rotate
from ms_pangu_quant.transforms.smooth import SmoothQuant
from ms_pangu_quant.transforms.smooth_search import SmoothSearch


class Transform(Protocol):
    """(block, stats, schemes of its layers) -> (block, stats); the function of the block is unchanged.

    inputs are those of the block that it changes; needs says what it wants to know of each input;
    changes(name, schemes) says whether it rewrites a tensor ("mlp.up_proj.weight") of a block with these schemes.
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
        """Whether it rewrites this tensor of a block ("mlp.up_proj.weight")."""
        ...

    def __call__(self, reader: CheckpointReader) -> CheckpointReader: ...


class WeightQuantizer(Protocol):
    """(weight [out, in], scheme, statistics of its input or None) -> QuantizedWeight; pure."""

    @property
    def needs(self) -> Needs:
        """What it wants to know of the input."""
        ...

    def operations(self, outputs: int, inputs: int) -> float:
        """What rounding a weight [outputs, inputs] takes, roughly: for estimates, and for dividing the work."""
        ...

    def __call__(self, weight: NDArray[np.float32], scheme: TensorScheme, stats: InputStats | None) -> QuantizedWeight: ...


REWRITES: dict[str, Callable[..., Rewrite]] = {"rotate": Rotate}
TRANSFORMS: dict[str, Callable[..., Transform]] = {"smooth": SmoothQuant, "smooth_search": SmoothSearch}
QUANTIZERS: dict[str, Callable[..., WeightQuantizer]] = {"rtn": RoundToNearest, "gptq": Gptq}
KEEP_FLOAT = "float"
_KEYS = ("why", "scheme", "layers", "weight_range", "transforms", "rounding", "activation_range", "kv_cache", "calibration")
_RECIPE_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


@dataclass(frozen=True)
class CalibrationSettings:
    """How much of the calibration file is used: `samples` rows, each cut to `max_length` tokens, drawn with `seed`."""

    samples: int = 128
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "calibration")
        for name, least in (("samples", 1), ("max_length", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(
                    f"calibration.{name}: got {getattr(self, name)}, wanted a whole number of at least {least}"
                )


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. `layers` are (pattern, scheme name) pairs; the last that matches a layer decides.

    kv_cache says how keys and values are cached; None: as floats. With a `budget`, `scheme` is its cheaper one, and
    `assignment`, which the file does not have, says who gets the other.
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

    @property
    def digest(self) -> str:
        """sha256 of what is done and what its budget came to, however a file says it and whatever its `why`."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("why", "text", "where"):
            del said[name]
        return digest_of(**{**said, "assignment": self.assignment and self.assignment.schemes})

    @property
    def as_text(self) -> str:
        """The text it was read from; of a recipe that was changed since, another that says what it is now.

        A part that no file can name has its type's name there.
        """
        wanted = dataclasses.replace(self, assignment=None).digest
        try:
            if parse_recipe(self.text, self.where).digest == wanted:
                return self.text
        except RecipeError:  # it has none
            pass
        return yaml.safe_dump(_spelled(self), sort_keys=False, allow_unicode=True)

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
        beside = self.budget is not None or self.kv_cache is not None
        return beside or (self.observed | (self.seen or NOTHING)).data

    def rewritten(self, reader: CheckpointReader) -> CheckpointReader:
        """The checkpoint as this recipe rounds it. Raises RecipeError if a rewrite does not fit its sizes."""
        for rewrite in self.rewrites:
            reader = rewrite(reader)
        return reader

    def changes(self, name: str, schemes: Mapping[str, QuantScheme | None]) -> bool:
        """Whether a tensor ("mlp.up_proj.weight") of a block with these schemes is rewritten before layers are rounded."""
        rewritten = any(rewrite.changes(name) for rewrite in self.rewrites)
        return rewritten or any(transform.changes(name, schemes) for transform in self.transforms)

    def uniform(self, scheme: str) -> Recipe:
        """The same recipe with one scheme for all layers."""
        return dataclasses.replace(self, scheme=scheme, layers=(), budget=None, assignment=None)

    def named(self, names: Sequence[str]) -> dict[str, str]:
        """Of these layers those that a pattern under `layers` names, and their schemes."""
        return {name: scheme for pattern, scheme in self.layers for name in fnmatch.filter(names, pattern)}

    def plan(self, config: ModelConfig) -> Plan:
        """Raises RecipeError if a pattern matches nothing or the schemes do not fit this model."""
        names = [name.removesuffix(".weight") for name in layout.linear_names(config)]
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
        self._check_fused(config, chosen)
        schemes = {name: self._scheme(scheme) for name, scheme in chosen.items()}
        plan = Plan.of_layers(schemes, config.num_hidden_layers, None if self.kv_cache is None else INT8_CACHE)
        self._check_sizes(config, plan)
        return plan

    def _scheme(self, name: str) -> QuantScheme | None:
        return None if name == KEEP_FLOAT else PRESETS[name].with_range(full_range=self.full_range)

    def _check_fused(self, config: ModelConfig, chosen: Mapping[str, str]) -> None:
        for index in range(config.num_hidden_layers):
            for fused in layout.FUSED:
                parts = {site.name: chosen[f"{layout.block_prefix(index)}{site.name}"] for site in layout.fused(fused)}
                if len(set(parts.values())) > 1:
                    listed = ", ".join(f"{name}: {scheme}" for name, scheme in parts.items())
                    raise RecipeError(
                        f"{self.where}: block {index}: {listed}; MindFormers computes these as one layer "
                        "and would use the first scheme for all: give them the same"
                    )

    def _check_sizes(self, config: ModelConfig, plan: Plan) -> None:
        for _, site, scheme in plan:
            outputs, inputs = layout.site_shape(config, site)
            if scheme is None:
                continue
            try:
                scheme.weight.groups(inputs)
            except RecipeError as error:
                raise RecipeError(f"{self.where}: {site.name}: {error}") from None
            if scheme.weight.bits == 4 and (outputs % 2 or inputs % 2):
                raise RecipeError(
                    f"{self.where}: {site.name} is [{outputs}, {inputs}]; int4 is stored two a byte and "
                    "needs even sizes: keep it float or in w8a8"
                )
        if len(plan.group_sizes) > 1:
            raise RecipeError(
                f"{self.where}: int4 group sizes {sorted(plan.group_sizes)} (0 is per channel) are mixed; MindFormers "
                "has one group_size for the whole network"
            )


def find_recipe(name: str) -> Path:
    """A recipe file, or the shipped recipe of that name ("w8a8"). Raises RecipeError listing the shipped ones."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for folder in _RECIPE_FOLDERS for file in sorted(folder.glob("*.yaml"))}
    if path.suffix in ("", ".yaml") and path.stem in shipped and path.parent.name in ("", "configs"):
        return shipped[path.stem]
    close = did_you_mean(path.stem, shipped) or did_you_mean_path(path)
    raise RecipeError(f"{name}: no such file{close}; shipped recipes: {', '.join(shipped)}")


def load_recipe(path: Path) -> Recipe:
    """Raises RecipeError naming the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """text is YAML; where is what errors call it. Raises RecipeError naming the key."""
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from None
    raw = _mapping(raw, where)
    _check_keys(raw, _KEYS, where)
    if "scheme" not in raw:
        raise RecipeError(f"{where}: scheme is missing; wanted one of {', '.join(PRESETS)}")
    layers = _mapping(raw.get("layers") or {}, f"{where}: layers")
    weight_range = raw.get("weight_range", "narrow")
    if weight_range not in ("narrow", "full"):
        raise RecipeError(
            f"{where}: weight_range is {weight_range!r}, wanted narrow (max/127, max/7) or full (max/127.5, max/7.5)"
        )
    budget, scheme = _scheme_or_budget(raw["scheme"], f"{where}: scheme")
    rewrites, transforms = _transforms(raw.get("transforms") or [], f"{where}: transforms")
    return Recipe(
        why=str(raw.get("why", "")),
        scheme=scheme,
        layers=tuple((str(pattern), _scheme_name(name, f"{where}: layers: {pattern}")) for pattern, name in layers.items()),
        full_range=weight_range == "full",
        rewrites=rewrites,
        transforms=transforms,
        quantizer=_build(raw.get("rounding", "rtn"), QUANTIZERS, f"{where}: rounding"),
        activation_range=_build(
            {"activation_range": raw.get("activation_range") or {}}, {"activation_range": ActivationRange}, where
        ),
        calibration=_build({"calibration": raw.get("calibration") or {}}, {"calibration": CalibrationSettings}, where),
        text=text,
        where=where,
        budget=budget,
        kv_cache=_kv_cache(raw.get("kv_cache", KEEP_FLOAT), f"{where}: kv_cache"),
    )


def _spelled(recipe: Recipe) -> dict[str, Any]:
    """What a file with this recipe says; of patterns that are there twice the last one decides."""
    pairs = recipe.layers
    return {
        "why": recipe.why,
        "scheme": _named(recipe.budget) if recipe.budget else recipe.scheme,
        "layers": {name: scheme for place, (name, scheme) in enumerate(pairs) if name not in dict(pairs[place + 1 :])},
        "weight_range": "full" if recipe.full_range else "narrow",
        "transforms": [_named(part) for part in (*recipe.rewrites, *recipe.transforms)],
        "rounding": _named(recipe.quantizer),
        **_named(recipe.activation_range),
        "kv_cache": _named(recipe.kv_cache) if recipe.kv_cache else KEEP_FLOAT,
        **_named(recipe.calibration),
    }


def _named(part: Any) -> dict[str, Any]:
    """RoundToNearest() -> {rtn: its settings}."""
    single = {"budget": Budget, "int8": Int8Cache, "activation_range": ActivationRange, "calibration": CalibrationSettings}
    names: dict[Any, str] = {kind: name for name, kind in {**REWRITES, **TRANSFORMS, **QUANTIZERS, **single}.items()}
    name = names.get(type(part), type(part).__name__)
    return {name: {each: canonical(getattr(part, each), f"{name}.{each}") for each in setting_names(part)}}


def _kv_cache(raw: Any, where: str) -> Int8Cache | None:
    """float, int8 or {int8: {keys: head}}."""
    cache: Int8Cache | None = None if raw == KEEP_FLOAT else _build(raw, {"int8": Int8Cache}, where)
    return cache


def _scheme_or_budget(raw: Any, where: str) -> tuple[Budget | None, str]:
    """(budget, the scheme that layers start from)."""
    if not isinstance(raw, dict):
        return None, _scheme_name(raw, where)
    budget = _build(raw, {"budget": Budget}, where)
    return budget, str(budget.schemes[0])


def _scheme_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or (name != KEEP_FLOAT and name not in PRESETS):
        raise RecipeError(
            f"{where} is {name!r}{did_you_mean(str(name), [*PRESETS, KEEP_FLOAT])}; wanted one of "
            f"{', '.join([*PRESETS, KEEP_FLOAT])}"
        )
    return str(name)


def _transforms(raw: Any, where: str) -> tuple[tuple[Rewrite, ...], tuple[Transform, ...]]:
    """What is done to the checkpoint and, after it, to each block."""
    built: list[Any] = [_build(item, {**REWRITES, **TRANSFORMS}, where) for item in _sequence(raw, where)]
    names = [item if isinstance(item, str) else next(iter(item)) for item in raw]
    count = sum(name in REWRITES for name in names)
    if count > 1 or (count and names[0] not in REWRITES):
        raise RecipeError(f"{where}: rotate stands first and once; it folds the norms, and smoothing with them, away")
    for name, item in zip(names[count:], built[count:], strict=True):
        if count and built[0].online and layout.MLP_HIDDEN in item.inputs:
            raise RecipeError(
                f"{where}: rotate.online mixes the channels of {layout.MLP_HIDDEN} when the model is run, so no scale of "
                f"it can be folded into {layout.UP_PROJ.short}_proj: name the other inputs in {name}.inputs"
            )
    return tuple(built[:count]), tuple(built[count:])


def _build(item: Any, known: Mapping[str, Callable[..., Any]], where: str) -> Any:
    """ "rtn" or {smooth: {alpha: 0.5}} -> the object."""
    if isinstance(item, str):
        item = {item: {}}
    item = _mapping(item, where)
    if len(item) != 1:
        raise RecipeError(f"{where}: got {sorted(map(str, item))}, wanted one name with its settings for each entry")
    name, settings = next(iter(item.items()))
    _check_keys({name: None}, tuple(known), where)
    settings = _mapping(settings or {}, f"{where}: {name}")
    factory = known[name]
    _check_keys(settings, setting_names(factory), f"{where}: {name}")
    try:
        return factory(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {name}: {error}") from None
    except PanguQuantError as error:
        raise RecipeError(f"{where}: {error}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: got {type(value).__name__}, wanted a mapping of keys to values")
    return value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise RecipeError(f"{where}: got {type(value).__name__}, wanted a list")
    return value


def _check_keys(raw: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in allowed:
            raise RecipeError(
                f"{where}: unknown key {str(key)!r}{did_you_mean(str(key), allowed)}; known: {', '.join(allowed)}"
            )
