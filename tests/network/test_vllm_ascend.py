"""vllm-ascend's own Python on our exports: what its quantization makes of the tensors, and the formulas it then computes.

It needs an environment that has vLLM, and vllm-ascend's package; `make vllm-ascend` makes both and runs this.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from ms_pangu_quant.checkpoint.block import QuantizedLinear
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from tests.conftest import rounded_mini

HOME = Path(os.environ.get("VLLM_ASCEND_HOME", "none"))
LAYERS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
TOKENS = 9

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (HOME / "source/vllm_ascend").is_dir(), reason="needs `make vllm-ascend`"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the process found for each checkpoint, its reader, and the inputs by their number."""
    folder = tmp_path_factory.mktemp("vllm_ascend")
    readers = {}
    for scheme in ("w8a8", "w8a8_static", "w4a8", "w4a8_g128", "w4a8_g256"):
        (folder / f"{scheme}.yaml").write_text(f"scheme: {scheme}\n")
        rounded_mini(folder / f"{scheme}.yaml", folder / "own" / scheme, 8)
        readers[scheme] = QuantizedReader(folder / "own" / scheme)
        for name in ("ascend", "compressed-tensors"):
            export(readers[scheme], FORMATS[name], folder / f"{name}.{scheme}")
    generator = np.random.default_rng(0)
    given = {width: generator.normal(size=(TOKENS, width)).astype(np.float32) for width in (256, 768)}
    np.savez(folder / "inputs.npz", **{str(width): value for width, value in given.items()})
    (folder / "out").mkdir()
    script = Path(__file__).with_name("vllm_ascend_process.py")
    command = [HOME / "env/bin/python", script, HOME / "source", folder / "inputs.npz", folder / "out"]
    exports = sorted(path for path in folder.iterdir() if "." in path.name and path.is_dir())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*command, *exports], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.stem: dict(np.load(path)) for path in (folder / "out").iterdir()}
    return found, readers, {width: value.astype(ml_dtypes.bfloat16).astype(np.float64) for width, value in given.items()}


class Layer(NamedTuple):
    """What vllm-ascend gave [tokens, out], its input [tokens, in]; of our layers beside each other weight [out, in], bias
    [out], scale [out, groups]; the first of them."""

    got: np.ndarray
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    first: QuantizedLinear


def each_layer(run, name):
    found, readers, given = run
    reader = readers[name.partition(".")[2]]
    for index in range(reader.config.num_hidden_layers):
        block = reader.rounded_block(index)
        for layer, sites in LAYERS.items():
            linears = [block.linears[site] for site in sites]
            codes = np.concatenate([linear.weight.codes for linear in linears])
            scale = np.concatenate([linear.weight.scale for linear in linears])
            if linears[0].scheme.weight.bits == 4:
                scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)  # the dtype its scales are held in
            weight = QuantizedWeight(codes, scale).dequantize().astype(np.float64)
            kept = [
                block.kept.get(f"{site}.bias", np.zeros(len(linear.weight.codes)))
                for site, linear in zip(sites, linears, strict=True)
            ]
            yield Layer(
                found[name][f"{index}.{layer}"], given[codes.shape[1]], weight, np.concatenate(kept), scale, linears[0]
            )


def near(got, wanted, step=0.0):
    """To the rounding of a bfloat16 result, to a step, and to a code of an input that lies between two."""
    return (np.abs(got - wanted) <= 2**-8 * np.abs(wanted) + step + 5e-3 * wanted.std()).all()


def schemes(found):
    return {str(value) for key, value in found.items() if key.endswith(".scheme")}


@pytest.mark.parametrize("stored_as", ["ascend", "compressed-tensors"])
def test_w8a8_gives_our_layer(stored_as, run):
    name = f"{stored_as}.w8a8"
    assert schemes(run[0][name]) == {"AscendW8A8DynamicLinearMethod"}
    for layer in each_layer(run, name):
        step = np.abs(layer.x).max(axis=1, keepdims=True) / 127
        rounded = np.rint((layer.x / step).astype(np.float32)) * step
        assert near(layer.got, rounded @ layer.weight.T + layer.bias)


def test_w8a8_static_gives_our_layer_with_the_bias_in_quant_bias(run):
    name = "ascend.w8a8_static"
    assert schemes(run[0][name]) == {"AscendW8A8LinearMethod"}
    assert "input_offset" not in run[0][name]["unset"]
    for layer in each_layer(run, name):
        factor, offset = layer.first.input_scale, layer.first.input_offset
        codes = np.clip(np.rint((layer.x * factor).astype(np.float32)) + offset, -128, 127)
        wanted = (codes - offset) / factor @ layer.weight.T + layer.bias
        assert near(layer.got, wanted, step=layer.scale[:, 0] / factor / 2)


def test_w8a8_static_in_compressed_tensors_leaves_the_zero_point_as_memory_was(run):
    assert schemes(run[0]["compressed-tensors.w8a8_static"]) == {"AscendW8A8LinearMethod"}
    assert "input_offset" in run[0]["compressed-tensors.w8a8_static"]["unset"]  # and is added to every code


@pytest.mark.parametrize("scheme", ["w4a8_g128", "w4a8_g256"])
def test_w4a8_in_groups_is_w4a16_without_the_bias(scheme, run):
    """Its formula; that the kernel takes groups of 64 and 128 only is of the issues that the table names."""
    name = f"ascend.{scheme}"
    assert schemes(run[0][name]) == {"AscendW4A8DynamicLinearMethod"}
    for layer in each_layer(run, name):
        product = layer.x @ layer.weight.T
        assert near(layer.got, product)
        assert near(layer.got, product + layer.bias) != layer.bias.any()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("ascend.w4a8", "ZeroDivisionError"),
        ("compressed-tensors.w4a8", ""),
        ("compressed-tensors.w4a8_g128", ""),
    ],
)
def test_what_it_does_not_load_it_fails_on(name, error, run):
    assert str(run[0][name]["error"]).startswith(error)
