"""formats/: every layout reads back what it wrote, and reads and writes what the programs it is named after write.

The goldens are those programs' own files (tools/goldens/formats.py).
"""

import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats import ascend, compressed_tensors
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.linear import factor_of, origin
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader, open_checkpoint
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.formats.words import FLOAT, word_of
from ms_pangu_quant.pipeline.estimate import layer_bytes
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import PRESETS, W4A8

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = {
    "model_type": "PanguEmbedded",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}
O_PROJ = layout.O_PROJ  # [48, 32], has a bias, reads attention_output
UP, DOWN = layout.UP_PROJ, layout.DOWN_PROJ  # [80, 48] and [48, 80], no bias
STATIC, DYNAMIC, INT4 = PRESETS["w8a8_static"], PRESETS["w8a8"], PRESETS["w4a8"]


def config(**changes):
    return ModelConfig.from_dict({**CONFIG, **changes}, where="test")


def block(seed=0, **changes):
    made = config(**changes)
    bias = np.random.default_rng(seed).normal(size=48).astype(np.float32)
    return Block(made, {"self_attn.o_proj.bias": bias} if made.biased else {})


def linear(scheme, site, *, groups=1, bfloat16=True, factor=21.25, offset=0, seed=0):
    generator = np.random.default_rng(seed)
    top = scheme.weight.code_max
    codes = generator.integers(-top - 1, top + 1, layout.site_shape(config(), site)).astype(np.int8)
    scheme = scheme.grouped(codes.shape[1] // groups if groups > 1 else 0)
    scale = generator.lognormal(mean=-4, size=(len(codes), groups)).astype(np.float32)
    scale = scale.astype(BFLOAT16).astype(np.float32) if bfloat16 else scale
    static = not scheme.activation.dynamic
    return QuantizedLinear(scheme, QuantizedWeight(codes, scale), factor if static else None, offset if static else 0)


def same(one, other):
    """Bit for bit, dtypes included."""
    arrays = [(some.weight.codes, some.weight.scale) for some in (one, other)]
    return (one.scheme, one.input_scale, one.input_offset) == (other.scheme, other.input_scale, other.input_offset) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in zip(*arrays, strict=True)
    )


