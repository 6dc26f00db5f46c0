"""What a device could take for a prefill or a decode step: a prediction from its limits, not a measurement.

Every operator of the graph that MindFormers builds (network/graph.py lists them) takes the longest of three times: its
arithmetic at an attainable share of the peak, its memory traffic at an attainable share of the bandwidth, and a floor.
Operators follow one another. Their sum, or the launches where these take longer, follows what the host does between two
steps. Communication between devices is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.suggestion import did_you_mean, did_you_mean_path

_WEIGHT_BYTES = {"float16": 2.0, "w8a8": 1.0, "w8a8_static": 1.0, "w4a8": 0.5, "w4a16": 0.5}
PRECISIONS = tuple(_WEIGHT_BYTES)
Precisions = (
    str | Sequence[Mapping[str, str]]
)  # of all layers, or of each block's by what they are computed as (layout.FUSED)
_MAY_BE_NONE = ("host_ms", "layer_launch_ms")
_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "configs" / "devices", _PACKAGE.parent / "configs" / "devices")


@dataclass(frozen=True)
class Device:
    """fp16_tflops, int8_tops  peaks, 1e12 operations per second; a multiply-add is two.
    bandwidth_gbytes           of the memory, 1e9 bytes per second.
    cache_mib, cache_speedup   activations that fit in the cache move so many times as fast; weights never do.
    *_efficiency               the share of a limit that is reached.
    operator_us                the shortest an operator can take, microseconds.
    host_ms                    of a step in which the device waits for the host: it schedules, draws, sends the token.
    layer_launch_ms            until the host has issued a decoder layer; it runs ahead of a device that takes longer.
    """

    fp16_tflops: float
    int8_tops: float
    bandwidth_gbytes: float
    cache_mib: float
    cache_speedup: float
    float_efficiency: float
    integer_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    operator_us: float
    host_ms: float
    layer_launch_ms: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
            if not number or (value == 0 and name not in _MAY_BE_NONE):
                wanted = "a number of at least 0" if name in _MAY_BE_NONE else "a positive number"
                raise RequestError(f"device: {name} is {value!r}, wanted {wanted}")
            if name.endswith("efficiency") and value > 1:
                raise RequestError(f"device: {name} is {value}, wanted a share of at most 1")

    def seconds(self, operator: Operator) -> float:
        arithmetic = {
            "float": self.fp16_tflops * self.float_efficiency,
            "integer": self.int8_tops * self.integer_efficiency,
            "attention": self.fp16_tflops * self.attention_efficiency,
        }[operator.unit]
        cached = operator.nbytes <= self.cache_mib * 2**20
        nbytes = operator.weights + operator.nbytes / (self.cache_speedup if cached else 1)
        traffic = nbytes / (self.bandwidth_gbytes * 1e9 * self.bandwidth_efficiency)
        return max(operator.operations / (arithmetic * 1e12), traffic, self.operator_us * 1e-6)

    def step_seconds(self, operators: Iterable[Operator], layers: int) -> float:
        return 1e-3 * self.host_ms + max(1e-3 * self.layer_launch_ms * layers, sum(map(self.seconds, operators)))


@dataclass(frozen=True)
class Operator:
    """One operator of the graph.

    nbytes      activations read and written; weights are bytes of weights or of the key/value cache.
    operations  arithmetic, on a unit: "float", "integer" or "attention".
    """

    name: str
    nbytes: float
    operations: float = 0.0
    unit: str = "float"
    weights: float = 0.0


def load_device(name: str) -> Device:
    """A device file, or the shipped one of that name. Raises RequestError."""
    shipped = {file.stem: file for folder in _FOLDERS for file in sorted(folder.glob("*.yaml"))}
    path = shipped.get(name, Path(name))
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        parameters = dict(raw["parameters"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        close = did_you_mean(name, shipped) or did_you_mean_path(name)
        raise RequestError(f"{name}: not a device file ({error}){close}; shipped: {', '.join(shipped)}") from None
    wanted = {field.name for field in dataclasses.fields(Device)}
    if set(parameters) != wanted:
        odd = sorted(set(parameters) ^ wanted)
        raise RequestError(f"{path}: parameters: {', '.join(odd)}: wanted exactly {', '.join(sorted(wanted))}")
    return Device(**parameters)


def prefill_seconds(device: Device, config: ModelConfig, precision: str, batch_size: int, prompt_len: int) -> float:
    """Until the first token of each of batch_size prompts of prompt_len tokens."""
    tokens = batch_size * prompt_len
    pairs = batch_size * prompt_len * (prompt_len + 1) / 2
    operators = _operators(config, precision, tokens, batch_size, pairs, cached=0.0)
    return device.step_seconds(operators, config.num_hidden_layers)


def decode_seconds(device: Device, config: ModelConfig, precision: Precisions, batch_size: int, context: int) -> float:
    """One step that gives batch_size sequences, each with `context` tokens in the cache, their next token."""
    pairs = float(batch_size * context)
    operators = _operators(config, precision, batch_size, batch_size, pairs, cached=pairs)
    return device.step_seconds(operators, config.num_hidden_layers)


def memory_bytes(config: ModelConfig, precision: str, tokens: int) -> float:
    """Weights with a scale for each channel, and the key/value cache of `tokens` tokens in bfloat16; activations and the
    runtime come on top."""
    weights = 0.0
    for site in layout.SITES:
        outputs, inputs = layout.site_shape(config, site)
        weights += outputs * (inputs * _weight_bytes(precision) + (0 if precision == "float16" else 4))
        weights += 2 * outputs * (site in config.biased)
    norms = 2 * 4 * config.hidden_size
    tables = (1 if config.tie_word_embeddings else 2) * 2 * config.vocab_size * config.hidden_size
    cache = 2 * 2 * config.num_key_value_heads * config.head_dim * tokens
    return config.num_hidden_layers * (weights + norms + cache) + tables + 4 * config.hidden_size


def _weight_bytes(precision: str) -> float:
    if precision not in PRECISIONS:
        raise RequestError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    return _WEIGHT_BYTES[precision]


def _operators(
    config: ModelConfig, precision: Precisions, tokens: int, sequences: int, pairs: float, cached: float
) -> Iterator[Operator]:
    """tokens: rows of the matmuls; pairs: (query, key) pairs attention visits; cached: keys it reads from the cache."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield Operator("embedding", 4 * tokens * hidden)
    for index in range(config.num_hidden_layers):
        qkv, proj, fc1, fc2 = (precision if isinstance(precision, str) else precision[index][name] for name in layout.FUSED)
        yield from _norm(tokens, hidden)
        yield from _linear(qkv, tokens, hidden, queries + 2 * keys, bias=layout.Q_PROJ in config.biased)
        yield Operator("split", 4 * tokens * (queries + 2 * keys))
        yield Operator("rope", 4 * tokens * (queries + keys))
        yield Operator("write cache", 8 * tokens * keys)
        new = 4 * tokens * queries + (0 if cached else 4 * tokens * keys)
        yield Operator("attention", new, 4 * pairs * queries, "attention", 4 * keys * cached)
        yield from _linear(proj, tokens, queries, hidden, bias=layout.O_PROJ in config.biased)
        yield Operator("residual", 6 * tokens * hidden)
        yield from _norm(tokens, hidden)
        yield from _linear(fc1, tokens, hidden, 2 * inner, bias=False)
        yield Operator("split", 8 * tokens * inner)
        yield Operator("silu", 4 * tokens * inner)
        yield Operator("multiply", 6 * tokens * inner)
        yield from _linear(fc2, tokens, inner, hidden, bias=False)
        yield Operator("residual", 6 * tokens * hidden)
    yield from _norm(tokens, hidden)
    yield from _linear("float16", sequences, hidden, config.vocab_size, bias=False)


def _norm(tokens: int, hidden: int) -> Iterator[Operator]:
    """MindFormers computes it in float32 between two casts."""
    yield Operator("cast", 6 * tokens * hidden)
    yield Operator("norm", 8 * tokens * hidden)
    yield Operator("cast", 6 * tokens * hidden)


def _linear(precision: str, tokens: int, inputs: int, outputs: int, *, bias: bool) -> Iterator[Operator]:
    weight = _weight_bytes(precision) * inputs * outputs
    integer = precision in ("w8a8", "w8a8_static", "w4a8")
    if integer:
        yield Operator("quantize", 3 * tokens * inputs)
    traffic = (1 if integer else 2) * tokens * inputs + 2 * tokens * outputs
    yield Operator("matmul", traffic, 2.0 * tokens * inputs * outputs, "integer" if integer else "float", weight)
    if bias:
        yield Operator("bias", 4 * tokens * outputs)
