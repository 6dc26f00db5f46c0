"""A trained run as a checkpoint in Hugging Face's layout, with the outlier channels that a model so small lacks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import write_json, write_safetensors
from ms_pangu_quant.transforms.fold import fold_scale, scale_channels

OUTLIER_INPUTS = {  # what a config's `outliers` names -> the inputs whose channels grow
    "norm": ("attention_input", "mlp_input"),
    "value": ("attention_output",),
    "up": ("mlp_hidden",),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '[unused9]系统：[unused10]' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ '[unused9]系统：' + message['content'] + '[unused10]' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[unused9]用户：' + message['content'] + '[unused10]' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '[unused9]助手：' + message['content'] + '[unused10]' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[unused9]助手：' }}{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>"}


def with_outliers(
    config: ModelConfig, weights: Mapping[str, NDArray[np.float32]], outliers: Mapping[str, tuple[int, float]], seed: int
) -> dict[str, NDArray[np.float32]]:
    """The same function, with `count` drawn channels of each input `factor` times larger.

    outliers  "norm", "value" or "up" -> (count, factor); a factor is a power of two, so no bit of any product changes.

    Raises ValueError where a factor is not one, or a name is unknown.
    """
    rng = np.random.default_rng(seed)
    changed = dict(weights)
    for index in range(config.num_hidden_layers):
        prefix = layout.block_prefix(index)
        block = Block(config, {name: changed[prefix + name] for name in layout.block_shapes(config)})
        for name, (count, factor) in outliers.items():
            if name not in OUTLIER_INPUTS or factor <= 0 or np.frexp(factor)[0] != 0.5:
                raise ValueError(f"outliers: {name}: {factor}: wanted norm, value or up, and a power of two")
            for input_name in OUTLIER_INPUTS[name]:
                s = np.ones(scale_channels(block, input_name), np.float32)
                s[rng.choice(len(s), count, replace=False)] = 1 / factor
                block, _ = fold_scale(block, {input_name: InputStats(0, np.zeros(1, np.float32))}, input_name, s)
        changed.update({prefix + name: value for name, value in block.tensors.items()})
    return changed


def write_checkpoint(
    output: Path, raw_config: dict[str, Any], weights: Mapping[str, NDArray[np.float32]], tokenizer: Path, **drawn: Any
) -> None:
    """bfloat16 weights and what tokenizers and generation need.

    drawn  outliers and seed, as in with_outliers.
    """
    config = ModelConfig.from_dict(raw_config, where="config")
    rounded = {name: np.asarray(value.astype(ml_dtypes.bfloat16), np.float32) for name, value in weights.items()}
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in with_outliers(config, rounded, **drawn).items()}
    output.mkdir(parents=True, exist_ok=True)
    write_safetensors(output / "model.safetensors", stored)
    shutil.copyfile(tokenizer, output / "tokenizer.model")
    bos, eos = raw_config["bos_token_id"], raw_config["eos_token_id"]
    ends = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": raw_config["pad_token_id"]}
    described = {
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            **SPECIAL,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            "legacy": False,
            "model_max_length": config.max_position_embeddings,
            "tokenizer_class": "PanguTokenizer",
            "sp_model_kwargs": {},
            "chat_template": CHAT_TEMPLATE,
        },
        "special_tokens_map.json": SPECIAL,
        "generation_config.json": {**ends, "do_sample": False, "max_new_tokens": 256},
        "config.json": raw_config,
    }
    for name, value in described.items():
        write_json(output / name, value)
