"""The openPangu-Embedded decoder for training: the whole sequence at once, with gradients.

The project's own network is MindFormers' inference one, with paged attention and no gradients; this one has the same
parameters under Hugging Face's names, and gives the same logits (a test compares them). MindSpore operators only, in graph
mode, so it runs on whatever device MindSpore was started on.
"""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.config import ModelConfig

_MASKED = -1e9


def initial_weights(config: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Hugging Face's names -> float32. Normal with std 1/sqrt(fan in), what adds to the residual stream 1/sqrt(2 layers) of
    that; embeddings 0.05; norms 1, biases 0."""
    rng = np.random.default_rng(seed)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shrink = 1 / math.sqrt(2 * layers)
    weights: dict[str, NDArray[np.float32]] = {}

    def normal(name: str, outputs: int, inputs: int, std: float) -> None:
        weights[f"{name}.weight"] = (std * rng.standard_normal((outputs, inputs))).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int, gain: float = 1.0) -> None:
        normal(name, outputs, inputs, gain / math.sqrt(inputs))

    normal("model.embed_tokens", config.vocab_size, hidden, 0.05)
    for index in range(layers):
        prefix = f"model.layers.{index}"
        for name, outputs, inputs, gain in (
            ("self_attn.q_proj", queries, hidden, 1.0),
            ("self_attn.k_proj", keys, hidden, 1.0),
            ("self_attn.v_proj", keys, hidden, 1.0),
            ("self_attn.o_proj", hidden, queries, shrink),
            ("mlp.gate_proj", config.intermediate_size, hidden, 1.0),
            ("mlp.up_proj", config.intermediate_size, hidden, 1.0),
            ("mlp.down_proj", hidden, config.intermediate_size, shrink),
        ):
            linear(f"{prefix}.{name}", outputs, inputs, gain)
            if name.startswith("self_attn"):
                weights[f"{prefix}.{name}.bias"] = np.zeros(outputs, np.float32)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    if not config.tie_word_embeddings:
        linear("lm_head", config.vocab_size, hidden)
    return weights


class RMSNorm(nn.Cell):
    def __init__(self, weight: Parameter, epsilon: float):
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt(ops.mean(x * x, -1, True) + self.epsilon) * self.weight


class Layer(nn.Cell):
    """x [B * T, hidden] -> the same; batch and length come with the tables."""

    def __init__(self, config: ModelConfig, parameters: dict[str, Parameter], prefix: str):
        super().__init__()

        def take(name: str) -> Parameter:
            return parameters[f"{prefix}.{name}"]

        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.attention_norm = RMSNorm(take("input_layernorm.weight"), config.rms_norm_eps)
        self.mlp_norm = RMSNorm(take("post_attention_layernorm.weight"), config.rms_norm_eps)
        self.q, self.q_bias = take("self_attn.q_proj.weight"), take("self_attn.q_proj.bias")
        self.k, self.k_bias = take("self_attn.k_proj.weight"), take("self_attn.k_proj.bias")
        self.v, self.v_bias = take("self_attn.v_proj.weight"), take("self_attn.v_proj.bias")
        self.o, self.o_bias = take("self_attn.o_proj.weight"), take("self_attn.o_proj.bias")
        self.gate, self.up, self.down = (take(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        self.linear = ops.MatMul(transpose_b=True)
        self.add_bias = ops.BiasAdd()
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def heads_of(self, x: Tensor, weight: Parameter, bias: Parameter, batch: int, heads: int) -> Tensor:
        """[B * T, hidden] -> [B, heads, T, width]."""
        y = self.add_bias(self.linear(x, weight), bias)
        return y.reshape(batch, -1, heads, self.width).transpose(0, 2, 1, 3)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, turn: Tensor, mask: Tensor, batch: int) -> Tensor:
        width, groups, share = self.width, self.groups, self.heads // self.groups
        y = self.attention_norm(x)
        q = self.heads_of(y, self.q, self.q_bias, batch, self.heads)
        k = self.heads_of(y, self.k, self.k_bias, batch, groups)
        v = self.heads_of(y, self.v, self.v_bias, batch, groups)
        q = q * cos + ops.matmul(q, turn) * sin
        k = k * cos + ops.matmul(k, turn) * sin
        length = q.shape[2]
        scores = self.scores(q.reshape(batch * groups, share * length, width), k.reshape(batch * groups, length, width))
        weights = ops.softmax(scores * (width**-0.5) + mask, -1)
        mixed = self.mix(weights, v.reshape(batch * groups, length, width))
        mixed = mixed.reshape(batch, self.heads, length, width).transpose(0, 2, 1, 3).reshape(batch * length, -1)
        x = x + self.add_bias(self.linear(mixed, self.o), self.o_bias)
        y = self.mlp_norm(x)
        return x + self.linear(ops.silu(self.linear(y, self.gate)) * self.linear(y, self.up), self.down)


class Decoder(nn.Cell):
    """ids int32 [B, T] -> logits float32 [B * T, vocabulary]."""

    def __init__(self, config: ModelConfig, weights: dict[str, NDArray[np.float32]]):
        super().__init__()
        self.config = config
        parameters = {name: Parameter(Tensor(value), name=name) for name, value in weights.items()}
        self.embedding = parameters["model.embed_tokens.weight"]
        self.head = self.embedding if config.tie_word_embeddings else parameters["lm_head.weight"]
        self.layers = nn.CellList(
            [Layer(config, parameters, f"model.layers.{index}") for index in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(parameters["model.norm.weight"], config.rms_norm_eps)
        self.linear = ops.MatMul(transpose_b=True)
        for name, parameter in parameters.items():
            parameter.name = name  # a cell renames what it is given

    def construct(self, ids: Tensor, cos: Tensor, sin: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        batch = ids.shape[0]
        x = ops.gather(self.embedding, ids.reshape(-1), 0)
        for layer in self.layers:
            x = layer(x, cos, sin, turn, mask, batch)
        return self.linear(self.norm(x), self.head)

    def tables(self, length: int) -> tuple[Tensor, ...]:
        """cos, sin [1, 1, T, width], the matrix that turns (a, b) into (-b, a) [width, width], and the causal mask
        [1, heads / groups * T, T]."""
        width = self.config.head_dim
        frequency = self.config.rope_theta ** (-np.arange(0, width, 2) / width)
        angle = np.outer(np.arange(length), np.concatenate([frequency, frequency]))
        turn = np.zeros((width, width), np.float32)
        half = np.arange(width // 2)
        turn[half + width // 2, half], turn[half, half + width // 2] = -1, 1
        mask = np.triu(np.full((length, length), _MASKED, np.float32), 1)
        mask = np.tile(mask, (self.config.num_attention_heads // self.config.num_key_value_heads, 1))
        tables = np.cos(angle)[None, None], np.sin(angle)[None, None], turn, mask[None]
        return tuple(Tensor(each.astype(np.float32)) for each in tables)


class Loss(nn.Cell):
    """Cross-entropy in nats, the mean over tokens by their weights [B, T]."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, ids: Tensor, targets: Tensor, weights: Tensor, *tables: Tensor) -> Tensor:
        logits = self.decoder(ids, *tables)
        losses = ops.cross_entropy(logits, targets.reshape(-1), reduction="none")
        weights = weights.reshape(-1)
        return (losses * weights).sum() / weights.sum()


class TrainStep(nn.Cell):
    """One step of AdamW (Loshchilov and Hutter, arXiv:1711.05101) behind a clipped gradient; returns the loss.

    No bias correction: the learning rate warms up longer than the moments need. Matrices decay, vectors do not.
    """

    def __init__(self, decoder: Decoder, *, betas: tuple[float, float], decay: float, clip: float):
        super().__init__(auto_prefix=False)
        self.loss = Loss(decoder)
        self.parameters = ms.ParameterTuple(decoder.trainable_params())
        self.first = self.parameters.clone(prefix="first", init="zeros")
        self.second = self.parameters.clone(prefix="second", init="zeros")
        self.betas, self.clip = betas, clip
        self.decays = tuple(decay if each.ndim == 2 else 0.0 for each in self.parameters)
        self.gradient = ops.GradOperation(get_by_list=True)
        self.update = ops.AdamWeightDecay()

    def construct(self, rate: Tensor, *batch: Tensor) -> Tensor:
        loss = self.loss(*batch)
        gradients = ops.clip_by_global_norm(self.gradient(self.loss, self.parameters)(*batch), self.clip)
        for index, gradient in enumerate(gradients):
            step = self.update(
                self.parameters[index], self.first[index], self.second[index], rate,
                self.betas[0], self.betas[1], 1e-8, self.decays[index], gradient,
            )  # fmt: skip
            loss = ops.depend(loss, step)
        return loss

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as float32 arrays by name."""
        return {each.name: each.asnumpy() for each in (*self.parameters, *self.first, *self.second)}

    def load_state(self, state: dict[str, Any]) -> None:
        for each in (*self.parameters, *self.first, *self.second):
            each.set_data(Tensor(state[each.name]))
