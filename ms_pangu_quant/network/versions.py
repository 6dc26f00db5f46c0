"""What has other names in other versions of the frameworks: 1.9.0 of MindFormers with MindSpore 2.9, and 1.7.0 with 2.7.1,
which vLLM-MindSpore 0.5.1 stands on.

MindFormers makes a TransformerConfig of a config.json with a class whose table is overridden, or with a function that is
given what to add to its table.
"""

from __future__ import annotations

from typing import Any

CONFIG_MAPPING = {
    "head_dim": "kv_channels",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "layernorm_epsilon",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
    "initializer_range": "init_method_std",
    "rope_theta": "rotary_base",
    "bias": "add_qkv_bias",
    "output_bias": "add_bias_linear",
}

try:
    from mindformers.parallel_core.config_converter import ConfigConverter
except ModuleNotFoundError:
    from mindformers.parallel_core.transformer_config_utils import convert_to_transformer_config

    def to_transformer_config(config: dict[str, Any], is_mla_model: bool) -> Any:
        return convert_to_transformer_config(config, is_mla_model=is_mla_model, additional_map=CONFIG_MAPPING)
else:

    class _Converter(ConfigConverter):  # type: ignore[misc]
        CONFIG_MAPPING = CONFIG_MAPPING

    def to_transformer_config(config: dict[str, Any], is_mla_model: bool) -> Any:
        return _Converter.convert(config, is_mla_model=is_mla_model)


try:
    from mindspore.graph.api import _cell_graph_executor as graph_executor
except ModuleNotFoundError:
    from mindspore.common.api import _cell_graph_executor as graph_executor


def release_graphs(cell: Any) -> None:
    """Give the memory of a cell's compiled graphs back, if it has any; MindSpore keeps them until the process ends."""
    if cell.compile_cache:
        graph_executor.del_net_res(cell, cell.compile_cache)
        cell.compile_cache.clear()
