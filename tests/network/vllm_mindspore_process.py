"""A process that does what vLLM-MindSpore does to serve a checkpoint, with the published wheel's own code, on the CPU.

usage: vllm_mindspore_process.py WHEEL CHECKPOINT OUT.json

vLLM and PyTorch are not here: whatever is imported of them is a stand-in that has every name. What is executed of the
wheel: models/registry.py, model_loader/utils.py (which backend takes an architecture), mf_models/config.py (vLLM's
settings become MindFormers'). The calls on the network are those of mf_models/mindformers.py, in its order. What differs
from an NPU: the device, float32, and the attention mask (the CPU's has three dimensions, and the caches are its own).
"""

import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from stand_ins import StandIns

ABSENT = ("vllm", "torch", "msadapter")


class Registry:
    """vLLM's, as far as the wheel's code asks."""

    def __init__(self, models):
        self.models = models

    def get_supported_archs(self):
        return self.models.keys()


def main(wheel, checkpoint, out):
    from ms_pangu_quant.network import runtime

    runtime.start("cpu", "pynative")  # the mode vLLM-MindSpore leaves a process in
    os.environ["ENFORCE_EAGER"] = "false"  # but not eager: the model compiles its own construct
    os.environ["VLLM_MS_MODEL_BACKEND"] = "MindFormers"
    sys.path.append(str(Path(__file__).parents[2]))
    from tests.network.older_cpu import lend_kernels

    lend_kernels()
    import mindspore as ms
    import numpy as np
    from mindformers import AutoModel
    from mindformers.core.context import build_mf_context
    from mindspore import Tensor, mutable
    from mindspore.nn.utils import no_init_parameters
    from transformers import AutoConfig

    sys.meta_path.insert(0, StandIns(ABSENT, lambda module, name: mock.MagicMock(name=f"{module}.{name}")))
    import vllm.model_executor.models.registry as of_vllm

    of_vllm._ModelRegistry = Registry
    of_vllm._LazyRegisteredModel = SimpleNamespace
    package = types.ModuleType("vllm_mindspore")  # its __init__ patches vLLM, which is not here
    package.__path__ = [str(Path(wheel) / "vllm_mindspore")]
    utils = types.ModuleType("vllm_mindspore.utils")
    utils.is_310p = utils.is_mindone_model_backend = utils.is_native_model_backend = utils.is_mix_model_backend = lambda: (
        False
    )
    utils.is_mindformers_model_backend = lambda: True
    sys.modules.update({"vllm_mindspore": package, "vllm_mindspore.utils": utils})
    from vllm_mindspore.model_executor.models import registry
    from vllm_mindspore.model_executor.models.mf_models import config

    before = list(registry.mcore_support_list)
    from importlib.metadata import entry_points

    (plugin,) = entry_points(group="vllm.general_plugins", name="pangu_embedded")
    plugin.load()()
    plugin.load()()  # every process calls it, some twice
    from vllm_mindspore.model_executor.model_loader.utils import resolve_mf_mcore_arch

    hf_config = AutoConfig.from_pretrained(checkpoint)
    architectures = list(hf_config.architectures)
    normalized = registry._normalize_arch(registry.MindSporeModelRegistry, architectures)
    resolve_mf_mcore_arch(None, architectures)

    config.get_pp_group = lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True)
    config.envs.VLLM_PP_LAYER_PARTITION = None
    quantized = (Path(checkpoint) / "quantization_description.json").exists()
    parallel = SimpleNamespace(
        tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False
    )
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=ms.bfloat16,
            max_model_len=256,
            quantization="golden-stick" if quantized else None,
            hf_config=hf_config,
        ),
        cache_config=SimpleNamespace(block_size=16),
        parallel_config=parallel,
        additional_config=None,
    )
    mf_config = config.gen_mf_config(vllm_config)
    settings = dict(mf_config.model.model_config)
    mf_config.load_checkpoint = mf_config.pretrained_model_dir = checkpoint
    build_mf_context(mf_config)
    for name in ("compute_dtype", "params_dtype", "rotary_dtype", "layernorm_compute_dtype"):
        mf_config.model.model_config[name] = "float32"  # the CPU has no bfloat16
    with no_init_parameters():
        network = AutoModel.from_config(mf_config)
        network.model.return_hidden_states = True
    fa3 = (network.quant_config.fa3_quant, len(network.quant_config.fa3_quant_layer)) if network.quant_config else None
    network.set_dynamic_inputs()
    shapes = list(network.get_inputs())
    shapes[8] = Tensor(shape=network.backend.dynamic_mask[0], dtype=network.backend.dynamic_mask[1])
    network.set_inputs(*shapes)
    network.model.output_layer.set_inputs(Tensor(shape=[None, None], dtype=network.compute_dtype))
    network.load_weights(checkpoint)

    from ms_pangu_quant.network.batch import packed_inputs

    def forward(tokens, context):
        inputs = packed_inputs([len(tokens)], [context], [list(range(16))], 16, network.backend)
        caches = [mutable([Tensor(np.zeros((16, 16, 1, 1), np.float32))] * hf_config.num_hidden_layers) for _ in "kv"]
        indices = ("attn_padding_idx", "attn_unpadding_idx", "ffn_padding_idx", "ffn_unpadding_idx")
        inputs.update(dict.fromkeys(indices), key_cache=caches[0], value_cache=caches[1])
        network.phase = "increment" if context else "prefill"
        network.add_flags_custom_mcore(is_prefill=not context)
        hidden = network(input_ids=Tensor(np.array(tokens, np.int32)), **inputs)
        return network.model.output_layer(hidden).asnumpy().reshape(len(tokens), -1).astype(float)

    ids = list(range(5, 45))
    logits = [*forward(ids[:38], 0), *forward(ids[38:39], 38), *forward(ids[39:], 39)]
    result = {
        "known before": "PanguEmbeddedForCausalLM" in before,
        "normalized": normalized,
        "resolved": architectures,
        "class": type(network).__name__,
        "settings": {key: str(value) for key, value in settings.items()},
        "fa3": fa3,
        "linear": type(network.model.decoder.layers[0].mlp.linear_fc1.quant_method).__name__,
        "ids": ids,
        "logits": np.array(logits).tolist(),
    }
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
