"""configs/mindformers: read by MindFormers' own parser, they give this package's network the 1B's and the 7B's shape."""

import json

import pytest
from mindformers.models.build_config import get_model_config
from mindformers.tools.register.config import MindFormerConfig
from mindformers.tools.register.register import MindFormerModuleType, MindFormerRegister

import ms_pangu_quant.network.pangu  # noqa: F401 (registers the network)
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.formats import mindformers
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from tests.conftest import ROOT
from tools.dev.make_checkpoint import make_config

FILES = sorted((ROOT / "configs/mindformers").glob("*.yaml"))
WANTED = {  # MindFormers' name of a field -> the value openPangu-Embedded's config.json gives it
    "1b": {"hidden_size": 1536, "ffn_hidden_size": 6144, "num_layers": 26, "num_attention_heads": 12,
           "num_query_groups": 6, "kv_channels": 128, "rotary_base": 4e6, "vocab_size": 153376},
    "7b": {"hidden_size": 4096, "ffn_hidden_size": 12800, "num_layers": 34, "num_attention_heads": 32,
           "num_query_groups": 8, "kv_channels": 128, "rotary_base": 16e6, "vocab_size": 153376},
}  # fmt: skip
SAME = {
        "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": True, "add_mlp_fc1_bias_linear": False,
        "add_mlp_fc2_bias_linear": False, "normalization": "RMSNorm", "gated_linear_unit": True, "hidden_act": "silu",
}  # fmt: skip


def parts(file):
    _, _, size, scheme = file.stem.split("_")
    return size, scheme


def test_there_is_one_for_each_size_and_scheme():
    assert {parts(file) for file in FILES} == {(size, scheme) for size in ("1b", "7b") for scheme in ("w8a8", "w4a8")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_mindformers_makes_the_models_network_config_of_it(file, tmp_path):
    size, scheme = parts(file)
    raw = make_config(size)
    config = ModelConfig.from_dict(raw, where="test")
    recipe = load_recipe(find_recipe({"w8a8": "w8a8", "w4a8": "w4a8_g256"}[scheme]))
    plan = recipe.plan(config)
    for name, value in mindformers.metadata(config, plan).items():
        (tmp_path / name).write_text(json.dumps(value))

    parsed = MindFormerConfig(str(file))
    assert (parsed.run_mode, parsed.use_legacy, parsed.load_ckpt_format) == ("predict", False, "safetensors")
    assert parsed.context.mode == 0
    assert parsed.model.model_config.quantization == "golden-stick"
    parsed.model.pretrained_model_dir = str(tmp_path)
    model_config = get_model_config(parsed.model)
    assert type(model_config).__name__ == "PanguEmbeddedConfig"
    assert model_config.tie_word_embeddings == (size == "1b")
    network_class = MindFormerRegister.get_cls(MindFormerModuleType.MODELS, model_config.architectures[0])
    assert network_class.__module__.startswith("ms_pangu_quant.network.")
    transformer = model_config.convert_to_transformer_config()
    found = {name: getattr(transformer, name) for name in {**WANTED[size], **SAME}}
    assert found == {**WANTED[size], **SAME}
    for name, dtype in parsed.model.model_config.items():
        if name.endswith("dtype"):
            assert str(getattr(transformer, name)).lower() == dtype, name
