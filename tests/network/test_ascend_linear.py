"""The int4 tensors handed to the Ascend operators, put into the formulas CANN documents, give the quantized layer."""

import ml_dtypes
import numpy as np
import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import load_recipe
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import PRESETS
from tests.conftest import MINI

CELLS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(scheme, w4a8) -> the Ascend network with the embedded checkpoint's weights in it, and their reader."""
    made = {}

    def make(scheme, w4a8="auto"):
        runtime.start("cpu", "graph")
        from ms_pangu_quant.backends.ascend import BACKEND
        from ms_pangu_quant.network.pangu import build_network
        from ms_pangu_quant.network.weights import served_tensors

        if (scheme, w4a8) not in made:
            folder = tmp_path_factory.mktemp("int4")
            (folder / "recipe.yaml").write_text(f"scheme: {scheme}\n")
            quantize(CheckpointReader(MINI), load_recipe(folder / "recipe.yaml"), folder / "out")
            reader = QuantizedReader(folder / "out")
            network = build_network(
                reader.config,
                reader.plan,
                num_blocks=1,
                options={"w4a8": w4a8},
                backend=BACKEND,
            )
            network.load_tensors(served_tensors(reader, BACKEND))
            made[scheme, w4a8] = network, reader
        return made[scheme, w4a8]

    return make


def layer_of(network, index, cell):
    found = network.model.decoder.layers[index]
    for name in cell.split("."):
        found = getattr(found, name)
    return found


def weights_of(reader, index, cell):
    """The fused layer's codes times scales [out, in], float64."""
    linears = reader.rounded_block(index).linears
    parts = [linears[site].weight for site in CELLS[cell]]
    scales = [np.repeat(part.scale, part.codes.shape[1] // part.scale.shape[1], axis=1) for part in parts]
    return np.concatenate([part.codes * scale.astype(np.float64) for part, scale in zip(parts, scales, strict=True)])


def nibbles(packed):
    """qint4x2 [.., in, out/2] -> codes [.., in, out], the low nibble first, as int4 in two's complement."""
    packed = packed.view(np.uint8).astype(np.int64)
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return np.where(both > 7, both - 16, both)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scheme", ["w4a8", "w4a8_g256"])
def test_grouped_matmul_gets_the_integers_scales_and_bias_of_the_layer(scheme, cell, loaded):
    network, reader = loaded(scheme)
    for index in (0, reader.config.num_hidden_layers - 1):
        layer, wanted = layer_of(network, index, cell), weights_of(reader, index, cell)
        codes = nibbles(layer.weight.asnumpy())[0]
        bits = layer.group_scale.asnumpy()[0]
        assert (bits >> 32 == 0).all()
        scale = np.repeat(bits.astype(np.uint32).view(np.float32), 256, axis=0).astype(np.float64)
        np.testing.assert_array_equal((codes * scale).T, wanted)
        x = np.random.default_rng(index).integers(-127, 128, (5, wanted.shape[1])).astype(np.float64)
        token_scale = np.random.default_rng(1).random((5, 1))
        out = ((x - 8) @ (codes * scale) + layer.gmm_bias.asnumpy()) * token_scale  # as documented
        np.testing.assert_allclose(out, x @ wanted.T * token_scale, atol=1e-6 * np.abs(out).max())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scheme", ["w4a8_g128", "w4a8_g32"])
def test_weight_only_matmul_gets_the_integers_and_the_scales_in_bfloat16(scheme, cell, loaded):
    network, reader = loaded(scheme)
    layer, wanted = layer_of(network, 1, cell), weights_of(reader, 1, cell)
    scale = layer.group_scale.asnumpy().astype(np.float32)
    scale = np.repeat(scale, wanted.shape[1] // len(scale), axis=0)
    codes = nibbles(layer.weight.asnumpy())
    np.testing.assert_allclose((codes * scale).T, wanted, rtol=2**-8)
    assert (scale == scale.astype(ml_dtypes.bfloat16)).all()


def test_the_weights_of_one_scale_a_channel_can_be_computed_either_way(loaded):
    network, reader = loaded("w4a8", "weight_only")
    layer = layer_of(network, 0, "mlp.linear_fc2")
    assert layer.group_scale.shape == (reader.config.hidden_size,)


def test_what_is_computed_with_float_activations_is_said_once(loaded, caplog):
    caplog.set_level("WARNING", logger="ms_pangu_quant")
    loaded("w4a8_g64")
    said = [record.message for record in caplog.records if "W4A16" in record.message]
    assert said == ["W4A8 with group size 64 is computed as W4A16 here: int4 weights, activations not quantized"]


@pytest.mark.parametrize(
    ("scheme", "w4a8", "message"),
    [
        ("w4a8_g128", "grouped", "groups of 128 inputs, GroupedMatmulV4 takes multiples of 256"),
        ("w4a8", "integers", "got 'integers', wanted auto, grouped or weight_only"),
    ],
)
def test_a_way_that_the_operator_does_not_have_is_refused(scheme, w4a8, message, loaded):
    with pytest.raises(BackendError, match=message):
        loaded(scheme, w4a8)


def test_a_layer_too_narrow_for_grouped_matmul_is_named():
    runtime.start("cpu", "graph")
    from ms_pangu_quant.backends.ascend import BACKEND
    from ms_pangu_quant.checkpoint.config import ModelConfig
    from ms_pangu_quant.network.pangu import build_network

    raw = {"model_type": "PanguEmbedded", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    config = ModelConfig.from_dict(raw, where="test")
    with pytest.raises(
        BackendError,
        match="a W4A8 layer of 128 inputs and 128 outputs on one device: GroupedMatmulV4 takes a multiple of 256",
    ):
        build_network(config, Plan.uniform(config, PRESETS["w4a8"]), num_blocks=1, backend=BACKEND)
