"""recipe/: the shipped recipes plan for every model, and whatever is wrong with a recipe is named."""

import dataclasses
import math

import pytest
import yaml

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.mixed.budget import Budget
from ms_pangu_quant.quantizers.activation import ActivationRange
from ms_pangu_quant.quantizers.kv_cache import Int8Cache
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe, text_of
from ms_pangu_quant.recipe.recipe import CalibrationSettings
from ms_pangu_quant.recipe.scheme import PRESETS
from ms_pangu_quant.transforms.rotate import Rotate
from ms_pangu_quant.transforms.smooth import SmoothQuant
from ms_pangu_quant.transforms.smooth_search import SmoothSearch

PAPER = ["paper_w4a8", "paper_w4a8_hadamard", "paper_w4a8_smooth", "paper_w8a8"]
OURS = [
    "kv8",
    "w4a8",
    "w4a8_g128",
    "w4a8_g128_rtn",
    "w4a8_g256",
    "w4a8_g64",
    "w4a8_online",
    "w4a8_rtn",
    "w8a8",
    "w8a8_kv8",
    "w8a8_online",
    "w8a8_rtn",
    "w8a8_static",
]
SHIPPED = [*PAPER, *OURS]
BUDGETS = ["w4a8_mixed"]  # no plan without sensitivities: tests/e2e/test_sensitivity.py
WITHOUT_DATA = ["paper_w4a8", "paper_w4a8_hadamard", "paper_w8a8", "w4a8_g128_rtn", "w4a8_rtn", "w8a8_rtn"]
EVERYTHING = """\
why: every key there is
scheme: w4a8_g64
layers:
  "*.down_proj": w8a8
  "*layers.0.*": float
weight_range: full
transforms:
  - smooth: {alpha: 0.8, inputs: [mlp_input, mlp_hidden]}
rounding: rtn
kv_cache: {int8: {keys: head, symmetric: false, method: mse}}
calibration: {samples: 7, max_length: 33, seed: 5}
"""


