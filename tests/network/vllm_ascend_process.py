"""A process that loads `ascend` and `compressed-tensors` checkpoints with vllm-ascend's quantization code, on the CPU.

usage: vllm_ascend_process.py SOURCE INPUTS.npz FOLDER CHECKPOINT...

SOURCE holds the package vllm_ascend as published. What is executed of it: AscendModelSlimConfig and
AscendCompressedTensorsConfig, their choice of a scheme for each layer, create_weights, process_weights_after_loading and
apply of the schemes, its custom operator `quantize`; of vLLM: PanguEmbeddedForCausalLM, its linear layers and load_weights.
torch_npu is a stand-in: the operators below, each by the formula of its documentation, and names that raise when they are
called. What differs from an NPU besides: the dispatch key of `quantize`, NZ layouts (values do not change), and rope and
attention, which are not run.

INPUTS has a float32 array for each number of inputs that a layer has ("256": [tokens, 256]). FOLDER gets CHECKPOINT's name
and .npz: for each block and layer ("0.qkv_proj") what it gives in bfloat16 and the class of its scheme
("0.qkv_proj.scheme"), and which parameters nothing was loaded into ("unset"); or the "error".
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_PLUGINS"] = ""  # of an installed vllm-ascend or ours
import numpy as np
import torch
from stand_ins import StandIns

LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
MODEL = {
    "enforce_eager": True,
    "is_moe": False,
    "quantization": "ascend",
}  # what is asked of vLLM's own description of the model
ABSENT = ("torch_npu", "torchair")


def npu_quantize(x, scales, zero_points, dtype, axis=1, div_mode=True):
    """round(x * scale + zero point), or x / scale with div_mode; in float32, whatever x is in."""
    scaled = x.float() / scales.float() if div_mode else x.float() * scales.float()
    return torch.round(scaled + zero_points.float()).clamp(-128, 127).to(torch.int8)


def npu_dynamic_quant(x, *, smooth_scales=None, group_index=None, dst_type=torch.int8):
    """Each token by its own scale, its largest magnitude over 127, which is given besides."""
    scale = x.float().abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x.float() / scale).clamp(-128, 127).to(torch.int8), scale.squeeze(-1)


def npu_quant_matmul(x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=torch.int8):
    """((x1 @ x2 + an int32 bias) * scale * pertoken_scale) + a float bias; an int64 scale is float32 bits."""
    if scale.dtype == torch.int64:
        scale = scale.to(torch.int32).view(torch.float32)
    product = x1.double() @ x2.double()  # exact: sums stay below 2^53
    if bias is not None and bias.dtype == torch.int32:
        product, bias = product + bias.double(), None
    out = product * scale.double()
    out = out if pertoken_scale is None else out * pertoken_scale.double()[:, None]
    return (out if bias is None else out + bias.double()).to(output_dtype)


def npu_weight_quant_batchmatmul(x, weight, antiquant_scale, antiquant_offset=None, antiquant_group_size=0, **others):
    """x @ ((weight + offset) * scale); weight int32 [in, out/8], eight int4 to an integer, the lowest bits first."""
    if antiquant_offset is not None or any(value is not None for value in others.values()):
        raise NotImplementedError(f"npu_weight_quant_batchmatmul: {sorted(others)}")
    nibbles = (weight[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    codes = torch.where(nibbles > 7, nibbles - 16, nibbles).reshape(len(weight), -1)
    scale = antiquant_scale.double()
    if antiquant_group_size:
        scale = scale.repeat_interleave(antiquant_group_size, dim=0)
    return (x.double() @ (codes.double() * scale)).to(x.dtype)


def npu_format_cast(tensor, layout):
    return tensor


OPERATORS = (npu_quantize, npu_dynamic_quant, npu_quant_matmul, npu_weight_quant_batchmatmul, npu_format_cast)


def stand_in(module, name):
    """Of torch_npu and what belongs to it."""
    known = {operator.__name__: operator for operator in OPERATORS} if module == "torch_npu" else {}

    def missing(*_, **__):
        raise NotImplementedError(f"{module}.{name} is not stood in for")

    return known.get(name, missing)


class NoAttention(torch.nn.Module):
    """Is not called."""

    def __init__(self, *_, **__):
        super().__init__()


class Npu(types.ModuleType):
    """torch.npu, of which the imports ask for types only."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def on_the_cpu():
    """Operators that vllm-ascend registers for an NPU are called with CPU tensors here."""
    from vllm.utils import torch_utils

    register = torch_utils.direct_register_custom_op

    def registered(*arguments, **options):
        if options.get("dispatch_key") == "PrivateUse1":
            options["dispatch_key"] = "CPU"
        register(*arguments, **options)

    torch_utils.direct_register_custom_op = registered


