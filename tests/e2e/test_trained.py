"""What MindFormers' training saves, made by its and MindSpore's own code, quantizes to the Hugging Face form's bytes."""

import json
import shutil
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindformers.checkpoint.converter.convert_op import RenameConvertOp
from mindformers.checkpoint.converter.template import WeightTemplate
from mindformers.checkpoint.metadata import save_metadata
from mindformers.checkpoint.sharded_tensor import build_sharded_tensor
from mindformers.models.qwen3.utils import Qwen3PreTrainedModel
from mindformers.parallel_core.training_graph.base_models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from mindformers.parallel_core.training_graph.device_matrix import layout as device_layout
from mindformers.parallel_core.transformer_config import TransformerConfig
from mindformers.parallel_core.utils.model_mixin import TrainModelMixin
from mindformers.parallel_core.utils.spec_utils import build_module
from mindspore import nn
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import CARRIED_OVER
from ms_pangu_quant.cli import main
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from tests.conftest import MINI, calibration, golden, token_data

CONFIG = json.loads((MINI / "config.json").read_text())


def untied(folder, write_checkpoint):
    """A small openPangu with a head of its own and biases, in bfloat16."""
    config = json.loads(str(golden("pangu_gqa2_untied")["config"]))
    write_checkpoint(folder, config, seed=3, dtype="bfloat16")
    return folder


def converted(source, contiguous=False):
    """Hugging Face directory -> the tensors MindFormers trains, by its own converters and layout functions."""
    config = json.loads((source / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    tensors = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    mixin, qkv = TrainModelMixin(), {}
    for index in range(config["num_hidden_layers"]):
        # MindFormers' QKVBiasConvertOp works for one head a group only; its mixin takes vectors too.
        parts = [tensors.pop(f"model.layers.{index}.self_attn.{each}_proj.bias") for each in "qkv"]
        name = f"decoder.layers.{index}.self_attention.linear_q.bias"
        one = (
            mixin.concat_qkv_contiguous(*parts, name)
            if contiguous
            else mixin.concat_qkv_interleaved(*parts, name, size, groups, heads)
        )
        qkv.update({name: value.reshape(-1) for name, value in one.items()})
        if contiguous:
            parts = [tensors.pop(f"model.layers.{index}.self_attn.{each}_proj.weight") for each in "qkv"]
            qkv.update(mixin.concat_qkv_contiguous(*parts, name.replace("bias", "weight")))
            parts = [tensors.pop(f"model.layers.{index}.mlp.{each}_proj.weight") for each in ("gate", "up")]
            qkv.update(mixin.concat_linear_fc1_contiguous(*parts, f"decoder.layers.{index}.mlp.gating.weight"))
    bias = RenameConvertOp(
        hf_names="model.layers.{}.self_attn.o_proj.bias", mf_names="decoder.layers.{}.self_attention.linear_proj.bias"
    )
    template = WeightTemplate(weight_converters=[*Qwen3PreTrainedModel.weight_converters, bias])
    template.set_model_config(
        TransformerConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=size,
        )
    )
    for name, value in tensors.items():
        qkv.update(template.add_hf_weight(name, value) or {})
    template.release()
    return {name: np.ascontiguousarray(value) for name, value in qkv.items()}


def trained(source, folder, **keys):
    """The training form of a Hugging Face directory, in one file."""
    folder.mkdir()
    save_file(
        converted(source, keys.get("use_contiguous_weight_layout_attention", False)), folder / "rank0-3_20.safetensors"
    )
    return with_config(source, folder, **keys)


def with_config(source, folder, **keys):
    (folder / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), **keys}))
    for name in CARRIED_OVER:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_quantizes_the_same(source, folder, tmp_path, recipe="w8a8_rtn"):
    chosen = load_recipe(find_recipe(recipe))
    for name, each in (("from_source", source), ("from_trained", folder)):
        quantize(CheckpointReader(each), chosen, tmp_path / name)
    assert contents(tmp_path / "from_source") == contents(tmp_path / "from_trained")


@pytest.mark.parametrize("recipe", ["w8a8", pytest.param("w4a8_g128", marks=pytest.mark.slow)])
def test_a_tied_model_of_mindformers_training_quantizes_to_the_same_bytes(recipe, quantized, tmp_path):
    folder = trained(MINI, tmp_path / "trained")
    quantize(CheckpointReader(folder), load_recipe(find_recipe(recipe)), tmp_path / "out", data=calibration(128))
    assert contents(tmp_path / "out") == contents(quantized(recipe))


