"""recipe/plan.py, formats/words.py, checkpoint/block.py: plans are values that say all and come back from every format."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import CheckpointError, RecipeError, RequestError
from ms_pangu_quant.formats.reader import FORMATS
from ms_pangu_quant.formats.words import FLOAT, WORDS, scheme_of, word_of
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache, grid_of_range
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import INT8_CACHE, PRESETS

STATIC, INT8, INT4 = PRESETS["w8a8_static"], PRESETS["w8a8"], PRESETS["w4a8"]
SIZES = (0, 4, 8)  # of groups: they divide all inputs of small_config's layers, 24, 32 and 40
CACHES = st.sampled_from((None, INT8_CACHE))


def block_plans(sizes=SIZES, caches=CACHES):
    """Any scheme in any layer, int4 in groups of these sizes."""
    scheme = st.sampled_from((None, STATIC, INT8, *(INT4.grouped(size) for size in sizes)))
    return st.builds(BlockPlan, st.tuples(*[scheme] * len(layout.SITES)), caches)


def plans(blocks=(1, 4), sizes=SIZES):
    """Of so many blocks, with one kind of cache for all; half of the blocks are float altogether."""
    return CACHES.flatmap(
        lambda cache: st.lists(
            st.one_of(st.just(BlockPlan(cache=cache)), block_plans(sizes, st.just(cache))),
            min_size=blocks[0],
            max_size=blocks[1],
        ).map(lambda chosen: Plan(tuple(chosen)))
    )


def one_size(blocks):
    """Plans whose int4 layers have one group size, as a network has; per channel, 4 or 8."""
    return st.sampled_from(SIZES).flatmap(lambda size: plans((blocks, blocks), (size,)))


# --- plans ----------------------------------------------------------------------------------------------------------


@given(plans())
def test_a_plan_is_made_of_what_it_iterates_over(plan):
    layers = {name: scheme for name, _, scheme in plan}
    assert Plan.of_layers(layers, len(plan.blocks), plan.cache) == plan
    assert Plan.of_layers(dict(reversed(layers.items())), len(plan.blocks), plan.cache) == plan


@given(plan=plans())
def test_it_iterates_over_every_layer_once_block_by_block(plan, small_config):
    config = small_config(num_hidden_layers=len(plan.blocks))
    assert [name for name, _, _ in plan] == layout.layer_names(config)
    assert all(name.endswith(site.name) for name, site, _ in plan)


def test_a_layer_that_is_left_out_is_no_plan():
    layers = {name: scheme for name, _, scheme in Plan((BlockPlan(),))}
    del layers["model.layers.0.mlp.up_proj"]
    with pytest.raises(KeyError, match=r"model\.layers\.0\.mlp\.up_proj"):
        Plan.of_layers(layers, 1)


@given(block_plans())
def test_a_block_tells_the_same_of_a_layer_by_site_by_name_and_among_the_quantized(plan):
    assert list(plan.by_name) == [site.name for site in layout.SITES]
    for site in layout.SITES:
        assert plan.scheme(site) is plan.by_name[site.name]
    assert list(plan.quantized) == [(site, plan.scheme(site)) for site in layout.SITES if plan.scheme(site) is not None]


@given(plans())
def test_a_plan_is_float_where_every_layer_is_whatever_its_cache(plan):
    assert plan.is_float == all(scheme is None for _, _, scheme in plan)
    assert [block.is_float for block in plan.blocks] == [not list(block.quantized) for block in plan.blocks]
    floats = Plan(tuple(BlockPlan(cache=block.cache) for block in plan.blocks))
    assert floats.is_float
    assert floats.cache == plan.cache


@pytest.mark.parametrize("cache", [None, INT8_CACHE])
@pytest.mark.parametrize("scheme", [None, *PRESETS.values()])
def test_a_uniform_plan_has_one_scheme_in_every_layer_of_the_model(small_config, scheme, cache):
    plan = Plan.uniform(small_config(num_hidden_layers=3), scheme, cache)
    assert [found for _, _, found in plan] == [scheme] * 3 * len(layout.SITES)
    assert [block.cache for block in plan.blocks] == [cache] * 3
    assert plan.is_float == (scheme is None)
    assert not any(block.split_layers for block in plan.blocks)


@given(plans())
def test_group_sizes_are_those_of_the_int4_layers_alone(plan):
    int4 = {scheme.group_size for _, _, scheme in plan if scheme is not None and scheme.weight.bits == 4}
    assert plan.group_sizes == int4 == set().union(*(block.group_sizes for block in plan.blocks))
    if len(int4) > 1:
        with pytest.raises(RecipeError, match="are mixed; MindFormers has one group_size"):
            _ = plan.group_size
    else:
        assert plan.group_size == max(int4, default=0)


def test_what_is_not_int4_has_no_group_size_and_per_channel_is_one():
    assert Plan((BlockPlan((STATIC, INT8, None, *[INT8] * 4)),)).group_sizes == set()
    assert Plan((BlockPlan((INT4,) * 7),)).group_sizes == {0}
    assert Plan((BlockPlan((INT4,) * 7), BlockPlan((INT4.grouped(8),) * 7))).group_sizes == {0, 8}


@given(block_plans())
def test_a_fused_layer_is_split_where_its_parts_disagree(plan):
    q, k, v, _, gate, up, _ = plan.schemes
    assert bool(plan.split_layers) == (not q == k == v or gate != up)


@pytest.mark.parametrize("site", layout.SITES, ids=lambda site: site.short)
@pytest.mark.parametrize(("all_but_one", "one"), [(INT8, STATIC), (INT8, None), (None, INT4), (INT4, INT4.grouped(8))])
def test_one_layer_that_differs_splits_what_it_is_a_part_of_and_nothing_else(site, all_but_one, one):
    plan = BlockPlan(tuple(one if each is site else all_but_one for each in layout.SITES))
    assert plan.split_layers == ([layout.fused(site.fused)] if site not in (layout.O_PROJ, layout.DOWN_PROJ) else [])


# --- words and formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, *PRESETS.values()])
def test_a_word_and_a_group_size_say_the_scheme(scheme):
    assert scheme_of(word_of(scheme), 0 if scheme is None else scheme.group_size, "there") == scheme


@pytest.mark.parametrize("size", [0, 2, 256])
@pytest.mark.parametrize("word", [*WORDS.values(), FLOAT])
def test_a_scheme_has_the_word_that_it_is_read_from_and_only_int4_the_group_size(word, size):
    scheme = scheme_of(word, size, "there")
    assert word_of(scheme) == word
    assert scheme is None or scheme.group_size == (size if scheme.weight.bits == 4 else 0)


def test_every_arithmetic_has_a_word_of_its_own_and_the_range_of_codes_has_none():
    assert {preset.arithmetic for preset in PRESETS.values()} == WORDS.keys()
    assert len({*WORDS.values(), FLOAT}) == len(WORDS) + 1
    for preset in PRESETS.values():
        assert word_of(preset.with_range(full_range=True)) == word_of(preset)


@pytest.mark.parametrize("word", ["W4A16", "", "float", None, 8, ["FLOAT"], {}])
def test_another_word_is_refused_with_the_place_and_those_that_are_known(word):
    with pytest.raises(CheckpointError) as raised:
        scheme_of(word, 0, "there")
    assert str(raised.value) == f"there is {word!r}, wanted one of W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC, FLOAT"


@pytest.mark.parametrize("name", FORMATS)
@given(plan=one_size(blocks=2))
def test_every_format_reads_back_the_plan_that_it_describes(name, plan, small_config, tmp_path_factory):
    """Mixed, grouped, cached and float ones; from the files alone."""
    stored_as, config, directory = FORMATS[name], small_config(), tmp_path_factory.mktemp("plan")
    if name == "compressed-tensors" and plan.cache is not None:
        with pytest.raises(RequestError, match="key/value caches"):
            stored_as.metadata(config, plan)
        plan = Plan(tuple(dataclasses.replace(block, cache=None) for block in plan.blocks))
    for file, value in stored_as.metadata(config, plan).items():
        (directory / file).write_text(json.dumps(value), encoding="utf-8")
    written = ModelConfig.from_file(directory / "config.json")
    assert stored_as.recognises(directory, written)
    assert stored_as.read_plan(directory, written) == plan


# --- a rounded block ------------------------------------------------------------------------------------------------


def rounded(block, plan):
    """The block with the planned layers rounded, the weights still in it."""
    linears, errors = {}, {}
    for site, scheme in plan.quantized:
        weight = RoundToNearest()(block.weight(site), scheme.weight, None)
        linears[site.name] = QuantizedLinear(scheme, weight, None if scheme.activation.dynamic else 21.25)
        errors[site.name] = 0.01
    ends = np.ones((block.config.num_key_value_heads, block.config.head_dim), np.float32)
    grid = grid_of_range(-ends, ends, symmetric=True)
    return RoundedBlock(block, linears, None if plan.cache is None else QuantizedCache(grid, grid), errors)


@pytest.mark.parametrize("bias", [True, False])
@given(plan=block_plans())
def test_a_rounded_block_has_the_plan_that_it_was_rounded_by_and_keeps_the_rest(bias, plan, random_block):
    block = random_block(bias=bias)
    made = rounded(block, plan)
    assert made.plan == plan
    assert made.config is block.config
    weights = {f"{site.name}.weight" for site, _ in plan.quantized}
    assert made.kept.keys() == block.tensors.keys() - weights  # the biases of rounded layers among them
    assert all(value is block[name] for name, value in made.kept.items())


@pytest.mark.parametrize("bias", [True, False])
@given(plan=block_plans())
def test_without_its_rounded_weights_it_is_the_same_and_holds_no_more_than_it_keeps(bias, plan, random_block):
    made = rounded(random_block(bias=bias), plan)
    before = dict(made.floats.tensors)
    freed = dataclasses.replace(made, floats=Block(made.config, made.kept))  # as the pipeline hands it on
    assert freed.floats.tensors.keys() == freed.kept.keys() == made.kept.keys()
    assert all(value is made.kept[name] for name, value in freed.kept.items())
    assert freed.plan == plan
    assert (freed.linears, freed.cache, freed.errors) == (made.linears, made.cache, made.errors)
    assert made.floats.tensors == before  # another value was made; this one has not changed


def test_a_float_block_is_one_of_which_nothing_is_rounded(random_block):
    block = random_block()
    made = RoundedBlock(block)
    assert made.plan == BlockPlan()
    assert made.plan.is_float
    assert made.kept == block.tensors
    assert made.notes == {}


def test_notes_are_those_of_the_layers_that_have_one(random_block):
    made = rounded(random_block(), BlockPlan((INT8,) * 7))
    assert made.notes == {}
    linear = made.linears["mlp.up_proj"]
    told = dataclasses.replace(linear, weight=dataclasses.replace(linear.weight, note="damping 1e-2 -> 1e-1"))
    assert dataclasses.replace(made, linears={**made.linears, "mlp.up_proj": told}).notes == {
        "mlp.up_proj": "damping 1e-2 -> 1e-1"
    }