# --- laws of every format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("site", [O_PROJ, UP, DOWN], ids=lambda site: site.name)
@pytest.mark.parametrize(
    ("scheme", "groups", "bfloat16"),
    [  # a static layer stores a rounded product: see the test of arbitrary scales
        (STATIC, 1, True),
        *((DYNAMIC, 1, bfloat16) for bfloat16 in (True, False)),
        *((INT4, groups, bfloat16) for groups in (1, 8) for bfloat16 in (True, False)),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_makes_the_round_trip_bit_for_bit_and_is_what_was_promised(name, site, scheme, groups, bfloat16, dtype):
    where = block(torch_dtype=dtype)
    made = linear(scheme, site, groups=groups, bfloat16=bfloat16, offset=-9)
    stored = FORMATS[name].encode(where, site, made)
    specs = FORMATS[name].specs(where.config, site, made.scheme)
    assert {key for key, spec in specs.items() if not spec.optional} <= stored.keys() <= specs.keys()
    for key, value in stored.items():
        assert value.shape == specs[key].shape
        assert value.dtype.name in specs[key].dtypes
        if not specs[key].optional and key != "weight_scale":
            assert value.nbytes == specs[key].nbytes(bfloat16_values=bfloat16)
    assert same(FORMATS[name].decode(where, site, made.scheme, stored), made)


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_of_one_group_is_stored_as_one_that_has_groups(name):
    """As its description says: a layer may have no more inputs than a group."""
    made = linear(INT4, O_PROJ)
    made = dataclasses.replace(made, scheme=made.scheme.grouped(made.weight.codes.shape[1]))
    stored = FORMATS[name].encode(block(), O_PROJ, made)
    specs = FORMATS[name].specs(block().config, O_PROJ, made.scheme)
    assert {key for key, spec in specs.items() if not spec.optional} <= stored.keys() <= specs.keys()
    assert same(FORMATS[name].decode(block(), O_PROJ, made.scheme, stored), made)


def bfloat16s(low, high):
    return st.floats(low, high, width=32).map(lambda value: float(np.float32(value).astype(BFLOAT16)))


@pytest.mark.parametrize("name", FORMATS)
@given(scales=st.lists(bfloat16s(2.0**-30, 2.0**10), min_size=48, max_size=48), factor=bfloat16s(2.0**-10, 2.0**20))
def test_static_bfloat16_scales_survive_as_products_and_reciprocals(name, scales, factor):
    weight = QuantizedWeight(np.ones((48, 32), np.int8), np.array(scales, np.float32)[:, None])
    made, where = QuantizedLinear(STATIC, weight, factor, 3), block(bias=False)
    assert same(FORMATS[name].decode(where, O_PROJ, STATIC, FORMATS[name].encode(where, O_PROJ, made)), made)


@given(st.lists(st.floats(2.0**-30, 2.0**10, width=32), min_size=48, max_size=48), st.floats(2.0**-10, 2.0**20, width=32))
def test_any_static_scales_that_were_read_are_written_again_as_they_were(scales, divisor):
    """A foreign checkpoint: the product is what is stored, and it must not move."""
    product = np.array(scales, np.float32) * np.float32(divisor)
    stored = {
        "weight": np.ones((48, 32), np.int8),
        "quant_bias": np.zeros(48, np.int32),
        "input_scale": np.array([divisor], np.float32),
        "input_offset": np.zeros(1, np.float32),
        "deq_scale": product,
    }
    where = block(bias=False)
    again = ascend.encode(where, O_PROJ, ascend.decode(where, O_PROJ, STATIC, stored))
    assert {key: value.tobytes() for key, value in again.items()} == {key: value.tobytes() for key, value in stored.items()}


@given(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1), st.floats(2.0**-20, 2.0**20, width=32))
def test_origin_finds_a_number_that_rounds_to_what_is_stored(values, factor):
    x, factor = np.array(values, np.float32), np.float32(factor)
    product = x * factor
    np.testing.assert_array_equal(origin(product, product / factor, lambda y: y * factor) * factor, product)


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_reciprocal_of_a_reciprocal_is_the_float32_it_was(divisor):
    assert np.float32(1.0 / factor_of(np.float32(divisor))) == np.float32(divisor)


@pytest.mark.parametrize("name", FORMATS)
@given(st.lists(st.sampled_from((STATIC, DYNAMIC, INT4.grouped(16), None)), min_size=14, max_size=14))
def test_the_schemes_are_read_back_from_the_metadata(tmp_path_factory, name, chosen):
    names = layout.layer_names(config())
    plan = Plan.of_layers(dict(zip(names, chosen, strict=True)), 2)
    directory = tmp_path_factory.mktemp("metadata")
    for file, value in FORMATS[name].metadata(config(), plan).items():
        (directory / file).write_text(json.dumps(value))
    after = ModelConfig.from_file(directory / "config.json")
    assert [each for each in FORMATS.values() if each.recognises(directory, after)] == [FORMATS[name]]
    read = FORMATS[name].read_plan(directory, after)
    assert read == plan
    assert read.group_size == (16 if INT4.grouped(16) in chosen else 0)


# --- traps, by hand -------------------------------------------------------------------------------------------------


def test_ascend_packs_two_outputs_into_a_byte_the_even_one_low():
    codes = np.zeros((80, 48), np.int8)
    codes[0, 0], codes[1, 0], codes[78, 47], codes[79, 47] = 1, -2, -8, 7
    scale = np.ones((80, 1), np.float32)
    stored = ascend.encode(block(), UP, QuantizedLinear(INT4, QuantizedWeight(codes, scale)))["weight"]
    assert stored.shape == (40, 48)
    assert stored[0, 0].view(np.uint8) == 0xE1  # -2 is 0xE
    assert stored[39, 47].view(np.uint8) == 0x78  # -8 is 0x8
    assert np.count_nonzero(stored) == 2


def test_scale_bias_is_eight_times_the_sum_in_one_column_or_in_sixteenths_for_row_parallel_layers():
    for site, columns in ((UP, 1), (O_PROJ, 16), (DOWN, 16)):
        made = linear(INT4, site, groups=2)
        stored = ascend.encode(block(), site, made)["scale_bias"]
        wide = made.weight.dequantize().astype(np.float64)
        wanted = 8 * np.stack([part.sum(axis=1) for part in np.split(wide, columns, axis=1)], axis=1)
        assert stored.shape == (len(wide), columns)
        np.testing.assert_allclose(stored, wanted, rtol=1e-5, atol=1e-6)


def test_inputs_that_do_not_come_in_sixteenths_are_refused():
    narrow = block(head_dim=10)  # o_proj has 40 inputs
    made = QuantizedLinear(INT4, QuantizedWeight(np.ones((48, 40), np.int8), np.ones((48, 1), np.float32)))
    with pytest.raises(RequestError, match=r"self_attn\.o_proj: has 40 inputs.*16 equal parts"):
        ascend.encode(narrow, O_PROJ, made)


def test_group_scales_are_two_factors_whose_product_is_exact_and_the_first_is_a_power_of_two():
    made = linear(INT4, UP, groups=3, bfloat16=False)
    stored = ascend.encode(block(), UP, made)
    assert (np.frexp(stored["weight_scale"])[0] == 0.5).all()
    assert stored["weight_scale_second"].shape == (80, 3)
    np.testing.assert_array_equal(stored["weight_scale"] * stored["weight_scale_second"], made.weight.scale)


@pytest.mark.parametrize(("dtype", "stored_as"), [("bfloat16", np.float32), ("float16", np.int64), ("float32", np.int64)])
def test_deq_scale_is_float32_for_bfloat16_models_and_its_bits_in_an_int64_for_others(dtype, stored_as):
    weight = QuantizedWeight(np.ones((48, 32), np.int8), np.full((48, 1), 2.0, np.float32))
    stored = ascend.encode(block(torch_dtype=dtype), O_PROJ, QuantizedLinear(STATIC, weight, 4.0))["deq_scale"]
    assert stored.dtype == stored_as
    assert stored[0] == (0.5 if stored_as == np.float32 else 0x3F000000)  # 2 / 4


def test_scales_of_inputs_are_divisors_but_in_the_mindformers_format():
    weight = linear(STATIC, O_PROJ).weight
    made = QuantizedLinear(STATIC, weight, 16.0)  # x * 16 is rounded
    found = {name: each.encode(block(), O_PROJ, made)["input_scale"] for name, each in FORMATS.items()}
    assert found["ascend"].tolist() == [0.0625]
    assert found["compressed-tensors"].tolist() == [0.0625]
    assert found["mindformers"].astype(np.float32).tolist() == [16.0] * 32


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("offset", [0, -7, 100])
def test_every_format_computes_the_same_static_layer_bias_and_zero_point_included(name, offset):
    """As each format's reader would: quantize with its scale, integer product, its corrections, its scale."""
    made, where = linear(STATIC, O_PROJ, offset=offset), block()
    stored = {key: value.astype(np.float64) for key, value in FORMATS[name].encode(where, O_PROJ, made).items()}
    bias = where.bias(O_PROJ).astype(np.float64)
    x = np.random.default_rng(5).integers(-27, 28, (6, 32)) / 21.25  # on the grid, and inside it after any offset here
    if name == "mindformers":  # QuantV2 and QuantBatchMatmul, then the bias
        codes = np.rint(x * stored["input_scale"]) + stored["input_offset"]
        y = (codes @ stored["weight"].T + stored["quant_bias"]) * stored["deq_scale"] + bias
    elif name == "ascend":  # npu_quant_matmul: the bias is in quant_bias, to half a step
        codes = np.rint(x / stored["input_scale"]) + stored["input_offset"]
        y = (codes @ stored["weight"].T + stored["quant_bias"]) * stored["deq_scale"]
    else:
        codes = np.rint(x / stored["input_scale"]) + stored.get("input_zero_point", np.zeros(1))
        y = (
            (codes - stored.get("input_zero_point", 0))
            * stored["input_scale"]
            @ (stored["weight"] * stored["weight_scale"]).T
        )
        y = y + bias
    wanted = x @ made.weight.dequantize().T.astype(np.float64) + bias
    half_step = made.weight.scale[:, 0] / 21.25 / 2 if name == "ascend" else 0
    assert (np.abs(y - wanted) <= half_step * (1 + 1e-4) + 1e-5 * np.abs(wanted).max()).all()


# --- what is refused ------------------------------------------------------------------------------------------------


def put(name, key, change, said, scheme=STATIC):
    return name, key, change, said, scheme


REFUSED = {
    "asymmetric weights": put("ascend", "weight_offset", lambda t: t + 1, "symmetric weights", DYNAMIC),
    "asymmetric groups": put("ascend", "weight_offset_second", lambda t: t + 1, "symmetric weights", INT4),
    "other codes": put("ascend", "weight", lambda t: t ^ 1, "scale_bias", INT4),
    "another bias": put("ascend", "quant_bias", lambda t: t + 1, "quant_bias"),
    "half a zero point": put("ascend", "input_offset", lambda t: t + np.float32(0.5), "whole number"),
    "more than 32 bits": put("ascend", "deq_scale", lambda t: t.astype(np.int64) + (1 << 40), "lowest 32"),
    "unpacked range": put("compressed-tensors", "weight", lambda t: t * 2, "wanted -8 to 7", INT4),
    "bias in quant_bias": put("mindformers", "quant_bias", lambda t: t + 1, "quant_bias"),
    "scale per channel": put("mindformers", "input_scale", lambda t: t * np.arange(1, 33), "differs between channels"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_decoding_would_have_to_drop_is_refused_by_name(fault):
    name, key, change, said, scheme = REFUSED[fault]
    made = linear(scheme, O_PROJ, groups=2 if scheme.arithmetic == W4A8 else 1)
    stored = FORMATS[name].encode(block(), O_PROJ, made)
    FORMATS[name].decode(block(), O_PROJ, made.scheme, stored)
    with pytest.raises(CheckpointError, match=said) as raised:
        FORMATS[name].decode(block(), O_PROJ, made.scheme, {**stored, key: change(stored[key])})
    assert str(raised.value).startswith(
        f"self_attn.o_proj.{key}" if fault != "other codes" else "self_attn.o_proj.scale_bias"
    )


def read_settings(tmp_path, **changes):
    raw = compressed_tensors.metadata(config(), Plan.uniform(config(), DYNAMIC))["config.json"]
    raw["quantization_config"].update(changes)
    plan = compressed_tensors.read_plan(tmp_path, ModelConfig.from_dict(raw, where="test"))
    return {name: scheme for name, _, scheme in plan}


def group(targets=("Linear",), weights=(), inputs=()):
    ours = compressed_tensors.metadata(config(), Plan.uniform(config(), DYNAMIC))["config.json"]["quantization_config"]
    scheme = ours["config_groups"]["group_0"]
    return {
        "targets": list(targets),
        "weights": {**scheme["weights"], **dict(weights)},
        "input_activations": {**scheme["input_activations"], **dict(inputs)},
    }


def test_targets_and_ignore_are_names_classes_or_patterns(tmp_path):
    four = {"num_bits": 4, "strategy": "group", "group_size": 16}
    groups = {
        "a": group(),
        "b": group(["re:.*mlp.*"], four),
        "c": group(["model.layers.1.self_attn.q_proj"], (), {"dynamic": False, "strategy": "tensor"}),
    }
    schemes = read_settings(
        tmp_path, config_groups=groups, ignore=["lm_head", "re:.*down_proj", "model.layers.0.self_attn.k_proj"]
    )
    assert schemes["model.layers.0.mlp.up_proj"] == INT4.grouped(16)
    assert schemes["model.layers.0.mlp.down_proj"] is None
    assert schemes["model.layers.0.self_attn.k_proj"] is None
    assert schemes["model.layers.1.self_attn.k_proj"] == DYNAMIC
    assert schemes["model.layers.1.self_attn.q_proj"] == STATIC


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "pack-quantized"}, "format is 'pack-quantized'"),
        ({"config_groups": {"a": group(weights={"symmetric": False})}}, "config_groups.a"),
        ({"config_groups": {"a": group(weights={"type": "float"})}}, "config_groups.a"),
        ({"config_groups": {"a": group(weights={"strategy": "tensor"})}}, "config_groups.a"),
        ({"config_groups": {"a": group(inputs={"num_bits": 4})}}, "config_groups.a"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}, "config_groups.a"),
        ({"config_groups": []}, "config_groups"),
        (
            {
                "config_groups": {
                    "a": group(weights={"num_bits": 4, "strategy": "group", "group_size": 16}),
                    "b": group(["re:.*mlp.*"], {"num_bits": 4, "strategy": "channel"}),
                }
            },
            "group sizes",
        ),
    ],
)
def test_a_scheme_that_is_not_computed_here_is_refused_naming_it(tmp_path, changes, said):
    read_settings(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        read_settings(tmp_path, **changes)


# --- other programs' files ------------------------------------------------------------------------------------------

MSMODELSLIM = ("w8a8_dynamic", "w4a8_dynamic", "w8a8")


def unpacked(root, name, folder):
    """The golden as the directory it was; (directory, {tensor name: array})."""
    with np.load(root / "tests/golden/formats" / f"{name}.npz") as archive:
        values = dict(archive)
    folder.mkdir()
    tensors = {key.removeprefix("tensor/"): value for key, value in values.items() if key.startswith("tensor/")}
    save_file(tensors, folder / "model.safetensors")
    for key, value in values.items():
        if key.startswith("json/"):
            (folder / key.removeprefix("json/")).write_text(str(value))
    return folder, tensors, values


def source_of(values, checkpoint_tool, folder):
    """The float checkpoint that the golden was made from."""
    raw = json.loads(str(values["json/config.json"]))
    known = {key: value for key, value in raw.items() if key not in ("quantization_config", "dtype")}
    checkpoint_tool.write_checkpoint(folder, {**known, "torch_dtype": "float32"}, seed=int(values["seed"]), dtype="float32")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(values["weights_sha256"]), "the golden was made from other weights"
    return CheckpointReader(folder)


GOLDENS = [*(f"msmodelslim_{scheme}" for scheme in MSMODELSLIM), "llmcompressor_w8a8"]


@pytest.mark.parametrize("name", GOLDENS)
def test_another_programs_checkpoint_dequantizes_to_within_half_a_step_of_its_float_weights(
    name, root, tmp_path, checkpoint_tool
):
    directory, _, values = unpacked(root, name, tmp_path / "theirs")
    source = source_of(values, checkpoint_tool, tmp_path / "float")
    reader = open_checkpoint(directory)
    assert isinstance(reader, QuantizedReader)
    words = {word_of(scheme) for _, _, scheme in reader.plan}
    assert words == {"W8A8_DYNAMIC" if "llm" in name else name.removeprefix("msmodelslim_").upper()}
    for index in range(reader.config.num_hidden_layers):
        stored, original = reader.rounded_block(index), source.block(index)
        assert len(stored.linears) == 7
        for site in layout.SITES:
            weight = stored.linears[site.name].weight
            error = np.abs(weight.dequantize() - original.weight(site)) / weight.scale
            assert error.max() <= 0.5 + 1e-4
            assert error.max() > 0.4  # it was rounded
        assert all(np.array_equal(stored.floats[bias], original[bias]) for bias in stored.floats.tensors)


@pytest.mark.parametrize("name", GOLDENS)
def test_another_programs_checkpoint_is_sound_and_is_written_again_tensor_for_tensor(name, root, tmp_path):
    directory, tensors, _ = unpacked(root, name, tmp_path / "theirs")
    assert verify(directory).faults == ()
    reader = QuantizedReader(directory)
    export(reader, reader.format, tmp_path / "again")
    again = {key: value for file in (tmp_path / "again").glob("*.safetensors") for key, value in load_file(file).items()}
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        assert (again[key].dtype, again[key].shape) == (value.dtype, value.shape), key
        if key.endswith(".scale_bias"):  # float32 sums: theirs in torch's order, ours rounded once
            np.testing.assert_allclose(again[key], value, rtol=0, atol=8e-6)
        else:
            assert again[key].tobytes() == value.tobytes(), key
    assert verify(tmp_path / "again").faults == ()


@pytest.mark.parametrize("scheme", MSMODELSLIM)
def test_the_description_is_msmodelslims(scheme, root, tmp_path):
    directory, _, _ = unpacked(root, f"msmodelslim_{scheme}", tmp_path / "theirs")
    reader = QuantizedReader(directory)
    theirs = json.loads((directory / ASCEND_FILE).read_text())
    ours = ascend.metadata(reader.config, reader.plan)[ASCEND_FILE]
    if scheme == "w4a8_dynamic":  # it calls a model of W4A8 layers FLOAT
        assert (theirs.pop("model_quant_type"), ours.pop("model_quant_type")) == ("FLOAT", "W4A8_DYNAMIC")
    assert ours == theirs


def test_a_tied_head_is_described_as_float_because_vllm_ascend_looks_it_up():
    tied = config(tie_word_embeddings=True)
    made = ascend.metadata(tied, Plan.uniform(tied, STATIC))[ASCEND_FILE]
    assert layout.HEAD not in layout.outer_shapes(tied)
    assert made[layout.HEAD] == FLOAT


def test_an_older_int4_layout_is_refused_by_its_version(root, tmp_path):
    directory, _, _ = unpacked(root, "msmodelslim_w4a8_dynamic", tmp_path / "theirs")
    path = directory / ASCEND_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "0"}))
    with pytest.raises(CheckpointError, match=r"version is '0'.*two int4"):
        QuantizedReader(directory)


