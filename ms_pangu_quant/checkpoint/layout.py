"""The one table of names: which tensors a decoder block has, what feeds each linear layer, and what may absorb a scale.

Every other module that needs a tensor's name, shape or neighbour asks here; nothing else spells "self_attn.q_proj".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
NO_HEAD = "; a model whose head is its embedding has tie_word_embeddings true in config.json"  # why a head may be missing


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of a block.

    name        tensor name inside the block, without ".weight".
    input_name  which activation it reads; sites with the same input_name see the same numbers.
    producer    the norm or linear whose output channels can be divided by a scale that this site's input channels are
                multiplied by. Norms are exact producers of their whole input. v_proj produces o_proj's input through
                attention (a weighted mean over tokens: channels do not mix), one v channel for each group of query heads;
                up_proj produces down_proj's through a product with silu(gate) (channels do not mix).
    fused       MindFormers computes these sites as one matmul, so their schemes must agree.
    writes_stream  its outputs are added to the residual stream; with several ranks each has a part of its inputs.
    """

    name: str
    input_name: str
    producer: str
    fused: str
    writes_stream: bool = False

    @property
    def short(self) -> str:
        """ "q" of "self_attn.q_proj"."""
        return self.name.rpartition(".")[2].removesuffix("_proj")


INPUT_NAMES = ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_HIDDEN = (
    "attention_input",
    "attention_output",
    "mlp_input",
    "mlp_hidden",
)
FUSED = QKV, PROJ, FC1, FC2 = "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"
NORMS = ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
SITES = Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ = (
    LinearSite("self_attn.q_proj", ATTENTION_INPUT, ATTENTION_NORM, QKV),
    LinearSite("self_attn.k_proj", ATTENTION_INPUT, ATTENTION_NORM, QKV),
    LinearSite("self_attn.v_proj", ATTENTION_INPUT, ATTENTION_NORM, QKV),
    LinearSite("self_attn.o_proj", ATTENTION_OUTPUT, "self_attn.v_proj", PROJ, writes_stream=True),
    LinearSite("mlp.gate_proj", MLP_INPUT, MLP_NORM, FC1),
    LinearSite("mlp.up_proj", MLP_INPUT, MLP_NORM, FC1),
    LinearSite("mlp.down_proj", MLP_HIDDEN, "mlp.up_proj", FC2, writes_stream=True),
)
CACHED = K_PROJ, V_PROJ  # whose outputs the key and the value cache hold
BY_NAME = {site.name: site for site in SITES}


def sites_reading(input_name: str) -> tuple[LinearSite, ...]:
    return tuple(site for site in SITES if site.input_name == input_name)


def fused(name: str) -> tuple[LinearSite, ...]:
    """The sites that MindFormers computes as the layer of this name."""
    return tuple(site for site in SITES if site.fused == name)


@dataclass(frozen=True)
class Sizes:
    """What the shapes of tensors follow from: counts of features, heads and layers, and the layers with biases."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    biased: frozenset[LinearSite]


def site_shape(config: Sizes, site: LinearSite) -> tuple[int, int]:
    """(out_features, in_features)."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = {Q_PROJ: queries, K_PROJ: keys, V_PROJ: keys, GATE_PROJ: inner, UP_PROJ: inner}
    outputs = hidden if site.writes_stream else narrow[site]
    inputs = {ATTENTION_INPUT: hidden, ATTENTION_OUTPUT: queries, MLP_INPUT: hidden, MLP_HIDDEN: inner}[site.input_name]
    return outputs, inputs


def weight_count(config: Sizes, sites: Iterable[LinearSite] = SITES) -> int:
    """Weights of these linear layers of one block."""
    return sum(math.prod(site_shape(config, site)) for site in sites)


def block_prefix(index: int) -> str:
    return f"model.layers.{index}."


def block_shapes(config: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of a float block's tensors, names without the block's prefix."""
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (config.hidden_size,) for norm in NORMS}
    for site in SITES:
        out_features, in_features = site_shape(config, site)
        shapes[f"{site.name}.weight"] = (out_features, in_features)
        if site in config.biased:
            shapes[f"{site.name}.bias"] = (out_features,)
    return shapes


def outer_shapes(config: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the blocks. A tied head has no tensor of its own."""
    vocab = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: vocab, FINAL_NORM: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = vocab
    return shapes


FREQUENCIES = ("inv_freq", "original_inv_freq")
COSINES, SINES = "cos_cached", "sin_cached"
_MASKS = ("causal_mask", "attention_mask", "attn_mask", "tril", "masked_bias")
_BUFFERS = (*FREQUENCIES, COSINES, SINES, "cos_sin_cache", "freqs_cis", *_MASKS, "position_ids")
_MASK = re.compile(r"(?:.*\.)?(?:attn|attention|self_attn|self_attention)\.(?:bias|mask)")


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor follows from config.json and is no weight: rope's frequencies and tables, masks, positions."""
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return name.rpartition(".")[2] in _BUFFERS or bool(square and _MASK.fullmatch(name))


def layer_names(config: Sizes) -> list[str]:
    """Full names of all blocks' linear layers, block by block."""
    return [f"{block_prefix(index)}{site.name}" for index in range(config.num_hidden_layers) for site in SITES]
