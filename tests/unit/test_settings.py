"""settings.py: whatever a recipe file can fill refuses what is not of the type that it says, in a file and in a program."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import pytest

from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.mixed.budget import Budget
from ms_pangu_quant.quantizers.activation import ActivationRange
from ms_pangu_quant.quantizers.gptq import Gptq
from ms_pangu_quant.quantizers.kv_cache import Int8Cache
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.parse import parse_recipe
from ms_pangu_quant.recipe.recipe import CalibrationSettings
from ms_pangu_quant.recipe.settings import check_types
from ms_pangu_quant.transforms.rotate import Rotate
from ms_pangu_quant.transforms.smooth import SmoothQuant
from ms_pangu_quant.transforms.smooth_search import SmoothSearch

SETTINGS = {
    "rtn": RoundToNearest,
    "gptq": Gptq,
    "activation_range": ActivationRange,
    "int8": Int8Cache,
    "smooth": SmoothQuant,
    "smooth_search": SmoothSearch,
    "rotate": Rotate,
    "budget": Budget,
    "calibration": CalibrationSettings,
}
NEEDED = {"budget": {"bits_per_weight": 6}}
FIELDS = [
    (name, field)
    for name, kind in SETTINGS.items()
    for field in dataclasses.fields(kind)
    if not field.name.startswith("needs_")
]
VALUES = ["false", "", True, 1, 0.5, math.nan, math.inf, -math.inf, 10**400, None, {}, {"a": 1}, [1], ["mlp_input", None]]
OF_TYPE = {  # by the annotation as it is written; what is not here is one of some names, and none of VALUES is
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float) and abs(value) < 1e300,
    "float | Literal['auto']": lambda value: OF_TYPE["float"](value),
    "int | None": lambda value: value is None or OF_TYPE["int"](value),
    "float | None": lambda value: value is None or OF_TYPE["float"](value),
}


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=[f"{name}.{field.name}" for name, field in FIELDS])
def test_a_value_of_another_type_is_refused_by_the_name_of_its_setting(name, field):
    fits = OF_TYPE.get(field.type, lambda value: False)
    wrong = [value for value in VALUES if not fits(value)]
    assert len(wrong) >= 8
    for value in wrong:
        with pytest.raises(RecipeError) as raised:
            SETTINGS[name](**{**NEEDED.get(name, {}), field.name: value})
        said = str(raised.value)
        assert said.startswith(f"{name}.{field.name}: got {repr(value)[:20]}"), said
        assert ", wanted " in said
        assert "\n" not in said


@pytest.mark.parametrize("name", SETTINGS)
def test_every_default_is_of_its_type_and_a_value_of_the_type_is_taken(name):
    made = SETTINGS[name](**NEEDED.get(name, {}))
    for field in dataclasses.fields(made):
        if not field.name.startswith("needs_"):
            assert dataclasses.replace(made, **{field.name: getattr(made, field.name)}) == made
            if field.type == "bool" and field.name != "weighted":
                assert dataclasses.replace(made, **{field.name: True}) != dataclasses.replace(made, **{field.name: False})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounding: {gptq: {act_order: 'false'}}", "rounding: gptq.act_order: got 'false', wanted true or false"),
        ("rounding: {gptq: {damping: true}}", "rounding: gptq.damping: got True, wanted a number or auto"),
        ("rounding: {gptq: {damping: .nan}}", "rounding: gptq.damping: got nan, wanted a number or auto"),
        ("rounding: {rtn: {scale: mse, weighted: 'no'}}", "rounding: rtn.weighted: got 'no', wanted true or false"),
        ("activation_range: {percentile: true}", "activation_range.percentile: got True, wanted a number"),
        ("transforms: [{smooth: {inputs: mlp_input}}]", "smooth.inputs: got 'mlp_input', wanted a list of names"),
        ("transforms: [{rotate: {kind: [hadamard]}}]", "rotate.kind: got ['hadamard'], wanted hadamard or orthogonal"),
        ("calibration: {seed: 1.0}", "calibration.seed: got 1.0, wanted a whole number"),
    ],
)
def test_a_recipe_file_is_told_where_and_what(text, said):
    with pytest.raises(RecipeError) as raised:
        parse_recipe(f"scheme: w8a8\n{text}\n", "mine.yaml")
    assert str(raised.value).startswith("mine.yaml: ")
    assert str(raised.value).endswith(said)


@dataclasses.dataclass(frozen=True)
class Mine:
    """An algorithm's settings, as someone may add them; the annotations here are types, not text."""

    sizes: tuple[int, ...] = (1,)
    limit: float | None = None
    mode: Literal["one", "two", "three"] = "one"
    names: Sequence[str] = ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sizes": (1, 2.5)}, "mine.sizes: got (1, 2.5), wanted a list of whole numbers"),
        ({"limit": "1"}, "mine.limit: got '1', wanted a number"),
        ({"mode": "four"}, "mine.mode: got 'four', wanted one, two or three"),
        ({"names": "abc"}, "mine.names: got 'abc', wanted a list of names"),
    ],
)
def test_annotations_of_every_kind_are_understood(values, said):
    check_types(Mine(), "mine")
    check_types(Mine(sizes=[1, 2], limit=3, mode="two", names=["a"]), "mine")
    with pytest.raises(RecipeError) as raised:
        check_types(Mine(**values), "mine")
    assert str(raised.value) == said


def test_an_annotation_that_cannot_be_checked_is_an_error_of_the_program():
    made = dataclasses.make_dataclass("Odd", [("table", dict[str, int], None)])()
    with pytest.raises(TypeError, match=r"dict\[str, int\]: no type of a setting"):
        check_types(made, "odd")