@pytest.mark.parametrize("contiguous", [False, True])
def test_an_untied_model_in_either_row_layout_quantizes_to_the_same_bytes(contiguous, write_checkpoint, tmp_path):
    source = untied(tmp_path / "source", write_checkpoint)
    keys = {"use_contiguous_weight_layout_attention": contiguous, "use_interleaved_weight_layout_mlp": not contiguous}
    assert_quantizes_the_same(source, trained(source, tmp_path / "trained", **keys), tmp_path)


def test_several_files_and_the_optimizers_state_change_nothing(write_checkpoint, tmp_path):
    source = untied(tmp_path / "source", write_checkpoint)
    tensors = converted(source)
    folder = tmp_path / "trained"
    folder.mkdir()
    names = sorted(tensors)
    for number in range(3):
        save_file({name: tensors[name] for name in names[number::3]}, folder / f"part{number}.safetensors")
    save_file(
        {f"{kind}.{name}": tensors[name] for name in names for kind in ("adam_m", "adam_v")}, folder / "opt.safetensors"
    )
    assert_quantizes_the_same(source, with_config(source, folder), tmp_path)


@pytest.mark.slow
def test_compare_inspect_and_generate_take_the_training_form(quantized, tmp_path, capsys):
    folder = trained(MINI, tmp_path / "trained")
    sequences = token_data("validation", 2).sequences
    wanted = compare(MINI, quantized("w8a8"), sequences)
    assert compare(folder, quantized("w8a8"), sequences) == wanted
    assert main(["verify", str(quantized("w8a8")), "--against", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert "q, k and v interleaved by key/value head" in capsys.readouterr().out
    assert main(["quantize", str(folder), "--recipe", "w8a8_rtn", "--output", str(tmp_path / "out")]) == 0
    assert "gate and up row by row" in capsys.readouterr().err
    answers = []
    for each in (MINI, folder):
        assert main(["generate", str(each), "--prompt", "1+1", "--max-new-tokens", "4"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


# --- the training network itself ------------------------------------------------------------------------------------


class Queries(nn.Cell):
    """What the training's attention computes of its input before the positions are put in."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def construct(self, hidden):
        return self.attention.get_query_key_value_tensors(hidden)


@pytest.mark.parametrize("contiguous", [False, True])
def test_the_rows_are_those_that_the_training_network_computes_with(contiguous, write_checkpoint, tmp_path):
    """MindFormers' training cells, given the fused tensors, give x W^T + b of the parts the reader takes from them."""
    source = untied(tmp_path / "source", write_checkpoint)
    keys = {"use_contiguous_weight_layout_attention": contiguous, "use_interleaved_weight_layout_mlp": not contiguous}
    reader = CheckpointReader(trained(source, tmp_path / "trained", **keys))
    shape, block, tensors = reader.config, reader.block(0), converted(source, contiguous)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        add_qkv_bias=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        hidden_act="silu",
        normalization="RMSNorm",
        **dict.fromkeys(("compute_dtype", "params_dtype", "layernorm_compute_dtype", "rotary_dtype"), "float32"),
    )
    device_layout.init_layout(config)
    spec = get_gpt_layer_local_spec(
        qk_layernorm=False,
        use_contiguous_weight_layout_attention=contiguous,
        use_interleaved_weight_layout_mlp=not contiguous,
    ).submodules
    attention = build_module(spec.self_attention, config=config, layer_number=1)
    mlp = build_module(spec.mlp, config=config)
    for cell, name in ((attention, "self_attention"), (mlp, "mlp")):
        for parameter in cell.get_parameters():
            value = tensors[f"decoder.layers.0.{name}.{parameter.name.removeprefix(f'{name}.')}"]
            parameter.set_data(ms.Tensor(value.astype(np.float32)))
    hidden = np.random.default_rng(0).normal(size=(5, 1, shape.hidden_size)).astype(np.float32)
    found = [each.asnumpy().reshape(5, -1) for each in Queries(attention)(ms.Tensor(hidden))]
    x = hidden[:, 0].astype(np.float64)
    for each, out in zip("qkv", found, strict=True):
        name = f"self_attn.{each}_proj"
        np.testing.assert_allclose(out, x @ block[f"{name}.weight"].T + block[f"{name}.bias"], atol=1e-4)
    gate = x @ block["mlp.gate_proj.weight"].T
    inner = gate / (1 + np.exp(-gate)) * (x @ block["mlp.up_proj.weight"].T)
    out = mlp(ms.Tensor(hidden))[0].asnumpy()[:, 0]
    np.testing.assert_allclose(out, inner @ block["mlp.down_proj.weight"].T, atol=1e-4)


# --- slices ---------------------------------------------------------------------------------------------------------


def axis_of(name, value):
    """Which axis tensor parallelism slices: rows of what is column parallel, columns of what is row parallel."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    return None if "norm" in name or name.endswith("linear_proj.bias") else 0


def write_strategy(path, tensors, ranks):
    """A strategy file in MindSpore's own protobuf, as training with ranks-fold tensor parallelism writes it."""
    strategy = ms.train.node_strategy_pb2.ParallelStrategyMap()
    strategy.current_stage = 1
    item = strategy.parallel_strategy_item.add(node_name="matmul")
    item.parallel_strategys.stage = 0
    item.parallel_strategys.parallel_strategy.add().dim.extend([1, ranks])
    for name, value in tensors.items():
        layouts = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.field, layouts.opt_weight_shard_step, layouts.opt_weight_shard_size = 0, 0, 0
        layouts.dev_matrix.add().dim.append(ranks)
        layouts.tensor_map.add().dim.extend([0 if axis == axis_of(name, value) else -1 for axis in range(value.ndim)])
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
    path.write_bytes(strategy.SerializeToString())
    return path


@pytest.mark.parametrize("stages", [pytest.param(False, id="one strategy file"), pytest.param(True, id="a folder of them")])
def test_slices_of_ranks_merged_by_mindspore_quantize_to_the_same_bytes(
    stages, write_checkpoint, tmp_path, capsys, monkeypatch
):
    source = untied(tmp_path / "source", write_checkpoint)
    tensors = converted(source)
    tensors = {**tensors, **{f"adam_m.{name}": value for name, value in tensors.items()}}
    for rank in range(2):
        part = {}
        for name, value in tensors.items():
            axis = axis_of(name, value)
            part[name] = np.ascontiguousarray(value if axis is None else np.split(value, 2, axis)[rank])
        part["global_step"] = np.array([20], np.int32)
        (tmp_path / f"sliced/rank_{rank}").mkdir(parents=True)
        for step in ("1_2", "1_4"):  # two checkpoints of one training
            save_file(part, tmp_path / f"sliced/rank_{rank}/run_rank_{rank}-{step}.safetensors", metadata={"format": "ms"})
    (tmp_path / "strategy").mkdir()
    strategy = write_strategy(tmp_path / "strategy/ckpt_strategy_rank_0.ckpt", tensors, 2)
    command = ["merge", str(tmp_path / "sliced"), "--config", str(source), "--output", str(tmp_path / "merged")]
    used = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(percent=90.0))  # MindSpore would wait for ever
    monkeypatch.setattr("mindspore.parallel.transform_safetensors.psutil", used)
    command += ["--strategy", str(tmp_path / "strategy" if stages else strategy)]
    assert main(command) == 2
    assert "choose with --suffix" in capsys.readouterr().err
    assert main([*command, "--suffix", "1_4"]) == 0
    assert not list((tmp_path / "merged").glob(".*"))
    assert_quantizes_the_same(source, tmp_path / "merged", tmp_path)


def test_slices_with_mindformers_metadata_quantize_to_the_same_bytes(write_checkpoint, tmp_path):
    source = untied(tmp_path / "source", write_checkpoint)
    tensors = converted(source)
    folder = tmp_path / "iteration_00000020"
    folder.mkdir()
    metas, mappings = {}, []
    for rank in range(2):
        part, metas[rank] = {}, {}
        file = f"model-{rank:07d}-{2:07d}.safetensors"
        for name, value in tensors.items():
            axis, origin, piece = axis_of(name, value), [0] * value.ndim, value
            if axis is not None:
                piece = np.split(value, 2, axis)[rank]
                origin[axis] = rank * piece.shape[axis]
            part[name] = np.ascontiguousarray(piece)
            axes = ["tp" if each == axis else "None" for each in range(value.ndim)]
            metas[rank][name] = build_sharded_tensor(
                name,
                ms.bfloat16,
                piece.shape,
                value.shape,
                [1 + (each == "tp") for each in axes],
                origin,
                layout=ms.Layout((2,), ("tp",))(*axes),
            )
            mappings.append((file, rank, [rank], (name, tuple(origin))))
        save_file(part, folder / file)
    save_metadata(metas, mappings, str(folder / "metadata.json"))
    assert_quantizes_the_same(source, with_config(source, folder), tmp_path)


def test_merge_without_what_it_needs_says_what(write_checkpoint, tmp_path, capsys):
    source = untied(tmp_path / "source", write_checkpoint)
    folder = trained(source, tmp_path / "trained")
    (folder / "config.json").unlink()
    assert main(["merge", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "--config" in capsys.readouterr().err
    assert main(["merge", str(folder), "--strategy", str(source), "--output", str(tmp_path / "out")]) == 2
    assert "has no folder rank_0" in capsys.readouterr().err
    assert main(["merge", str(folder), "--config", str(source), "--output", str(tmp_path / "out")]) == 0
    assert CheckpointReader(tmp_path / "out").files.sha256() == CheckpointReader(source).files.sha256()
    assert main(["merge", str(folder), "--config", str(source), "--output", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
