"""checkpoint/config.py: openPangu-Embedded and Llama are one network; whatever is another is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig, check_same_model, differences
from ms_pangu_quant.errors import CheckpointError

PANGU_1B = {  # the published config.json, without what says nothing about the graph
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 26,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-05,
    "rope_theta": 4000000.0,
    "max_position_embeddings": 32768,
    "vocab_size": 153376,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
PANGU_7B = {
    **PANGU_1B,
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
}
LLAMA = {  # Llama-2-7B's
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
ATTENTION = frozenset({layout.Q_PROJ, layout.K_PROJ, layout.V_PROJ, layout.O_PROJ})  # which have biases, or none has
NONE = frozenset()
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def read(raw, without=(), **changes):
    return ModelConfig.from_dict(
        {key: value for key, value in {**raw, **changes}.items() if key not in without}, where="config.json"
    )


@pytest.mark.parametrize(("raw", "kv_heads", "tied", "theta"), [(PANGU_1B, 6, True, 4e6), (PANGU_7B, 8, False, 16e6)])
def test_the_published_openpangu_configs_are_read_as_they_are(raw, kv_heads, tied, theta):
    config = read(raw)
    assert {size: getattr(config, size) for size in SIZES} == {size: raw[size] for size in SIZES}
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, 128)
    assert (config.rope_theta, config.rms_norm_eps) == (theta, 1e-5)
    assert (config.biased, config.tie_word_embeddings) == (ATTENTION, tied)
    assert (config.eos_token_id, config.pad_token_id) == (45892, 0)
    assert config.torch_dtype == "bfloat16"
    assert config.raw == raw


def test_a_llama_config_differs_in_defaults_alone():
    config = read(LLAMA, without=("rms_norm_eps",))
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)  # no grouped queries
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-6)
    assert (config.biased, config.tie_word_embeddings) == (NONE, False)
    assert config.pad_token_id is None
    assert config.torch_dtype == "float16"


@pytest.mark.parametrize(
    ("raw", "changes", "wanted"),
    [
        (PANGU_1B, {}, True),
        (PANGU_1B, {"bias": False}, False),
        (PANGU_1B, {"attention_bias": False}, True),
        (LLAMA, {}, False),
        (LLAMA, {"attention_bias": True}, True),
        (LLAMA, {"attention_bias": False}, False),
        (LLAMA, {"bias": True}, False),
        (LLAMA, {"attention_bias": True, "mlp_bias": False}, True),
    ],
)
def test_each_family_has_its_own_name_for_the_attention_biases(raw, changes, wanted):
    assert read(raw, **changes).biased == (ATTENTION if wanted else NONE)


@pytest.mark.parametrize(
    ("raw", "changes", "wanted"),
    [
        (PANGU_1B, {"output_bias": False}, ATTENTION - {layout.O_PROJ}),
        (PANGU_1B, {"output_bias": True}, ATTENTION),
        (PANGU_1B, {"output_bias": None}, ATTENTION),
        (PANGU_1B, {"bias": False, "output_bias": True}, {layout.O_PROJ}),
        (LLAMA, {"output_bias": True}, NONE),
    ],
)
def test_openpangu_may_say_of_the_output_layer_alone_whether_it_has_a_bias(raw, changes, wanted):
    assert read(raw, **changes).biased == wanted


def test_openpangus_class_defaults_fill_what_the_file_leaves_out():
    config = read(PANGU_7B, without=("bias", "rms_norm_eps", "rope_theta", "torch_dtype", "tie_word_embeddings"))
    assert (config.biased, config.rms_norm_eps, config.rope_theta) == (ATTENTION, 1e-5, 16e6)
    assert (config.torch_dtype, config.tie_word_embeddings) == ("bfloat16", False)


def test_rope_parameters_of_transformers_5_are_the_same_as_rope_theta():
    parameters = {"rope_type": "default", "rope_theta": 4000000.0}
    assert read(PANGU_1B, without=("rope_theta",), rope_parameters=parameters).rope_theta == 4e6
    assert read(PANGU_1B, without=("rope_theta",), rope_parameters={"rope_theta": 500.0}).rope_theta == 500.0
    assert read(LLAMA, rope_parameters={"rope_type": "default"}).rope_theta == 10000.0
    assert read(PANGU_1B, dtype="float32", without=("torch_dtype",)).torch_dtype == "float32"


def test_a_head_dim_of_its_own_need_not_divide_hidden_size():
    assert read(PANGU_1B, head_dim=96).head_dim == 96
    assert read(PANGU_1B, hidden_size=1537, head_dim=128).hidden_size == 1537
    assert read(PANGU_1B, head_dim=None).head_dim == 128


def test_a_mixture_of_experts_is_called_so_though_it_has_the_keys_of_another_too():
    """Some of openPangu-R-72B-2512's config.json."""
    sinks = {"qk_nope_dim": 128, "qk_rope_dim": 64, "param_sink_number": 128}
    with pytest.raises(CheckpointError, match=r"'num_experts' marks .*openPangu-R-72B \(a mixture of experts\)"):
        read(PANGU_7B, model_type="PanguProMoE", num_experts=80, **sinks)