@pytest.fixture
def recipe(tmp_path):
    """Text of a recipe -> Recipe."""

    def make(text, name="mine.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / name)

    return make


@pytest.fixture(scope="module")
def models(checkpoint_tool, mini):
    """The sizes the shipped recipes are for."""
    sizes = {shape: ModelConfig.from_dict(checkpoint_tool.make_config(shape), where=shape) for shape in ("1b", "7b")}
    return {**sizes, "mini": ModelConfig.from_file(mini / "config.json")}


def schemes_of(plan):
    """(block, site name) -> scheme."""
    return {(index, name): scheme for index, block in enumerate(plan.blocks) for name, scheme in block.by_name.items()}


def words(plan):
    return {key: word_of(scheme) for key, scheme in schemes_of(plan).items()}


def test_the_shipped_recipes_are_those_tested_here(root):
    assert sorted(path.stem for path in (root / "configs").glob("*.yaml")) == sorted([*SHIPPED, *BUDGETS])


@pytest.mark.parametrize("name", BUDGETS)
def test_a_shipped_budget_says_why_and_what_its_cheaper_scheme_is(root, models, name):
    loaded = load_recipe(root / f"configs/{name}.yaml")
    assert loaded.why
    assert loaded.needs_calibration
    assert loaded.scheme == loaded.budget.schemes[0] == "w4a8_g128"
    for scheme in loaded.budget.schemes:
        assert all(len(list(loaded.uniform(scheme).plan(config))) for config in models.values())


@pytest.mark.parametrize("model", ["mini", "1b", "7b"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_plans_every_layer_of_every_model(root, models, name, model):
    loaded, config = load_recipe(root / f"configs/{name}.yaml"), models[model]
    plan = loaded.plan(config)
    blocks = range(config.num_hidden_layers)
    assert set(schemes_of(plan)) == {(index, site.name) for index in blocks for site in layout.SITES}
    other = {"w8a8_static": "W8A8", "kv8": "FLOAT"}
    wanted = "W4A8_DYNAMIC" if "w4a8" in name else other.get(name, "W8A8_DYNAMIC")
    assert (loaded.kv_cache is not None) == ("kv8" in name)
    assert set(words(plan).values()) == {wanted}
    assert plan.group_size == next((size for size in (64, 128, 256) if f"g{size}" in name), 0)
    assert loaded.why
    assert loaded.needs_calibration == (name not in WITHOUT_DATA)
    assert loaded.full_range == (name in PAPER or (name.startswith("w4a8") and "rtn" not in name))
    assert len((root / f"configs/{name}.yaml").read_text().splitlines()) <= 25


@pytest.mark.parametrize("model", ["mini", "1b", "7b"])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("weight_range", ["narrow", "full"])
def test_every_preset_fits_every_model(recipe, models, name, model, weight_range):
    plan = recipe(f"scheme: {name}\nweight_range: {weight_range}").plan(models[model])
    assert set(schemes_of(plan).values()) == {PRESETS[name].with_range(full_range=weight_range == "full")}


def test_every_key_arrives_where_it_belongs(recipe, models):
    made = recipe(EVERYTHING)
    assert made.why == "every key there is"
    assert made.full_range
    assert made.transforms == (SmoothQuant(0.8, ["mlp_input", "mlp_hidden"]),)
    assert made.quantizer == RoundToNearest()
    assert made.kv_cache == Int8Cache(keys="head", symmetric=False, method="mse")
    assert made.calibration == CalibrationSettings(7, 33, 5)
    assert made.where.endswith("mine.yaml")
    found = words(plan := made.plan(models["1b"]))
    assert plan.group_size == 64
    for (index, name), word in found.items():
        wanted = "FLOAT" if index == 0 else "W8A8_DYNAMIC" if name == "mlp.down_proj" else "W4A8_DYNAMIC"
        assert word == wanted, (index, name)
    assert plan.blocks[0].scheme(layout.DOWN_PROJ) is None
    assert plan.blocks[1].scheme(layout.DOWN_PROJ) == PRESETS["w8a8"].with_range(full_range=True)


@pytest.mark.parametrize(
    ("text", "gram", "rows"),
    [
        ("scheme: w8a8", False, 0),
        ("scheme: w8a8\ntransforms: [smooth_search]", False, 512),
        ("scheme: w8a8\nrounding: gptq", True, 0),
        ("scheme: w8a8\nrounding: {gptq: {correct: true}}", False, 0),  # it sees each input alone, later
        ("scheme: w8a8_static\nactivation_range: {method: mse}", False, 512),
        ("scheme: w8a8\nactivation_range: {method: mse}", False, 0),
    ],
)
def test_only_what_is_used_is_observed(recipe, text, gram, rows):
    made = recipe(text)
    assert (made.observed.gram, made.observed.rows) == (gram, rows)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / f"{name}.yaml").write_bytes(mark + b"scheme: w8a8\n")
    plain, marked = (load_recipe(tmp_path / f"{name}.yaml") for name in ("plain", "marked"))
    assert dataclasses.replace(marked, where=plain.where) == plain


def test_a_recipe_of_one_line_has_the_documented_defaults(recipe):
    made = recipe("scheme: w8a8")
    assert (made.why, made.layers, made.transforms, made.full_range) == ("", (), (), False)
    assert made.quantizer == RoundToNearest()
    assert made.calibration == CalibrationSettings(samples=128, max_length=512, seed=0)


def test_the_last_pattern_that_matches_a_layer_decides(recipe, models):
    layers = {"*.mlp.*": "w8a8", "*layers.1.*": "float", "*layers.1.mlp.down_proj": "w4a8"}
    found = words(recipe(yaml.safe_dump({"scheme": "w4a8", "layers": layers}, sort_keys=False)).plan(models["mini"]))
    assert found[0, "mlp.down_proj"] == "W8A8_DYNAMIC"
    assert found[1, "mlp.down_proj"] == "W4A8_DYNAMIC"
    assert found[1, "mlp.up_proj"] == "FLOAT"
    assert found[1, "self_attn.o_proj"] == "FLOAT"
    assert found[2, "self_attn.o_proj"] == "W4A8_DYNAMIC"


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("scheme: w8a8", False),
        ("scheme: w4a8_g32", False),
        ("scheme: float", False),
        ("scheme: w8a8_static", True),
        ("scheme: w8a8\nlayers: {'*.o_proj': w8a8_static}", True),
        ("scheme: w8a8\nlayers: {'*.o_proj': float}", False),
        ("scheme: w8a8\ntransforms: [smooth]", True),
        ("scheme: w8a8\ntransforms: [rotate]", False),
        ("scheme: w8a8\nrounding: gptq", True),
        ("scheme: w8a8\nrounding: {rtn: {scale: mse}}", False),
        ("scheme: w8a8\nrounding: {rtn: {scale: mse, weighted: true}}", True),
    ],
)
def test_calibration_is_needed_by_transforms_and_static_activations_alone(recipe, text, needed):
    assert recipe(text).needs_calibration is needed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scheme: w8a8\nroundin: rtn", r"unknown key 'roundin' \(did you mean 'rounding'\?\)"),
        ("scheme: w8a8\ncalibration: {sample: 3}", r"calibration: unknown key 'sample' \(did you mean 'samples'\?\)"),
        ("scheme: w8a8\ntransforms: [{smoth: {}}]", r"transforms: unknown key 'smoth' \(did you mean 'smooth'\?\)"),
        ("scheme: w8a8\ntransforms: [{smooth: {aplha: 0.5}}]", r"smooth: unknown key 'aplha' \(did you mean 'alpha'\?\)"),
        ("scheme: w8a8\ntransforms: [{smooth: {needs: {gram: true}}}]", r"smooth: unknown key 'needs'"),
        ("scheme: w8a8\ntransforms: [smooth, rotate]", r"transforms: rotate stands first and once"),
        ("scheme: w8a8\ntransforms: [rotate, {rotate: {seed: 1}}]", r"transforms: rotate stands first and once"),
        ("scheme: w8a8\ntransforms: [{rotate: {sed: 1}}]", r"rotate: unknown key 'sed' \(did you mean 'seed'\?\)"),
        ("scheme: w8a8\ntransforms: [{smooth_search: {inputs: [x]}}]", r"transforms: smooth_search.inputs: got"),
        ("scheme: w8a8\nrounding: {gptq: {damp: 1}}", r"gptq: unknown key 'damp' \(did you mean 'damping'\?\)"),
        ("scheme: w8a8\nrounding: {gptq: {scale: max}}", r"rounding: gptq.scale: got 'max'"),
        ("scheme: w8a8\nrounding: {rtn: {weighted: true}}", r"rounding: rtn.weighted: is for scale: mse"),
        ("scheme: w8a8_static\nactivation_range: {methd: mse}", r"unknown key 'methd' \(did you mean 'method'\?\)"),
        ("scheme: w8a8_static\nactivation_range: mse", r"activation_range.*wanted a mapping"),
        ("scheme: w8a8\nrounding: rtnn", r"rounding: unknown key 'rtnn' \(did you mean 'rtn'\?\)"),
        ("scheme: w8a8\nrounding: {rtn: {bits: 4}}", r"rounding: rtn: unknown key 'bits'"),
        ("scheme: w8a8\n5: 6", r"unknown key '5'; known: why, scheme"),
        ("scheme: w8a", r"scheme is 'w8a' \(did you mean 'w8a8'\?\); wanted one of w8a8, .*float"),
        ("scheme: w8a8\nlayers: {'*': flaot}", r"layers: \* is 'flaot' \(did you mean 'float'\?\)"),
        ("scheme: 8", r"scheme is 8; wanted one of"),
        ("scheme: [w8a8]", r"scheme is \['w8a8'\]"),
        ("scheme: w8a8\nlayers: {'*': {a: b}}", r"layers: \* is \{'a': 'b'\}"),
        ("scheme:", r"scheme is None"),
        ("why: nothing", r"scheme is missing; wanted one of w8a8"),
        ("", r"got NoneType, wanted a mapping"),
        ("- scheme", r"got list, wanted a mapping"),
        ("scheme: w8a8\nlayers: [a]", r"layers: got list, wanted a mapping"),
        ("scheme: w8a8\ntransforms: {smooth: {}}", r"transforms: got {.smooth.: {}}, wanted a list, or auto"),
        ("scheme: w8a8\ntransforms: [{smooth: {}, rotate: {}}]", r"transforms: got \['rotate', 'smooth'\], wanted one"),
        ("scheme: w8a8\ntransforms: [{smooth: 3}]", r"smooth: got int, wanted a mapping"),
        ("scheme: w8a8\ntransforms: [7]", r"transforms: got int"),
        ("scheme: w8a8\ntransforms: [{smooth: {alpha: 2}}]", r"transforms: smooth\.alpha: got 2, wanted a number from 0"),
        ("scheme: w8a8\ntransforms: [{smooth: {alpha: high}}]", r"transforms: smooth\.alpha: got 'high', wanted a number"),
        ("scheme: w8a8\ntransforms: [{smooth: {inputs: [mlp]}}]", r"smooth\.inputs: got \['mlp'\], wanted some of"),
        ("scheme: w8a8\ntransforms: [{smooth: {inputs: 5}}]", r"transforms: smooth\.inputs: got 5, wanted a list of names"),
        ("scheme: w8a8\nrounding:", r"rounding: got NoneType"),
        ("scheme: w8a8\nweight_range: wide", r"weight_range is 'wide', wanted narrow .*127\.5"),
        ("scheme: w8a8\nweight_range: [full]", r"weight_range is \['full'\], wanted narrow"),
        ("scheme: w8a8\ncalibration: {samples: 0}", r"calibration\.samples: got 0, wanted a whole number of at least 1"),
        ("scheme: w8a8\ncalibration: {samples: 1.5}", r"calibration\.samples: got 1\.5, wanted a whole number"),
        ("scheme: w8a8\ncalibration: {samples: true}", r"calibration\.samples: got True, wanted a whole number"),
        ("scheme: w8a8\ncalibration: {max_length: many}", r"calibration\.max_length: got 'many', wanted a whole number"),
        ("scheme: w8a8\ncalibration: {seed: -1}", r"calibration\.seed: got -1, wanted a whole number of at least 0"),
        ("scheme: [w8a8", r"not readable as YAML"),
        ("scheme: !!python/object/apply:os.getcwd []", r"not readable as YAML"),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_names_file_and_key(recipe, text, said):
    with pytest.raises(RecipeError, match=said) as raised:
        recipe(text)
    assert "mine.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("why: Größe\nscheme: w8a8".encode("latin-1"))
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(RecipeError, match=f"^{path}: not readable"):
            load_recipe(path)


