"""The scales of an int8 cache on disk: in both formats that hold them, read back, exported, verified; refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import QuantizedLinear
from ms_pangu_quant.checkpoint.config import ASCEND_FILE
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import QuantizedWriter
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.consumers import check_served, facts_of
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache, grid_of_range
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import INT8_CACHE, PRESETS
from tests.unit.edited import edit

HELD = ("mindformers", "ascend")
HEADS, DIM = 2, 16  # of the tiny shape


def random_cache(seed, *, symmetric=True):
    ends = np.random.default_rng(seed).uniform(0.01, 40, (4, HEADS, DIM)).astype(np.float32)
    return QuantizedCache(*(grid_of_range(-ends[i], ends[i + 1], symmetric=symmetric) for i in (0, 2)))


def same(a, b):
    return all(
        np.array_equal(getattr(one, key), getattr(two, key)) and getattr(one, key).dtype == getattr(two, key).dtype
        for one, two in ((a.key, b.key), (a.value, b.value))
        for key in ("scale", "offset")
    )


@pytest.fixture
def stored(make_checkpoint, tmp_path):
    """(format, scheme of the MLP's down_proj, symmetric) -> (directory, caches)."""

    def make(name, *, scheme="w8a8", symmetric=False):
        source = CheckpointReader(make_checkpoint("source", vocab_size=64, dtype="float32"))
        assert (source.config.num_key_value_heads, source.config.head_dim) == (HEADS, DIM)
        chosen = tuple(PRESETS[scheme] if scheme and site is layout.DOWN_PROJ else None for site in layout.SITES)
        plan, stored_as = Plan((BlockPlan(chosen, INT8_CACHE),) * 2), FORMATS[name]
        caches, output = [], tmp_path / f"out-{name}"
        with QuantizedWriter(output, {}, blocks=2, resume=False) as writer:
            for index, block in enumerate(map(source.block, range(source.config.num_hidden_layers))):
                tensors, prefix = dict(block.tensors), layout.block_prefix(index)
                for site, preset in plan.blocks[index].quantized:
                    weight = tensors.pop(f"{site.name}.weight")
                    linear = QuantizedLinear(preset, RoundToNearest()(weight, preset.weight, None))
                    encoded = stored_as.encode(block, site, linear)
                    tensors.update({f"{site.name}.{key}": value for key, value in encoded.items()})
                caches.append(random_cache(index, symmetric=symmetric))
                tensors.update(kv_cache.encode(caches[-1]))
                writer.write_block({prefix + key: value for key, value in tensors.items()}, {})
            files = stored_as.metadata(source.config, plan)
            outer = {each: source.files.entries[each] for each in layout.outer_shapes(source.config)}
            writer.finish(outer, source.directory, files)
        return output, caches

    return make


@pytest.mark.parametrize("scheme", ["w8a8", None], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_grids_are_read_back_as_they_were_and_the_directory_is_sound(stored, name, symmetric, scheme):
    directory, caches = stored(name, scheme=scheme, symmetric=symmetric)
    reader = QuantizedReader(directory)
    assert reader.plan.cache == INT8_CACHE
    assert all(same(reader.rounded_block(index).cache, cache) for index, cache in enumerate(caches))
    found = verify(directory)
    assert found.faults == ()
    assert found.layers == (2 if scheme else 0)


def test_every_bfloat16_scale_and_every_zero_point_survives():
    config = type("Config", (), {"num_key_value_heads": 1, "head_dim": 256})
    bits = np.arange(0x0080, 0x7F80, dtype=np.uint16).reshape(-1, 1, 256)[::5]
    offset = np.arange(-128, 128, dtype=np.int8).reshape(1, 256)
    for each in bits:
        grid = type(random_cache(0).key)(each.view(ml_dtypes.bfloat16).astype(np.float32), offset)
        cache = QuantizedCache(grid, grid)
        assert same(kv_cache.decode(config, kv_cache.encode(cache)), cache)


def test_the_tensors_and_the_description_are_msmodelslims(stored):
    """Names, shapes and words as MindIE documents them and vllm-ascend looks them up."""
    directory, caches = stored("ascend")
    description = json.loads((directory / ASCEND_FILE).read_text())
    assert description["kv_cache_type"] == "C8"
    entries = QuantizedReader(directory).files.entries
    for index in range(2):
        for part in ("k_proj", "v_proj"):
            for what in ("kv_cache_scale", "kv_cache_offset"):
                name = f"model.layers.{index}.self_attn.{part}.{what}"
                assert description[name] == "C8"
                assert entries[name].shape == (HEADS * DIM,)
    scale = entries["model.layers.1.self_attn.v_proj.kv_cache_scale"].read().astype(np.float32)
    assert scale[DIM + 3] == caches[1].value.scale[1, 3]


@pytest.mark.parametrize(("there", "back"), [("ascend", "mindformers"), ("mindformers", "ascend")])
def test_exporting_there_and_back_gives_the_same_bytes(stored, there, back, tmp_path):
    directory, caches = stored(back)
    export(QuantizedReader(directory), FORMATS[there], tmp_path / "there")
    assert all(
        same(QuantizedReader(tmp_path / "there").rounded_block(index).cache, cache) for index, cache in enumerate(caches)
    )
    assert verify(tmp_path / "there").faults == ()
    export(QuantizedReader(tmp_path / "there"), FORMATS[back], tmp_path / "back")
    for file in directory.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_format_that_cannot_hold_it_refuses_before_anything_is_written(stored, tmp_path):
    reader = QuantizedReader(stored("mindformers")[0])
    with pytest.raises(RequestError, match=r"float8 key/value caches.*use --format mindformers or ascend"):
        export(reader, FORMATS["compressed-tensors"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    facts = facts_of(reader.config, reader.plan)
    for name in HELD:
        check_served(name, facts)
    with pytest.raises(
        RequestError, match="an int8 key/value cache in the compressed-tensors format: no program"
    ) as raised:
        check_served("compressed-tensors", facts)
    assert str(raised.value).endswith("use --format ascend or mindformers")  # the format could not be written either


def test_a_cache_scheme_in_compressed_tensors_is_refused_not_passed_over(make_checkpoint):
    config = CheckpointReader(make_checkpoint("source")).config
    files = FORMATS["compressed-tensors"].metadata(config, Plan.uniform(config, PRESETS["w8a8"]))
    raw = json.loads(json.dumps(files["config.json"]))
    reads = FORMATS["compressed-tensors"].read_plan
    assert reads(Path("somewhere"), type(config).from_dict(raw, where="x")).cache is None
    raw["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    with pytest.raises(CheckpointError, match=r"kv_cache_scheme.*is not read from this format"):
        reads(Path("somewhere"), type(config).from_dict(raw, where="x"))


NAME = "model.layers.1.self_attn.k_proj.kv_cache_scale"
OFFSET = "model.layers.0.self_attn.v_proj.kv_cache_offset"


def changed(name, place, value):
    def change(tensors):
        tensors[name] = tensors[name].astype(np.float32)
        tensors[name][place] = value

    return change


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(NAME, 3, 0), "k_proj.kv_cache_scale: 1 of 32 scales are not positive finite numbers"),
        (changed(NAME, slice(0, 2), np.nan), "k_proj.kv_cache_scale: 2 of 32 scales"),
        (changed(OFFSET, 5, 0.5), "v_proj.kv_cache_offset: 1 of 32 offsets are not whole numbers from -128 to 127"),
        (changed(OFFSET, 5, 128), "v_proj.kv_cache_offset: 1 of 32 offsets"),
        (lambda tensors: tensors.pop(NAME), f"{NAME}: is missing"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:-1]}), f"{NAME}: got bfloat16 [31], wanted"),
    ],
)
def test_each_fault_is_named(stored, name, change, told):
    directory, _ = stored(name)
    edit(directory, change)
    faults = verify(directory).faults
    assert any(told in fault for fault in faults), faults
    with pytest.raises(CheckpointError):
        [QuantizedReader(directory).rounded_block(index) for index in range(2)]


def test_scales_that_no_one_announced_and_kinds_that_are_not_known_are_refused(stored):
    directory, _ = stored("ascend")
    path = directory / ASCEND_FILE
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "kv_cache_type": "C4"}))
    with pytest.raises(CheckpointError, match=r"kv_cache_type is 'C4', wanted 'C8'"):
        QuantizedReader(directory)
    del description["kv_cache_type"]
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="kv_cache"):
        QuantizedReader(directory)
    assert any("kv_cache_scale" in fault for fault in verify(directory).faults)