@pytest.mark.parametrize("size", [-32, 3, 32.5, True, "many", [32], None])
def test_a_group_size_that_is_none_is_refused_naming_file_and_key(size, root, tmp_path):
    directory, _, _ = unpacked(root, "msmodelslim_w4a8_dynamic", tmp_path / "theirs")
    path = directory / ASCEND_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "group_size": size}))
    with pytest.raises(CheckpointError) as raised:
        QuantizedReader(directory)
    assert str(raised.value).startswith(f"{path}: group_size is {size!r}, wanted an even whole number")


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8_g128"])  # groups of 64 are 4.5 bits: 0.563
def test_w4a8_of_the_7b_is_at_most_0_56_of_w8a8_on_disk(scheme):
    """By the sizes that --dry-run tells, which the pipeline's tests compare with the files."""
    shape = ModelConfig.from_dict(
        {
            **CONFIG,
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 153376,
        },
        where="7B",
    )
    chosen = PRESETS[scheme]

    def size(preset, name):
        return sum(layer_bytes(FORMATS[name], shape, site, preset) for site in layout.SITES)

    assert size(chosen, "mindformers") <= 0.56 * size(PRESETS["w8a8"], "mindformers")
    assert size(chosen, "compressed-tensors") >= size(PRESETS["w8a8"], "compressed-tensors")  # a byte for each int4
    # ascend stores a second scale for each group and an int64 zero beside it
    assert size(chosen, "ascend") <= (0.56 if scheme == "w4a8" else 0.60) * size(PRESETS["w8a8"], "ascend")