def test_the_diffusion_checkpoints_are_told_from_the_7b_by_the_one_key_that_differs():
    """openPangu-R-7B-Diffusion's config.json, and 7B-Diffusion-Base's, whose eos_token_id is 2."""
    for changes in ({}, {"eos_token_id": 2}):
        with pytest.raises(CheckpointError, match=r"'rms_norm_eps' 1e-06 .* marks an openPangu-7B-Diffusion"):
            read(PANGU_7B, rms_norm_eps=1e-06, **changes)
    assert read(PANGU_7B, hidden_size=2048, rms_norm_eps=1e-06).rms_norm_eps == 1e-06
    assert read(PANGU_7B).rms_norm_eps == 1e-05


def test_the_first_of_several_end_tokens_counts():
    assert read(LLAMA, eos_token_id=[128001, 128009]).eos_token_id == 128001
    assert read(LLAMA, eos_token_id=None).eos_token_id is None
    assert read(LLAMA, eos_token_id=[]).eos_token_id is None


@pytest.mark.parametrize(
    ("changes", "key", "variant"),
    [
        ({"param_sink_number": 128}, "param_sink_number", "openPangu-R-7B"),
        ({"qk_rope_dim": 32}, "qk_rope_dim", "openPangu-R-7B"),
        ({"qk_nope_dim": 96}, "qk_nope_dim", "openPangu-R-7B"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types", "openPangu-R-7B"),
        ({"sliding_window": 128}, "sliding_window", "sliding-window attention"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers", "multi-token-prediction"),
        ({"vision_config": {"depth": 26}}, "vision_config", "openPangu-VL"),
        ({"num_experts": 64}, "num_experts", "openPangu-Pro-MoE"),
        ({"num_routed_experts": 64}, "num_routed_experts", "openPangu-Pro-MoE"),
        ({"n_routed_experts": 256}, "n_routed_experts", "openPangu-Ultra-MoE"),
        ({"num_local_experts": 8}, "num_local_experts", "mixture of experts"),
        ({"kv_lora_rank": 512}, "kv_lora_rank", "latent attention"),
        ({"model_type": "openpangu_vl", "vision_config": {"depth": 26}}, "vision_config", "openPangu-VL"),
        ({"model_type": "mixtral"}, "model_type", "'PanguEmbedded', 'llama'"),
        ({"model_type": None}, "model_type", "'PanguEmbedded', 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling", "llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters", "yarn"),
        ({"mlp_bias": True}, "mlp_bias", "no biases in its MLP"),
        ({"hidden_act": "gelu"}, "hidden_act", "wanted 'silu'"),
    ],
)
@pytest.mark.parametrize("raw", [PANGU_1B, LLAMA], ids=["openpangu", "llama"])
def test_another_graph_is_refused_by_name(raw, changes, key, variant):
    with pytest.raises(CheckpointError) as raised:
        read(raw, **changes)
    assert str(raised.value).startswith("config.json: ")
    assert key in str(raised.value)
    assert variant in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 26},
        {"sliding_window": None},
        {"sliding_window": 128, "use_sliding_window": False},
        {"num_experts": 0},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {}},
        {"mlp_bias": False},
        {"num_nextn_predict_layers": 0},
    ],
)
def test_keys_that_say_the_graph_is_the_plain_one_are_accepted(changes):
    assert read(PANGU_1B, **changes).head_dim == 128


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "1536", True, 2**31, [1536]])
def test_a_size_that_is_not_a_positive_whole_number_is_refused_by_name(key, value):
    with pytest.raises(CheckpointError, match=rf"^config\.json: {key} is "):
        read(PANGU_1B, **{key: value})


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_missing_is_refused_by_name(key):
    with pytest.raises(CheckpointError, match=rf"^config\.json: {key} is missing"):
        read(PANGU_1B, without=(key,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads 12 is not a multiple of num_key_value_heads 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "1536 is not a multiple of num_attention_heads 7"),
        ({"head_dim": 127}, "head_dim is 127, wanted an even number"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"layer_types": 5}, "layer_types"),
    ],
)
def test_values_that_contradict_each_other_or_sense_are_refused(changes, said):
    with pytest.raises(CheckpointError, match=said):
        read(PANGU_1B, **changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no config.json here"),
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[]", "got a JSON list"),
        (b"7", "got a JSON int"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"{}", "model_type is None"),
    ],
)
def test_a_file_that_is_no_config_is_refused_naming_it(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as raised:
        ModelConfig.from_file(tmp_path / "config.json")
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-8"])
def test_a_file_as_windows_editors_save_it_is_read(tmp_path, encoding):
    (tmp_path / "config.json").write_bytes(json.dumps({**PANGU_1B, "_note": "\u4e2d"}, ensure_ascii=False).encode(encoding))
    assert ModelConfig.from_file(tmp_path / "config.json").raw == {**PANGU_1B, "_note": "\u4e2d"}


@pytest.mark.parametrize(
    ("content", "todo"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "; run git lfs pull$"),
        (b"<!DOCTYPE html><title>Sign in</title>", r"; it is a web page \(a login or proxy page\?\); download it again$"),
        (b"\n <html>", r"; it is a web page \(a login or proxy page\?\); download it again$"),
        (b'{"a": 1,}', r"\)$"),
    ],
)
def test_a_file_that_was_not_downloaded_says_what_to_do(tmp_path, content, todo):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: not readable as JSON \(.*{todo}"):
        ModelConfig.from_file(tmp_path / "config.json")


def put_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PANGU_1B))
    return folder


