"""sensitivity.py: a budget is spent within what is stored, and only on the model and method that were measured."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.errors import CheckpointError, DataError, RecipeError
from ms_pangu_quant.formats.reader import FORMATS
from ms_pangu_quant.mixed.sensitivity import GroupSensitivity, Sensitivity, assigned, method_digest, split
from ms_pangu_quant.pipeline.estimate import layer_bytes
from ms_pangu_quant.recipe.parse import load_recipe
from ms_pangu_quant.recipe.scheme import W4A8, W8A8

TEXT = "scheme: {budget: {%s, schemes: [w4a8_g128, w8a8]}}\nrounding: rtn\n"
GROUPS = tuple(dict.fromkeys(site.fused for site in layout.SITES))


@pytest.fixture
def recipe(tmp_path):
    def make(limit, more=""):
        (tmp_path / "mine.yaml").write_text(TEXT % limit + more, encoding="utf-8")
        return load_recipe(tmp_path / "mine.yaml")

    return make


@pytest.fixture
def config(small_config):
    return small_config(hidden_size=2048, intermediate_size=4096, head_dim=512, num_hidden_layers=3)


def sensitivity(recipe, blocks=3, seed=0, **origin):
    """The dearer scheme has a tenth of the error, so a hundredth of the KL."""
    generator = np.random.default_rng(seed)
    groups = []
    for block in range(blocks):
        for name in GROUPS:
            error = float(generator.uniform(0.01, 0.1))
            errors = {"w4a8_g128": error, "w8a8": error / 10}
            groups.append(GroupSensitivity(block, name, errors, float(generator.lognormal(-8)), 1e-5))
    total = sum(group.kl for group in groups)
    origin = {"checkpoint": "c", "method": method_digest(recipe), "data": "d", **origin}
    return Sensitivity(("w4a8_g128", "w8a8"), tuple(groups), {"w4a8_g128": total / 2, "w8a8": total / 200}, origin)


def stored_bits(plan, config, stored_as):
    bits = sum(8 * layer_bytes(stored_as, config, site, scheme) for _, site, scheme in plan)
    shapes = [layout.site_shape(config, site) for site in layout.SITES]
    return bits / (config.num_hidden_layers * sum(outputs * inputs for outputs, inputs in shapes))


@pytest.mark.parametrize("name", ["mindformers", "ascend"])
@pytest.mark.parametrize("limit", [6.0, 7.0])
def test_the_budget_holds_for_what_is_stored(recipe, config, name, limit):
    """Scales and zero points counted: the ascend format has twelve bytes of them for every group of int4."""
    chosen, stored_as = recipe(f"bits_per_weight: {limit}"), FORMATS[name]
    made = assigned(chosen, config, sensitivity(chosen), stored_as)
    bits = stored_bits(made.plan(config), config, stored_as)
    assert bits == made.assignment.bits_per_weight <= limit
    assert {scheme.arithmetic for _, _, scheme in made.plan(config)} == {W4A8, W8A8}


def test_predictions_add_up_to_what_was_measured_together(recipe, config):
    chosen = recipe("bits_per_weight: 4.24")  # a float32 for every 128 int4 is a quarter of a bit
    with pytest.raises(RecipeError, match=r"got 4\.24, but w4a8_g128 and w8a8 give 4\.25 to 8\..* mindformers"):
        assigned(chosen, config, sensitivity(chosen), FORMATS["mindformers"])
    found = sensitivity(chosen)
    least = assigned(recipe("bits_per_weight: 4.25"), config, found, FORMATS["mindformers"]).assignment
    most = assigned(recipe("bits_per_weight: 99"), config, found, FORMATS["mindformers"]).assignment
    assert set(least.schemes.values()) == {"w4a8_g128"}
    assert least.predicted_kl == pytest.approx(found.together["w4a8_g128"])
    assert set(most.schemes.values()) == {"w8a8"}
    assert most.predicted_kl == pytest.approx(found.together["w8a8"])


def test_the_group_that_costs_most_is_raised_first_and_whole(recipe, config):
    chosen = recipe("max_kl: 1")
    found = sensitivity(chosen)
    worst = max((group for group in found.groups if group.group == "linear_qkv"), key=lambda group: group.kl)
    quiet = tuple(dataclasses.replace(group, kl=1.0 if group is worst else 1e-9) for group in found.groups)
    found = Sensitivity(found.schemes, quiet, {"w4a8_g128": sum(group.kl for group in quiet), "w8a8": 0.0}, found.origin)
    made = assigned(recipe("max_kl: 0.1"), config, found, FORMATS["mindformers"])
    assert sorted(name for name, scheme in made.assignment.schemes.items() if scheme == "w8a8") == sorted(worst.layers)


def test_layers_that_the_recipe_names_keep_what_it_says(recipe, config):
    more = 'layers: {"*.down_proj": w8a8, "*.0.self_attn.o_proj": float}\n'
    made = assigned(
        recipe("bits_per_weight: 7", more), config, sensitivity(recipe("bits_per_weight: 7")), FORMATS["ascend"]
    )
    plan = made.plan(config)
    assert all(plan.blocks[index].scheme(layout.DOWN_PROJ).arithmetic == W8A8 for index in range(3))
    assert plan.blocks[0].scheme(layout.O_PROJ) is None
    assert not [name for name in made.assignment.schemes if "down_proj" in name or "0.self_attn.o_proj" in name]
    other = recipe("bits_per_weight: 7", 'layers: {"*.down_proj": w8a8_static}\n')
    with pytest.raises(RecipeError, match="is w8a8_static; beside a budget"):
        assigned(other, config, sensitivity(other), FORMATS["ascend"])


@pytest.mark.parametrize(
    ("transforms", "dtype", "width"),
    [
        ("[]", "bfloat16", 16),
        ("[]", "float32", 32),
        ("[smooth]", "bfloat16", 32),
        ("[{smooth: {inputs: [mlp_hidden]}}]", "bfloat16", 16),
        ("[smooth_search]", "bfloat16", 16),  # it leaves the input of a float layer alone
        ("[rotate]", "bfloat16", 32),
    ],
)
def test_a_float_layer_counts_with_the_bits_that_it_is_written_in(recipe, small_config, transforms, dtype, width):
    config = small_config(hidden_size=2048, intermediate_size=4096, head_dim=512, torch_dtype=dtype)
    more, stored_as = f'layers: {{"*.o_proj": float}}\ntransforms: {transforms}\n', FORMATS["mindformers"]
    chosen = recipe("max_kl: 99", more)
    made = assigned(chosen, config, sensitivity(chosen, blocks=2), stored_as)
    plan, bits, weights = made.plan(config), 0, 0
    for _, site, scheme in plan:
        count = math.prod(layout.site_shape(config, site))
        bits += 8 * layer_bytes(stored_as, config, site, scheme) if scheme else width * count
        weights += count
    assert made.assignment.bits_per_weight == bits / weights


def test_int4_that_is_stored_in_bytes_buys_nothing(recipe, config):
    """compressed-tensors has one int4 a byte: eight bits are smaller and lose less, so they are taken everywhere."""
    chosen, stored_as = recipe("max_kl: 1"), FORMATS["compressed-tensors"]
    made = assigned(chosen, config, sensitivity(chosen), stored_as)
    assert set(made.assignment.schemes.values()) == {"w8a8"}
    low = recipe("bits_per_weight: 5")
    with pytest.raises(RecipeError, match=r"give 8\.\S* to \S* here.*stored as compressed-tensors"):
        assigned(low, config, sensitivity(low), stored_as)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: dataclasses.replace(found, schemes=("w4a8_g32", "w8a8")), "the sensitivities are of w4a8_g32 and"),
        (lambda found: dataclasses.replace(found, origin={**found.origin, "method": "x"}), "other transforms, rounding"),
        (lambda found: dataclasses.replace(found, groups=found.groups[4:]), "are of 14 layers, the model has 21"),
    ],
)
def test_sensitivities_of_something_else_are_refused(recipe, config, change, said):
    chosen = recipe("bits_per_weight: 7")
    with pytest.raises(RecipeError, match=said):
        assigned(chosen, config, change(sensitivity(chosen)), FORMATS["mindformers"])


def test_the_method_is_the_transforms_and_the_rounding_and_not_the_budget(recipe, tmp_path):
    one, other = recipe("bits_per_weight: 7"), recipe("max_kl: 1", "calibration: {samples: 3}\n")
    assert method_digest(one) == method_digest(other)
    spelled = "transforms: []\nactivation_range: {percentile: 99.99, method: absmax}\n"
    assert method_digest(one) == method_digest(recipe("bits_per_weight: 7", spelled))
    smooth = (recipe("max_kl: 1", f"transforms: [{each}]\n") for each in ("smooth", "{smooth: {alpha: 5.0e-1}}"))
    assert len({method_digest(each) for each in smooth}) == 1
    assert method_digest(one) != method_digest(recipe("bits_per_weight: 7", "weight_range: full\n"))
    assert method_digest(one) != method_digest(recipe("bits_per_weight: 7", "transforms: [smooth]\n"))


def test_a_budget_alone_is_no_plan_and_its_assignment_changes_the_digest(recipe, config):
    chosen = recipe("bits_per_weight: 7")
    with pytest.raises(RecipeError, match="which layers it raises follows from sensitivities"):
        chosen.plan(config)
    one, other = (assigned(chosen, config, sensitivity(chosen, seed=seed), FORMATS["mindformers"]) for seed in (0, 1))
    assert len({chosen.digest, one.digest, other.digest}) == 3


def test_what_is_saved_is_read_back(recipe, tmp_path):
    found = sensitivity(recipe("max_kl: 1"))
    found.save(tmp_path / "found.json")
    again = Sensitivity.load(tmp_path / "found.json")
    assert again == found
    assert again.sha256 == found.sha256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(version=1), "is version 1 of the format, wanted 3"),
        (lambda raw: raw.pop("groups"), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["groups"][0].pop("kl"), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["groups"][0].update(kl="much"), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["groups"][3]["output_error"].pop("w8a8"), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["together"].clear(), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw.update(schemes=["w8a8"]), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw.pop("origin"), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["groups"][1].update(kl=float("nan")), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["groups"][1].update(block="first"), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["together"].update(w8a8=-1.0), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["groups"].clear(), "is not what `pangu-quant sensitivity` writes"),
        (lambda raw: raw["origin"].pop("checkpoint"), "is not what `pangu-quant sensitivity` writes"),
    ],
)
def test_a_damaged_file_is_named(recipe, tmp_path, change, said):
    sensitivity(recipe("max_kl: 1")).save(tmp_path / "found.json")
    raw = json.loads((tmp_path / "found.json").read_text())
    change(raw)
    (tmp_path / "found.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=said) as caught:
        Sensitivity.load(tmp_path / "found.json")
    assert str(tmp_path / "found.json") in str(caught.value)


def test_the_last_texts_are_measured_on_and_the_others_known():
    sequences = tuple(np.arange(length, dtype=np.int32) for length in (5, 7, 3, 4))
    data = TokenData(sequences, sha256="", truncated=0)
    assert [list(map(len, part)) for part in split(data, 4)] == [[5, 7, 3], [4]]
    assert [list(map(len, part)) for part in split(data, 5)] == [[5, 7], [3, 4]]
    with pytest.raises(DataError, match="has 19 tokens in 4 texts, and 15 of them are to be measured on"):
        split(data, 15)
