"""The plugin that makes vLLM serve openPangu-Embedded, float or quantized, and vLLM-MindSpore with this project's network.

vLLM calls register() in each of its processes, through the entry point vllm.general_plugins of setup.py: before it parses
its arguments, and so before it reads a config.json. Nothing of vLLM, MindSpore or this package is imported before that.

What register() tells whom: transformers, what a config.json of model_type PanguEmbedded is, which vLLM has a network for
and transformers no configuration. That is all in a vLLM that is not vLLM-MindSpore's. There also MindFormers, the network
and its quantized layers; vLLM-MindSpore, that MindFormers has this architecture (its list was made before), and that the
norms are computed in float32, as everywhere in this package.

Source: vllm_mindspore 0.5.1, model_executor/models/registry.py (mcore_support_list), model_executor/model_loader/utils.py
(resolve_mf_mcore_arch), model_executor/models/mf_models/config.py (MODEL_RELATED_MAPPING).
"""

from __future__ import annotations

import sys

ARCHITECTURE, MODEL_TYPE = "PanguEmbeddedForCausalLM", "PanguEmbedded"
HOST = "vllm_mindspore"


def register() -> None:
    """Called by vLLM; may be called again."""
    register_config()
    if HOST not in sys.modules:
        return
    from vllm_mindspore.model_executor.models import registry
    from vllm_mindspore.model_executor.models.mf_models import config

    from ms_pangu_quant.network.served import use_for_serving

    use_for_serving()
    if ARCHITECTURE not in registry.mcore_support_list:
        registry.mcore_support_list.append(ARCHITECTURE)
    config.MODEL_RELATED_MAPPING.setdefault(MODEL_TYPE, {"layernorm_compute_dtype": "float32"})


def register_config() -> None:
    """Tell transformers about PanguEmbedded, unless something else has."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if MODEL_TYPE in CONFIG_MAPPING:
        return

    class PanguEmbeddedConfig(PretrainedConfig):
        """Holds config.json as it is: what the fields mean, MindFormers' config class of this package says."""

        model_type = MODEL_TYPE

    AutoConfig.register(MODEL_TYPE, PanguEmbeddedConfig)