def test_a_pattern_that_matches_no_layer_is_refused_with_an_example_of_a_layer(recipe, models):
    made = recipe("scheme: w8a8\nlayers:\n  '*.o_proj': float\n  '*.lm_head': float")
    with pytest.raises(
        RecipeError,
        match=r"mine\.yaml: layers: pattern '\*\.lm_head' matches no layer.*"
        r"model\.layers\.0\.self_attn\.q_proj",
    ):
        made.plan(models["mini"])
    beyond = recipe("scheme: w8a8\nlayers: {'model.layers.4.*': float}")
    beyond.plan(models["1b"])
    with pytest.raises(RecipeError, match=r"matches no layer"):
        beyond.plan(models["mini"])  # has layers 0 to 3


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("*.q_proj", ("block 0", "q_proj: float", "k_proj: w8a8", "v_proj: w8a8")),
        ("*.2.self_attn.v_proj", ("block 2", "q_proj: w8a8", "v_proj: float")),
        ("*.gate_proj", ("block 0", "gate_proj: float", "up_proj: w8a8")),
    ],
)
def test_layers_that_are_computed_as_one_must_have_one_scheme(recipe, models, pattern, parts):
    with pytest.raises(RecipeError, match="one layer") as raised:
        recipe(f"scheme: w8a8\nlayers: {{'{pattern}': float}}").plan(models["mini"])
    assert all(part in str(raised.value) for part in (*parts, "mine.yaml"))


