"""Reads recipes: YAML -> Recipe. An unknown key is an error with a suggestion, and so is a value of the wrong kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.errors import PanguQuantError, RecipeError
from ms_pangu_quant.mixed.budget import Budget
from ms_pangu_quant.quantizers.activation import ActivationRange
from ms_pangu_quant.quantizers.gptq import Gptq
from ms_pangu_quant.quantizers.kv_cache import Int8Cache
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.quantizers.signround import SignRound
from ms_pangu_quant.recipe.recipe import (
    KEEP_FLOAT,
    CalibrationSettings,
    Recipe,
    Rewrite,
    Transform,
    TransformChoice,
    WeightQuantizer,
)
from ms_pangu_quant.recipe.scheme import PRESETS
from ms_pangu_quant.recipe.settings import canonical, setting_names
from ms_pangu_quant.suggestion import did_you_mean, did_you_mean_path
from ms_pangu_quant.transforms.rotate import REWRITES
from ms_pangu_quant.transforms.smooth import SmoothQuant
from ms_pangu_quant.transforms.smooth_search import SmoothSearch

TRANSFORMS: dict[str, Callable[..., Transform]] = {"smooth": SmoothQuant, "smooth_search": SmoothSearch}
QUANTIZERS: dict[str, Callable[..., WeightQuantizer]] = {
    "rtn": RoundToNearest,
    "gptq": Gptq,
    "signround": SignRound,
}
AUTO = (("smooth_search",), ("rotate", "smooth_search"))  # what `transforms: auto` is decided between
_KEYS = ("why", "scheme", "layers", "weight_range", "transforms", "rounding", "activation_range", "kv_cache", "calibration")
_PACKAGE = Path(__file__).parent.parent
_RECIPE_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


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
        text = path.read_text(encoding="utf-8-sig")
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
    cache = raw.get("kv_cache", KEEP_FLOAT)  # or int8, or {int8: {keys: head}}
    asked, choices = raw.get("transforms") or [], tuple[TransformChoice, ...]()
    if asked == "auto":
        asked, choices = [], tuple(TransformChoice(", ".join(names), *_transforms([*names], where)) for names in AUTO)
    rewrites, transforms = _transforms(asked, f"{where}: transforms")
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
        kv_cache=None if cache == KEEP_FLOAT else _build(cache, {"int8": Int8Cache}, f"{where}: kv_cache"),
        choices=choices,
    )


def text_of(recipe: Recipe) -> str:
    """The text a recipe was read from; of one that was changed since, another that says what it is now.

    A part that no file can name has its type's name there.
    """
    wanted = dataclasses.replace(recipe, assignment=None).digest
    try:
        if parse_recipe(recipe.text, recipe.where).digest == wanted:
            return recipe.text
    except RecipeError:  # it has none
        pass
    return yaml.safe_dump(_spelled(recipe), sort_keys=False, allow_unicode=True)


def _spelled(recipe: Recipe) -> dict[str, Any]:
    """What a file with this recipe says; of patterns that are there twice the last one decides."""
    pairs = recipe.layers
    return {
        "why": recipe.why,
        "scheme": _named(recipe.budget) if recipe.budget else recipe.scheme,
        "layers": {name: scheme for place, (name, scheme) in enumerate(pairs) if name not in dict(pairs[place + 1 :])},
        "weight_range": "full" if recipe.full_range else "narrow",
        "transforms": "auto" if recipe.choices else [_named(part) for part in (*recipe.rewrites, *recipe.transforms)],
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
    if not isinstance(raw, list):
        raise RecipeError(f"{where}: got {raw!r}, wanted a list, or auto")
    built: list[Any] = [_build(item, {**REWRITES, **TRANSFORMS}, where) for item in raw]
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


def _check_keys(raw: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in allowed:
            raise RecipeError(
                f"{where}: unknown key {str(key)!r}{did_you_mean(str(key), allowed)}; known: {', '.join(allowed)}"
            )
