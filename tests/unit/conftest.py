"""Fixtures without MindSpore: small checkpoints on disk, and one decoder block in memory with its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.config import ModelConfig

ROOT = Path(__file__).parents[2]

settings.register_profile("unit", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("unit")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def mini() -> Path:
    return ROOT / "ms_pangu_quant/assets/openpangu-mini"


@pytest.fixture(scope="session")
def checkpoint_tool() -> ModuleType:
    from tools.dev import make_checkpoint

    return make_checkpoint


@pytest.fixture
def make_checkpoint(checkpoint_tool, tmp_path) -> Callable[..., Path]:
    """(folder name, seed, dtype, shard_bytes, config fields to change) -> a checkpoint of the tool's tiny shape."""

    def make(
        name: str = "checkpoint", *, seed: int = 0, dtype: str = "bfloat16", shard_bytes: int = 1 << 30, **changes: Any
    ) -> Path:
        config = checkpoint_tool.make_config("tiny", **changes)
        checkpoint_tool.write_checkpoint(tmp_path / name, config, seed=seed, dtype=dtype, shard_bytes=shard_bytes)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def edit_tensors() -> Callable[[Path, Callable[[dict[str, NDArray[Any]]], Any]], None]:
    """Change the tensors of a one-file checkpoint: (directory, function that edits the dict of tensors in place)."""

    def edit(directory: Path, change: Callable[[dict[str, NDArray[Any]]], Any]) -> None:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)

    return edit


@pytest.fixture(scope="session")
def small_config() -> Callable[..., ModelConfig]:
    """A config whose sizes all differ, so that a mixed-up axis cannot go unnoticed; any field may be changed."""

    def make(**changes: Any) -> ModelConfig:
        raw = {
            "model_type": "PanguEmbedded",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 32,
            "max_position_embeddings": 64,
            "rope_theta": 100.0,
            **changes,
        }
        return ModelConfig.from_dict(raw, where="test")

    return make


@pytest.fixture(scope="session")
def random_block(small_config) -> Callable[..., Block]:
    """A float32 block with outlier channels in its norms and biases as large as the weights; (seed, config fields)."""

    def make(seed: int = 0, **changes: Any) -> Block:
        config = small_config(**changes)
        generator = np.random.default_rng(seed)
        tensors = {}
        for name, shape in layout.block_shapes(config).items():
            if len(shape) == 2:
                value = generator.normal(size=shape) / np.sqrt(shape[1])
            elif name.endswith("layernorm.weight"):
                value = generator.lognormal(sigma=1.0, size=shape) * generator.choice([-1, 1], size=shape)
            else:
                value = generator.normal(size=shape)
            tensors[name] = value.astype(np.float32)
        return Block(config, tensors)

    return make


@pytest.fixture(scope="session")
def forward() -> Callable[[Block, NDArray[np.float64]], tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]]:
    return _forward


def _forward(block: Block, hidden: NDArray[np.float64]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """One decoder block on one sequence, in float64, written from the architecture and not from the package.

    hidden [tokens, hidden] -> (output [tokens, hidden], what each linear layer reads, by the layout's input names).
    """
    config, tensors = block.config, block.tensors
    tokens = len(hidden)
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + config.rms_norm_eps) * _wide(tensors, f"{name}.weight")

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        bias = _wide(tensors, f"{name}.bias") if f"{name}.bias" in tensors else 0.0
        return x @ _wide(tensors, f"{name}.weight").T + bias

    def rope(x: NDArray[np.float64]) -> NDArray[np.float64]:  # [heads, tokens, head_dim]
        angles = np.arange(tokens)[:, None] * config.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
        cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
        first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    def split(x: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        return x.reshape(tokens, count, head_dim).transpose(1, 0, 2)

    attention_input = norm(hidden, "input_layernorm")
    query = rope(split(linear(attention_input, "self_attn.q_proj"), heads))
    key = np.repeat(rope(split(linear(attention_input, "self_attn.k_proj"), kv_heads)), heads // kv_heads, axis=0)
    value = np.repeat(split(linear(attention_input, "self_attn.v_proj"), kv_heads), heads // kv_heads, axis=0)
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(head_dim) + np.triu(np.full((tokens, tokens), -np.inf), 1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attention_output = (weights @ value).transpose(1, 0, 2).reshape(tokens, heads * head_dim)
    middle = hidden + linear(attention_output, "self_attn.o_proj")

    mlp_input = norm(middle, "post_attention_layernorm")
    gate = linear(mlp_input, "mlp.gate_proj")
    mlp_hidden = gate / (1 + np.exp(-gate)) * linear(mlp_input, "mlp.up_proj")
    inputs = {
        "attention_input": attention_input,
        "attention_output": attention_output,
        "mlp_input": mlp_input,
        "mlp_hidden": mlp_hidden,
    }
    return middle + linear(mlp_hidden, "mlp.down_proj"), inputs


def _wide(tensors: Mapping[str, NDArray[np.float32]], name: str) -> NDArray[np.float64]:
    return tensors[name].astype(np.float64)