def test_the_schemes_of_single_layers_are_free(recipe, models):
    found = words(recipe("scheme: w4a8\nlayers: {'*.o_proj': float, '*.down_proj': w8a8_static}").plan(models["mini"]))
    int4 = "W4A8_DYNAMIC"
    assert [found[3, site.name] for site in layout.SITES] == [int4, int4, int4, "FLOAT", int4, int4, "W8A8"]


def test_a_group_size_that_does_not_divide_is_refused_naming_recipe_and_layer(recipe, small_config):
    config = small_config(hidden_size=128, intermediate_size=192)
    with pytest.raises(RecipeError, match="128 does not divide the 192 inputs") as raised:
        recipe("scheme: w4a8_g128\nlayers: {'*.o_proj': float}").plan(config)
    assert "mine.yaml" in str(raised.value)
    assert "mlp.down_proj" in str(raised.value)


def test_a_layer_kept_float_may_have_any_size(recipe, small_config):
    config = small_config(hidden_size=128, intermediate_size=191)
    layers = "{'*.o_proj': float, '*.gate_proj': float, '*.up_proj': float, '*.down_proj': float}"
    plan = recipe(f"scheme: w4a8_g128\nlayers: {layers}").plan(config)
    assert plan.group_size == 128


@pytest.mark.parametrize(("other", "sizes"), [("w4a8", r"\[0, 128\]"), ("w4a8_g32", r"\[32, 128\]")])
def test_int4_group_sizes_cannot_be_mixed(recipe, models, other, sizes):
    with pytest.raises(RecipeError, match=rf"mine\.yaml: int4 group sizes {sizes} .*are mixed"):
        recipe(f"scheme: w4a8_g128\nlayers: {{'*.down_proj': {other}}}").plan(models["mini"])
    plan = recipe("scheme: w4a8_g128\nlayers: {'*.down_proj': w8a8, '*.o_proj': float}").plan(models["mini"])
    assert plan.group_size == 128


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"intermediate_size": 41}, "mlp.gate_proj"),
        ({"hidden_size": 25}, "self_attn.q_proj"),
    ],
)
def test_int4_needs_even_sizes_and_int8_does_not(recipe, small_config, changes, name):
    with pytest.raises(RecipeError, match=rf"mine\.yaml: {name} is \[\d+, \d+\]; int4 .*even sizes"):
        recipe("scheme: w4a8").plan(small_config(**changes))
    recipe("scheme: w8a8").plan(small_config(**changes))


