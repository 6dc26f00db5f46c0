"""formats/mindformers.py: what is stored is Golden Stick's layout, and it is read back exactly or refused by name."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.config import QUANTIZATION_FILE, ModelConfig
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import QuantizedWriter
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats import mindformers, parameters
from ms_pangu_quant.formats.packing import pack_along_out, pack_offset_along_in, unpack_along_out
from ms_pangu_quant.formats.reader import QuantizedReader, open_checkpoint, read_block
from ms_pangu_quant.network.weights import served_tensors
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import PRESETS, W8A8_STATIC

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GROUP_SIZE = 32
FACTOR = 21.25  # a bfloat16 value: activations are multiplied by it
SITE = layout.O_PROJ
STATIC, DYNAMIC, INT4 = PRESETS["w8a8_static"], PRESETS["w8a8"], PRESETS["w4a8"]
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "PanguEmbedded",
        "hidden_size": 6,
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "vocab_size": 8,
        "max_position_embeddings": 8,
    },
    where="test",
)  # SITE, o_proj, is [6, 8]
BLOCK = Block(CONFIG, {})
FLOAT32 = SimpleNamespace(bfloat16_tables=False)  # a backend that takes no dtype but float32


def encode(linear):
    return mindformers.encode(BLOCK, SITE, linear)


def decode(scheme, tensors):
    return mindformers.decode(BLOCK, SITE, scheme, tensors)


def bfloat16s(low, high):
    """Positive bfloat16 values from low to high."""
    return st.floats(low, high, width=32).map(lambda value: float(np.float32(value).astype(BFLOAT16)))


def linear(scheme, *, outputs=6, inputs=8, groups=1, bfloat16=True, factor=FACTOR, seed=0):
    generator = np.random.default_rng(seed)
    top = scheme.weight.code_max
    codes = generator.integers(-top - 1, top + 1, (outputs, inputs)).astype(np.int8)
    scale = generator.lognormal(mean=-4, size=(outputs, groups)).astype(np.float32)
    scale = scale.astype(BFLOAT16).astype(np.float32) if bfloat16 else scale
    scheme = scheme.grouped(inputs // groups if groups > 1 else 0)
    return QuantizedLinear(scheme, QuantizedWeight(codes, scale), factor if scheme == STATIC else None)


def same(one, other):
    """Bit for bit, dtypes included."""
    described = [
        (
            some.scheme,
            some.input_scale,
            *((array.dtype, array.shape, array.tobytes()) for array in (some.weight.codes, some.weight.scale)),
        )
        for some in (one, other)
    ]
    return described[0] == described[1]


# --- encode and decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16 scales", "float32 scales"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("scheme", [DYNAMIC, INT4])
def test_dynamic_schemes_make_the_round_trip_bit_for_bit(scheme, groups, bfloat16):
    for seed in range(5):
        made = linear(scheme, groups=groups if scheme == INT4 else 1, bfloat16=bfloat16, seed=seed)
        assert same(decode(made.scheme, encode(made)), made)


@given(st.lists(bfloat16s(2.0**-40, 2.0**20), min_size=1, max_size=30), bfloat16s(2.0**-20, 2.0**40))
def test_the_static_scheme_makes_the_round_trip_bit_for_bit_for_bfloat16_scales_and_factors(scales, factor):
    """Stored is their quotient, rounded to float32; the scale it came from must be found again."""
    scale = np.array(scales, np.float32)[:, None]
    codes = np.arange(len(scales) * 3, dtype=np.int8).reshape(-1, 3)
    made = QuantizedLinear(STATIC, QuantizedWeight(codes, scale), factor)
    assert same(decode(STATIC, encode(made)), made)


@given(st.lists(st.floats(2.0**-40, 2.0**20, width=32), min_size=1, max_size=30), st.floats(2.0**-20, 2.0**40, width=32))
def test_the_static_scheme_keeps_any_other_scale_to_one_rounding(scales, factor):
    scale = np.array(scales, np.float32)[:, None]
    made = QuantizedLinear(STATIC, QuantizedWeight(np.ones((len(scales), 3), np.int8), scale), factor)
    back = decode(STATIC, encode(made))
    assert back.input_scale == np.float32(factor)
    np.testing.assert_allclose(back.weight.scale, scale, rtol=2**-23)
    np.testing.assert_array_equal(encode(back)["deq_scale"], encode(made)["deq_scale"])


def test_w8a8_dynamic_is_stored_as_documented():
    made = linear(DYNAMIC)
    stored = encode(made)
    assert {key: (value.dtype, value.shape) for key, value in stored.items()} == {
        "weight": (np.int8, (6, 8)),
        "weight_scale": (BFLOAT16, (6,)),
    }
    np.testing.assert_array_equal(stored["weight"], made.weight.codes)
    np.testing.assert_array_equal(stored["weight_scale"].astype(np.float32), made.weight.scale[:, 0])


@pytest.mark.parametrize("groups", [1, 4])
def test_w4a8_dynamic_is_stored_as_documented(groups):
    """int4 pairs along the output, scales [groups, out] in float32 even where every one is a bfloat16."""
    made = linear(INT4, groups=groups)
    stored = encode(made)
    assert {key: (value.dtype, value.shape) for key, value in stored.items()} == {
        "weight": (np.int8, (8, 3)),
        "weight_scale": (np.float32, (groups, 6)),
    }
    np.testing.assert_array_equal(unpack_along_out(stored["weight"]), made.weight.codes)
    np.testing.assert_array_equal(stored["weight_scale"], made.weight.scale.T)
    assert stored["weight_scale"].flags.c_contiguous


def test_w8a8_static_is_stored_as_documented():
    made = linear(STATIC)
    stored = encode(made)
    assert {key: (value.dtype, value.shape) for key, value in stored.items()} == {
        "weight": (np.int8, (6, 8)),
        "deq_scale": (np.float32, (6,)),
        "input_scale": (BFLOAT16, (8,)),
        "input_offset": (np.int8, (8,)),
        "quant_bias": (np.int32, (6,)),
    }
    np.testing.assert_array_equal(stored["weight"], made.weight.codes)
    assert (stored["input_scale"].astype(np.float32) == FACTOR).all()
    assert not stored["input_offset"].any()
    assert not stored["quant_bias"].any()  # the layer's own bias is added besides; here it would count twice


def test_deq_scale_is_weight_scale_times_activation_scale_and_input_scale_is_a_factor():
    """MindSpore computes round(x * input_scale) @ weight * deq_scale; that must be the dequantized product."""
    made = linear(STATIC, outputs=6, inputs=8)
    stored = encode(made)
    weight_scale = made.weight.scale[:, 0].astype(np.float64)
    np.testing.assert_allclose(stored["deq_scale"], weight_scale * (1 / FACTOR), rtol=2**-23)
    x = np.random.default_rng(1).integers(-50, 50, (5, 8)) / FACTOR  # on the activation grid: nothing is rounded
    codes = np.rint(x * stored["input_scale"].astype(np.float64) + stored["input_offset"])
    product = (codes @ stored["weight"].T.astype(np.float64) + stored["quant_bias"]) * stored["deq_scale"]
    np.testing.assert_allclose(product, x @ made.weight.dequantize().T.astype(np.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scheme", "key"), [(DYNAMIC, "weight_scale"), (STATIC, "input_scale")])
def test_a_scale_that_is_no_bfloat16_is_kept_in_float32_rather_than_rounded(scheme, key):
    made = linear(scheme, bfloat16=False, factor=0.1)
    assert encode(made)[key].dtype == np.float32


def test_a_static_layer_without_the_scale_of_its_input_is_a_mistake_of_the_caller():
    weight = linear(STATIC).weight
    with pytest.raises(ValueError, match="scale of its input"):
        encode(QuantizedLinear(STATIC, weight))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC, INT4])
def test_specs_are_those_of_what_encode_makes(scheme, groups):
    groups = groups if scheme == INT4 else 1
    for bfloat16 in (True, False):
        made = linear(scheme, groups=groups, bfloat16=bfloat16, factor=FACTOR if bfloat16 else 0.1)
        stored = encode(made)
        promised = mindformers.specs(CONFIG, SITE, made.scheme)
        assert list(promised) == list(stored)
        for key, spec in promised.items():
            assert stored[key].shape == spec.shape
            assert stored[key].dtype.name in spec.dtypes
            assert stored[key].nbytes == spec.nbytes(bfloat16_values=bfloat16)


@given(st.integers(-128, 127))
def test_a_zero_point_goes_into_quant_bias_and_comes_back(offset):
    plain = linear(STATIC)
    made = QuantizedLinear(STATIC, plain.weight, plain.input_scale, offset)
    stored = encode(made)
    assert (stored["input_offset"] == offset).all()
    np.testing.assert_array_equal(stored["quant_bias"], -offset * made.weight.codes.astype(np.int64).sum(axis=1))
    back = decode(STATIC, stored)
    assert same(back, made)
    assert back.input_offset == offset


def test_runtime_tensors_are_the_stored_ones_in_float32_but_for_int4_which_is_packed_for_the_cpu():
    for scheme in (STATIC, DYNAMIC):
        made = linear(scheme)
        held, stored = parameters.runtime_tensors(BLOCK, SITE, made), encode(made)
        assert list(held) == list(stored)
        for key, value in stored.items():
            assert held[key].dtype == (np.float32 if value.dtype == BFLOAT16 else value.dtype)
            np.testing.assert_array_equal(held[key], value.astype(held[key].dtype))
    made = linear(INT4, groups=4)
    held = parameters.runtime_tensors(BLOCK, SITE, made)
    assert list(held) == ["weight", "group_scale"]
    np.testing.assert_array_equal(held["weight"], pack_offset_along_in(made.weight.codes))
    np.testing.assert_array_equal(held["group_scale"], made.weight.scale)


# --- a quantized directory ------------------------------------------------------------------------------------------

PRESET_OF = {  # site -> preset of blocks 0 and 1; q/k/v and gate/up must agree
    "self_attn.q_proj": ("w8a8_static", "w4a8_g32"),
    "self_attn.k_proj": ("w8a8_static", "w4a8_g32"),
    "self_attn.v_proj": ("w8a8_static", "w4a8_g32"),
    "self_attn.o_proj": (None, "w8a8_static"),
    "mlp.gate_proj": ("w4a8_g32", None),
    "mlp.up_proj": ("w4a8_g32", None),
    "mlp.down_proj": ("w8a8", "w4a8_g32"),
}
PLAN = Plan(
    tuple(BlockPlan(tuple(PRESETS.get(PRESET_OF[site.name][index]) for site in layout.SITES)) for index in range(2))
)


@pytest.fixture
def quantized(make_checkpoint, tmp_path):
    """(directory, source reader, {(block, site): QuantizedLinear}): PLAN carried out by hand, without the pipeline."""
    reader = CheckpointReader(make_checkpoint("source", vocab_size=64))
    linears = {}
    with QuantizedWriter(tmp_path / "quantized", {}, blocks=2, resume=False) as writer:
        for index, block in enumerate(map(reader.block, range(reader.config.num_hidden_layers))):
            prefix, tensors = layout.block_prefix(index), dict(block.tensors)
            for site in layout.SITES:
                scheme = PLAN.blocks[index].scheme(site)
                if scheme:
                    made = RoundToNearest()(tensors.pop(f"{site.name}.weight"), scheme.weight, None)
                    factor = FACTOR if scheme.arithmetic == W8A8_STATIC else None
                    stored = linears[index, site.name] = QuantizedLinear(scheme, made, factor)
                    tensors.update({f"{site.name}.{key}": value for key, value in encode(stored).items()})
            writer.write_block({prefix + name: value for name, value in tensors.items()}, {})
        outer = {name: reader.files.entries[name] for name in layout.outer_shapes(reader.config)}
        writer.finish(
            outer,
            reader.directory,
            mindformers.metadata(reader.config, PLAN),
        )
    return tmp_path / "quantized", reader, linears


def into_one_file(directory):
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")


def read_all(directory):
    reader = QuantizedReader(directory)
    return [reader.rounded_block(index) for index in range(reader.config.num_hidden_layers)]


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_directory_assembled_by_hand_is_read_back_exactly(quantized):
    directory, source, linears = quantized
    reader = QuantizedReader(directory)
    assert reader.plan.group_size == GROUP_SIZE
    for index in range(2):
        rounded = reader.rounded_block(index)
        block, read = rounded.floats, rounded.linears
        assert set(read) == {site for (at, site) in linears if at == index}
        for site, found in read.items():
            assert same(found, linears[index, site]), site
        wanted = source.block(index)
        assert set(block.tensors) == {name for name in wanted.tensors if name.removesuffix(".weight") not in read}
        assert all(np.array_equal(block[name], wanted[name]) for name in block.tensors)
    for name in layout.outer_shapes(source.config):
        np.testing.assert_array_equal(reader.files.read_float32(name), source.files.read_float32(name))


def test_schemes_are_those_of_the_description(quantized):
    reader = QuantizedReader(quantized[0])
    assert reader.plan == PLAN
    assert tuple(reader.rounded_block(index).plan for index in range(2)) == PLAN.blocks


def test_one_block_can_be_read_from_its_own_file(quantized):
    directory, _, linears = quantized
    reader = QuantizedReader(directory)
    only = TensorFiles(directory, only=directory / "model-00002-of-00003.safetensors")
    rounded = read_block(mindformers, only, reader.config, reader.plan.blocks[1], 1)
    assert all(same(found, linears[1, site]) for site, found in rounded.linears.items())
    assert rounded.floats.tensors.keys() == reader.rounded_block(1).floats.tensors.keys()


def test_the_network_gets_every_tensor_once_as_its_linear_methods_hold_it(quantized):
    directory, source, linears = quantized
    found = list(served_tensors(QuantizedReader(directory), FLOAT32))
    arrays = {name: piece[:] for name, piece in found}
    assert len(arrays) == len(found)
    wanted = {name: source.files.read_float32(name) for name in source.plan.float_shapes(source.config)}
    for (index, site), made in linears.items():
        del wanted[f"model.layers.{index}.{site}.weight"]
        held = parameters.runtime_tensors(BLOCK, SITE, made)
        wanted.update({f"model.layers.{index}.{site}.{key}": value for key, value in held.items()})
    assert arrays.keys() == wanted.keys()
    for name, piece in found:
        assert piece.get_shape() == list(wanted[name].shape)
        assert arrays[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(arrays[name], wanted[name])
    assert {name for name, _ in served_tensors(source, FLOAT32)} == set(source.plan.float_shapes(source.config))


def test_slices_are_contiguous_whatever_is_cut():
    piece = parameters.ArraySlice(np.arange(24).reshape(4, 6))
    for index in (slice(None), slice(1, 3), (slice(None), slice(2, 4)), (slice(None, None, 2), slice(1, None))):
        cut = piece[index]
        assert cut.flags.c_contiguous
        np.testing.assert_array_equal(cut, np.arange(24).reshape(4, 6)[index])


def test_open_checkpoint_tells_quantized_from_float_by_the_files(quantized):
    directory, source, _ = quantized
    assert isinstance(open_checkpoint(directory), QuantizedReader)
    assert isinstance(open_checkpoint(source.directory), CheckpointReader)
    renamed = directory.rename(directory.with_name("float"))
    assert isinstance(open_checkpoint(renamed), QuantizedReader)
    for path in (directory, renamed / "config.json"):
        with pytest.raises(CheckpointError, match="no such directory"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"bias": False},
        {"output_bias": False},
        {"bias": False, "output_bias": True},
        {"output_bias": True},
        {"head_dim": 24},
        {"tie_word_embeddings": False},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "llama", "rms_norm_eps": None},
        {"model_type": "llama", "rope_theta": None, "num_key_value_heads": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    ],
    ids=str,
)
def test_the_written_config_describes_the_same_network_by_openpangus_names(checkpoint_tool, raw):
    """A llama checkpoint too: the defaults of the two families differ, so every value must be written out."""
    given_raw = {key: value for key, value in checkpoint_tool.make_config("tiny", **raw).items() if value is not None}
    before = ModelConfig.from_dict(given_raw, where="before")
    int4 = dict.fromkeys((site.name for site in layout.SITES), None) | {layout.DOWN_PROJ.name: PRESETS["w4a8_g128"]}
    plan = Plan((BlockPlan(tuple(int4.values())),) * before.num_hidden_layers)
    written = json.loads(json.dumps(mindformers.metadata(before, plan)["config.json"]))
    after = ModelConfig.from_dict(written, where="after")
    assert {**vars(after), "raw": None} == {**vars(before), "raw": None}
    assert (written["model_type"], written["architectures"]) == ("PanguEmbedded", ["PanguEmbeddedForCausalLM"])
    assert written["quantization_config"] == {"quant_method": "golden-stick", "group_size": 128}
    assert not {"attention_bias", "mlp_bias"} & written.keys()
    assert ("auto_map" in written) == (given_raw["model_type"] == "PanguEmbedded")  # its code is carried over
    assert "quantization_config" not in before.raw


def drop(name):
    """A fault: (what it does to the tensors, the name its message must have)."""
    return lambda tensors: tensors.pop(name), name


def put(name, array):
    return lambda tensors: tensors.update({name: array}), name


STATIC_LAYER, INT4_LAYER, INT8_LAYER = (
    "model.layers.1.self_attn.o_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
)
FAULTS = {
    "missing int4 weight": drop(f"{INT4_LAYER}.weight"),
    "missing int8 scale": drop(f"{INT8_LAYER}.weight_scale"),
    "missing deq_scale": drop(f"{STATIC_LAYER}.deq_scale"),
    "missing quant_bias": drop(f"{STATIC_LAYER}.quant_bias"),
    "missing offset": drop(f"{STATIC_LAYER}.input_offset"),
    "missing norm": drop("model.norm.weight"),
    "missing float weight": drop("model.layers.0.self_attn.o_proj.weight"),
    "missing bias": drop(f"{STATIC_LAYER}.bias"),
    "unpacked int4": put(f"{INT4_LAYER}.weight", np.zeros((128, 64), np.int8)),
    "int4 scales transposed": put(f"{INT4_LAYER}.weight_scale", np.ones((128, 2), np.float32)),
    "one input_scale for all": put(f"{STATIC_LAYER}.input_scale", np.ones(1, BFLOAT16)),
    "float codes": put(f"{INT8_LAYER}.weight", np.zeros((64, 128), np.float32)),
    "unsigned codes": put(f"{INT8_LAYER}.weight", np.zeros((64, 128), np.uint8)),
    "codes of 32 bits": put(f"{INT8_LAYER}.weight", np.full((64, 128), 1000, np.int32)),
    "int4 pairs in 16 bits": put(f"{INT4_LAYER}.weight", np.zeros((64, 64), np.int16)),
    "integer scale": put(f"{INT8_LAYER}.weight_scale", np.ones(64, np.int32)),
    "extra tensor": put(f"{INT8_LAYER}.smooth_scale", np.ones(128, np.float32)),
    # What decode would drop: a directory of another program with these would be served with other numbers.
    "zero point without its correction": (
        lambda t: t.update({f"{STATIC_LAYER}.input_offset": np.full(64, 3, np.int8)}),
        f"{STATIC_LAYER}.quant_bias",
    ),
    "bias inside quant_bias": put(f"{STATIC_LAYER}.quant_bias", np.full(64, 9, np.int32)),
    "input_scale per channel": put(f"{STATIC_LAYER}.input_scale", np.arange(1, 65).astype(BFLOAT16)),
    # q, k and v are one matmul of one input
    "input_scale of q alone": put("model.layers.0.self_attn.q_proj.input_scale", np.full(64, 2, BFLOAT16)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_missing_or_not_as_described_is_refused_by_name(quantized, fault):
    directory, _, _ = quantized
    change, named = FAULTS[fault]
    into_one_file(directory)
    read_all(directory)  # sound before the fault
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        read_all(directory)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d.update({"model.layers.1.mlp.down_proj.weight": "W4A16"}),
            r"model\.layers\.1\.mlp\.down_proj\.weight is 'W4A16', wanted one of W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC, FLOAT",
        ),
        (lambda d: d.pop("model.layers.0.mlp.up_proj.weight"), r"model\.layers\.0\.mlp\.up_proj\.weight is None, wanted"),
        (lambda d: d.update({"model.layers.0.mlp.up_proj.weight": ["FLOAT"]}), r"mlp\.up_proj\.weight is \['FLOAT'\]"),
        (lambda d: d.update({"model.layers.0.self_attn.o_proj.weight": "W8A8_DYNAMIC"}), r"self_attn\.o_proj\.weight"),
        (lambda d: d.update({"model.layers.0.mlp.down_proj.weight": "FLOAT"}), r"mlp\.down_proj\.weight"),
    ],
)
def test_a_word_that_is_unknown_or_not_what_the_tensors_are_is_refused(quantized, change, said):
    edit_json(quantized[0] / QUANTIZATION_FILE, change)
    with pytest.raises(CheckpointError, match=said):
        QuantizedReader(quantized[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, None])
def test_a_description_that_is_none_is_refused_naming_it(quantized, content):
    path = quantized[0] / QUANTIZATION_FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        QuantizedReader(quantized[0])


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        "golden-stick",
        ["golden-stick"],
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"group_size": 32},
    ],
)
def test_another_quantization_method_is_refused_naming_the_config(quantized, settings):
    edit_json(quantized[0] / "config.json", lambda config: config.update(quantization_config=settings))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config is .*wanted quant_method"):
        QuantizedReader(quantized[0])


@pytest.mark.parametrize("size", [64, 0, None, -32, 48, "many", [32], 32.5, True])
def test_a_group_size_that_is_not_that_of_the_tensors_is_refused(quantized, size):
    edit_json(quantized[0] / "config.json", lambda config: config["quantization_config"].update(group_size=size))
    with pytest.raises(CheckpointError, match=r"weight_scale|group_size"):
        QuantizedReader(quantized[0])


def test_int4_bytes_of_the_directory_are_golden_sticks(quantized):
    """Read without this package: transposed, the low nibble is the even output channel."""
    directory, _, linears = quantized
    tensors = load_file(directory / "model-00001-of-00003.safetensors")
    stored = tensors["model.layers.0.mlp.up_proj.weight"].view(np.uint8)
    codes = linears[0, "mlp.up_proj"].weight.codes
    assert stored.shape == (64, 64)  # [in, out / 2]
    np.testing.assert_array_equal(stored & 15, codes[0::2].T & 15)
    np.testing.assert_array_equal(stored >> 4, codes[1::2].T & 15)
    np.testing.assert_array_equal(stored.view(np.int8), pack_along_out(codes))