def start():
    """vLLM's and vllm-ascend's settings for one process without an NPU."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm_ascend.ascend_config import init_ascend_config
    from vllm_ascend.ops import register_custom_ops  # noqa: F401

    config = VllmConfig()
    config.compilation_config.mode = 0  # eager
    config.model_config = SimpleNamespace(**MODEL, dtype=torch.bfloat16)
    with set_current_vllm_config(config):
        init_ascend_config(config)
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
    return config


def quantization_of(raw, checkpoint):
    """vllm-ascend's description of a checkpoint: msModelSlim's where config.json names none."""
    from vllm_ascend.quantization.compressed_tensors_config import AscendCompressedTensorsConfig
    from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig

    if "quantization_config" in raw:
        return AscendCompressedTensorsConfig.from_config(raw["quantization_config"])
    found = AscendModelSlimConfig()
    found.maybe_update_config(str(checkpoint))
    return found


def build(config, checkpoint):
    """vLLM's model in bfloat16 with vllm-ascend's quantization, its weights loaded and processed; and the last parts of the
    names of the parameters that nothing was loaded into."""
    from safetensors.torch import load_file
    from transformers import PretrainedConfig
    from vllm.model_executor.models import openpangu
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.utils import set_weight_prefetch_method

    raw = json.loads((checkpoint / "config.json").read_text())
    told = PretrainedConfig.from_dict(raw)
    told.rope_parameters = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    config.model_config.hf_config = config.model_config.hf_text_config = told
    set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
    config.quant_config = quantization_of(raw, checkpoint)
    openpangu.Attention = NoAttention
    model_class = openpangu.PanguEmbeddedForCausalLM
    config.quant_config.packed_modules_mapping = model_class.packed_modules_mapping  # as vLLM's loader does
    with set_default_torch_dtype(torch.bfloat16):
        model = model_class(vllm_config=config)
    files = sorted(checkpoint.glob("*.safetensors"))
    loaded = model.load_weights((name, tensor) for file in files for name, tensor in load_file(file).items())
    unset = sorted({name.rpartition(".")[2] for name, _ in model.named_parameters() if name not in loaded})
    for layer in model.modules():  # as vLLM's process_weights_after_loading does
        if hasattr(layer, "quant_method"):
            layer.quant_method.process_weights_after_loading(layer)
    return model, unset


def outputs_of(model, unset, given):
    """block and layer -> what it gives, and the class of its scheme."""
    found = {"unset": np.array(unset)}
    for index, block in enumerate(model.model.layers):
        for name in LAYERS:
            layer = getattr(block.self_attn, name, None) or getattr(block.mlp, name)
            output, _ = layer(given[layer.input_size])
            found[f"{index}.{name}"] = output.float().numpy()
            found[f"{index}.{name}.scheme"] = np.array(type(layer.quant_method.quant_method).__name__)
    return found


def main(source, inputs, folder, *checkpoints):
    sys.path.insert(0, source)
    sys.meta_path.insert(0, StandIns(ABSENT, stand_in))
    torch.npu = Npu("torch.npu")
    torch.Tensor.npu = lambda self: self
    on_the_cpu()
    from vllm.config import set_current_vllm_config

    config = start()
    with np.load(inputs) as archive:
        given = {int(name): torch.from_numpy(value).bfloat16() for name, value in archive.items()}
    for checkpoint in map(Path, checkpoints):
        with set_current_vllm_config(config), torch.inference_mode():
            try:
                found = outputs_of(*build(config, checkpoint), given)
            except (
                ArithmeticError,
                ValueError,
                KeyError,
                AssertionError,
                NotImplementedError,
            ) as error:  # what it refuses a checkpoint with
                found = {"error": np.array(repr(error))}
        np.savez(Path(folder) / f"{checkpoint.name}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