def test_the_digest_ignores_comments_order_of_keys_and_the_why_line(recipe):
    lines = EVERYTHING.replace("every key there is", "another reason").splitlines(keepends=True)
    blocks = "".join(lines[:2]), "".join(lines[2:5]), "".join(lines[5:])
    wanted = recipe(EVERYTHING).digest
    assert recipe("# a comment\n" + "".join(reversed(blocks)) + "\n# the end").digest == wanted
    assert recipe(EVERYTHING.split("\n", 1)[1]).digest == wanted
    assert recipe(EVERYTHING, name="moved.yaml").digest == wanted
    assert len(wanted) == 64


def test_the_digest_changes_with_anything_else(recipe):
    changes = [
        ("w4a8_g64", "w4a8_g32"),
        (": w8a8", ": float"),
        ("layers.0", "layers.1"),
        ("full", "narrow"),
        ("0.8", "0.7"),
        ("mlp_input, ", ""),
        ("samples: 7", "samples: 8"),
        ("33", "34"),
        ("seed: 5", "seed: 6"),
        ("rounding: rtn", "rounding: gptq"),
        ("keys: head, ", ""),
    ]
    digests = [recipe(EVERYTHING.replace(old, new, 1)).digest for old, new in changes]
    assert all(EVERYTHING.count(old) for old, _ in changes)
    assert len({recipe(EVERYTHING).digest, *digests}) == len(changes) + 1