def said_of(folder):
    with pytest.raises(CheckpointError, match=f"^{folder}: no config.json here") as raised:
        ModelConfig.from_file(folder / "config.json")
    return str(raised.value)


def test_a_folder_around_the_checkpoint_names_it(tmp_path):
    cache = tmp_path / "hub" / "models--org--name"
    old = put_checkpoint(cache / "snapshots" / ("0" * 40))
    assert f"but in {old}: name that" in said_of(cache)
    assert f"but in {old}: name that" in said_of(cache / "snapshots")
    assert f"but in {old}: name that" in said_of(cache.parent)
    new = put_checkpoint(cache / "snapshots" / ("f" * 40))
    assert f"but in {old} and 1 more: name one" in said_of(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(new.name)
    assert f"but in {new}: name that" in said_of(cache)
    only = put_checkpoint(tmp_path / "unpacked" / "model")
    assert f"but in {only}: name that" in said_of(only.parent)
    deep = put_checkpoint(tmp_path / "models" / "org" / "name")
    assert f"but in {deep}: name that" in said_of(tmp_path / "models")
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "config.json").symlink_to("../../blobs/0a1b")
    assert "it is a link to ../../blobs/0a1b, which is not there: copy" in said_of(copied)
    (tmp_path / "empty").mkdir()
    assert "but in" not in said_of(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "an adapter, which counts once it is merged" in said_of(tmp_path / "empty")


def test_from_file_reads_what_from_dict_reads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PANGU_7B), encoding="utf-8")
    assert ModelConfig.from_file(tmp_path / "config.json") == read(PANGU_7B)


# ---- whether two are of one model

OTHER = {  # field -> a config.json of another model by this field alone
    "hidden_size": {"hidden_size": 3072, "head_dim": 128},
    "intermediate_size": {"intermediate_size": 6145},
    "num_hidden_layers": {"num_hidden_layers": 25},
    "num_attention_heads": {"num_attention_heads": 6, "head_dim": 128},
    "num_key_value_heads": {"num_key_value_heads": 12},
    "head_dim": {"head_dim": 64},
    "vocab_size": {"vocab_size": 153377},
    "biased": {"bias": False},
    "rms_norm_eps": {"rms_norm_eps": 1e-6},
    "rope_theta": {"rope_theta": 16e6},
}
SAME = {  # what may differ between a checkpoint and what was made of it
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "online_hadamard": {"quantization_config": {"quant_method": "golden-stick-hadamard"}},
    "max_position_embeddings": {"max_position_embeddings": 4096},
    "eos_token_id": {"eos_token_id": [5, 6]},
    "pad_token_id": {"pad_token_id": None},
    "torch_dtype": {"torch_dtype": "float32"},
    "raw": {"model_type": "llama", "attention_bias": True},
}


def test_every_field_of_a_config_either_makes_another_model_or_does_not():
    assert sorted([*OTHER, *SAME]) == sorted(field.name for field in dataclasses.fields(ModelConfig))


@pytest.mark.parametrize("field", OTHER)
def test_another_shape_or_function_is_another_model_and_is_named(field):
    one, other = read(PANGU_1B), read(PANGU_1B, **OTHER[field])
    told = {ATTENTION: "[k o q v]", NONE: "[]"} if field == "biased" else {}
    called = "the set of layers with biases" if field == "biased" else field
    found, wanted = (told.get(value, value) for value in (getattr(other, field), getattr(one, field)))
    assert list(differences(one, other)) == [f"{called} is {found}, wanted {wanted}"]
    assert len(list(differences(other, one))) == 1


@pytest.mark.parametrize("field", SAME)
def test_what_a_rewrite_of_a_checkpoint_or_its_user_may_change_makes_no_other_model(field):
    one, other = read(PANGU_1B), read(PANGU_1B, **SAME[field])
    assert getattr(one, field) != getattr(other, field)
    assert list(differences(one, other)) == []
    assert list(differences(other, one)) == []


def test_directories_of_two_models_are_refused_with_all_that_differs():
    one, other = read(PANGU_1B), read(PANGU_1B, rope_theta=16e6, num_key_value_heads=12)
    check_same_model(Path("mine"), one, Path("float"), one)
    with pytest.raises(CheckpointError) as raised:
        check_same_model(Path("mine"), other, Path("float"), one)
    assert str(raised.value) == (
        "mine: num_key_value_heads is 12, wanted 6; rope_theta is 16000000.0, wanted 4000000.0, as in float: these are not "
        "the same model; give two directories of one model"
    )