def test_the_digest_is_of_what_is_meant_and_not_of_how_it_is_spelled(recipe):
    short = "scheme: w8a8\ntransforms: [smooth]\nrounding: gptq\n"
    spelled = """\
        calibration: {seed: 0, samples: 128}
        rounding: {gptq: {act_order: true, sweeps: 0, damping: 1.0e-2}}
        transforms: [{smooth: {alpha: 0.5, inputs: [attention_input, attention_output, mlp_input, mlp_hidden]}}]
        kv_cache: float
        weight_range: narrow
        layers: {}
        scheme: w8a8
        """
    assert recipe(short).digest == recipe(spelled).digest
    one, same = (recipe(f"scheme: w8a8\ntransforms: [{{smooth: {{alpha: {alpha}}}}}]") for alpha in ("1", "1.0"))
    assert one.digest == same.digest


CHANGES = [  # of EVERYTHING, each to a recipe of its own
    {"quantizer": RoundToNearest("mse")},
    {"transforms": (SmoothSearch(inputs=("mlp_hidden",)),)},
    {"rewrites": (Rotate(seed=3),)},
    {"activation_range": ActivationRange("mse")},
    {"calibration": CalibrationSettings(1, 2, 3)},
    {"full_range": False},
    {"scheme": "w4a8_g32"},
    {"layers": (("*layers.0.*", "float"), ("*.down_proj", "w8a8"))},
    {"kv_cache": None},
    {"scheme": "w4a8_g128", "budget": Budget(max_kl=1.0)},
]


def test_a_recipe_changed_in_a_program_has_another_digest_and_a_text_that_says_what_it_is_now(recipe):
    """The report keeps the text, and a later check of the weights goes by it."""
    made = recipe(EVERYTHING)
    changed = [dataclasses.replace(made, **change) for change in CHANGES]
    assert len({made.digest, *(each.digest for each in changed)}) == len(CHANGES) + 1
    for each in changed:
        again = recipe(text_of(each))
        assert (again.digest, again.why) == (each.digest, made.why)


def test_of_a_pattern_that_a_program_gave_twice_the_last_one_is_in_the_text(recipe, models):
    layers = (("*.0.*", "float"), ("*.down_proj", "w8a8"), ("*.0.*", "w4a8"))
    made = dataclasses.replace(recipe("scheme: w4a8"), layers=layers)
    assert recipe(text_of(made)).plan(models["mini"]) == made.plan(models["mini"])


def test_a_recipe_as_it_was_read_has_the_text_that_was_read(recipe):
    made = recipe(f"# mine\n{EVERYTHING}")
    assert text_of(made) == f"# mine\n{EVERYTHING}"
    assert text_of(dataclasses.replace(made, quantizer=RoundToNearest())) == made.text


@dataclasses.dataclass(frozen=True)
class Halved(RoundToNearest):
    """A program's own rounding; no file can name it."""


def test_a_part_of_a_programs_own_is_told_by_its_type(recipe):
    made = dataclasses.replace(recipe("scheme: w8a8"), quantizer=Halved())
    assert made.digest != recipe("scheme: w8a8").digest
    assert "Halved" in yaml.safe_load(text_of(made))["rounding"]


def test_a_part_whose_fields_do_not_tell_it_from_another_is_refused(recipe):
    made = dataclasses.replace(recipe("scheme: w8a8"), quantizer=lambda weight, scheme, stats: None)
    with pytest.raises(RecipeError, match=r"^recipe\.quantizer: got a function, wanted a dataclass of plain values"):
        _ = made.digest


def test_the_digest_changes_with_the_order_of_patterns(recipe, models):
    """The last pattern that matches decides, so their order is part of what a recipe says."""
    one, other = (
        recipe(f"scheme: w4a8\nlayers:\n{first}\n{second}")
        for first, second in (
            ("  '*layers.1.*': float", "  '*.down_proj': w8a8"),
            ("  '*.down_proj': w8a8", "  '*layers.1.*': float"),
        )
    )
    assert words(one.plan(models["mini"])) != words(other.plan(models["mini"]))
    assert one.digest != other.digest


@pytest.mark.parametrize("name", ["w8a8", "w8a8.yaml", "configs/w8a8.yaml"])
def test_a_shipped_recipe_is_found_by_name_from_anywhere(root, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found = find_recipe(name)
    assert found.read_text() == (root / "configs/w8a8.yaml").read_text()


def test_a_recipe_is_found_by_path_before_a_shipped_one_of_its_name(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w8a8.yaml").write_text("scheme: w4a8")
    (tmp_path / "my.recipe").write_text("scheme: w4a8")
    assert load_recipe(find_recipe("w8a8.yaml")).scheme == "w4a8"
    assert load_recipe(find_recipe("w8a8")).scheme == "w8a8"
    assert load_recipe(find_recipe(str(tmp_path / "my.recipe"))).scheme == "w4a8"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w8a8_statik", r"^w8a8_statik: no such file \(did you mean 'w8a8_static'\?\); shipped recipes: .*w4a8, "),
        ("elsewhere/w8a8.yaml", r"^elsewhere/w8a8\.yaml: no such file"),
        ("w8a8.json", r"^w8a8\.json: no such file"),
        ("", r"no such file"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused_with_a_list_of_those_that_do(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=said) as raised:
        find_recipe(name)
    assert all(shipped in str(raised.value) for shipped in SHIPPED)


def test_int4_shares_of_the_real_models_are_what_the_docs_promise(recipe, models):
    """4.25 bits per weight with groups of 128, for every layer of the 7B model."""
    plan = recipe("scheme: w4a8_g128").plan(models["7b"])
    bits = weights = 0.0
    for site in layout.SITES:
        outputs, inputs = layout.site_shape(models["7b"], site)
        bits += plan.blocks[0].scheme(site).bits_per_weight(inputs) * outputs * inputs
        weights += outputs * inputs
    assert math.isclose(bits / weights, 4.25)


def test_an_input_that_is_mixed_when_the_model_is_run_is_not_smoothed(recipe):
    rotated = "scheme: w4a8\ntransforms:\n  - rotate: {online: true}\n  - smooth_search"
    with pytest.raises(RecipeError, match=r"rotate\.online mixes the channels of mlp_hidden.*in smooth_search\.inputs"):
        recipe(rotated)
    assert recipe(f"{rotated}: {{inputs: [attention_input, attention_output, mlp_input]}}").transforms


def test_a_cache_is_float_unless_the_recipe_says_otherwise_and_an_int8_one_needs_data(recipe):
    assert recipe("scheme: w8a8").kv_cache is None
    assert recipe("scheme: w8a8\nkv_cache: float").kv_cache is None
    alone = recipe("scheme: float\nkv_cache: int8")
    assert alone.kv_cache == Int8Cache()
    assert alone.needs_calibration
    assert not recipe("scheme: float").needs_calibration
    assert alone.digest != recipe("scheme: float").digest


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kv_cache: int4", r"kv_cache: unknown key 'int4' \(did you mean 'int8'\?\); known: int8"),
        ("kv_cache: {int8: {key: head}}", r"kv_cache: int8: unknown key 'key' \(did you mean 'keys'\?\)"),
        ("kv_cache: {int8: {keys: token}}", "kv_cache: int8.keys: got 'token', wanted channel or head"),
        ("kv_cache: 8", "kv_cache: got int, wanted a mapping"),
    ],
)
def test_a_cache_that_does_not_exist_is_named(recipe, text, told):
    with pytest.raises(RecipeError, match=told):
        recipe(f"scheme: w8a8\n{text}")


@pytest.mark.parametrize("held_out", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("samples", [1, 4, 8, 128])
def test_texts_are_held_out_beside_the_samples_or_where_there_are_too_few_as_the_same_share(samples, held_out):
    amount = CalibrationSettings(samples=samples, held_out=held_out)
    assert amount.held_out_of(amount.texts) == int(samples * held_out)
    assert amount.least is None or amount.held_out_of(amount.least) == 1 > amount.held_out_of(amount.least - 1)
    assert (amount.least is None) == (int(samples * held_out) == 0)
    for texts in range(1, amount.texts + 1):
        held = amount.held_out_of(texts)
        assert 1 <= texts - held <= samples
        assert held <= int(samples * held_out)
        assert held <= (texts - held) * max(held_out, 1e-9) + 1
    for bad in (-0.1, 1.1, "half"):
        with pytest.raises(RecipeError, match=r"calibration\.held_out: got"):
            CalibrationSettings(held_out=bad)
