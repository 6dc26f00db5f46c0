"""config.json of an openPangu-Embedded or plain Llama checkpoint, reduced to what the network needs and checked.

Both families are the same network: pre-norm RMSNorm, SwiGLU, rotate-half rope, grouped-query attention. What differs is in
checkpoint/architecture.py. Anything that would change the graph (rope scaling, experts, sliding windows, attention sinks, a
vision tower) is refused by name rather than loaded wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ms_pangu_quant.checkpoint.architecture import ARCHITECTURES, is_diffusion
from ms_pangu_quant.checkpoint.layout import Sizes
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.suggestion import dangling, did_you_mean_path, fetching

QUANTIZATION_FILE = "quantization_description.json"  # Golden Stick's
ASCEND_FILE = "quant_model_description.json"  # msModelSlim's
HADAMARD_METHOD = "golden-stick-hadamard"
QUANTIZED_KEYS = ("quantization_config", "compression_config")  # the latter is compressed-tensors' older

_MOST_FOLDERS = 1000  # that are looked into

# A key that only another architecture's config has -> what that architecture is.
_OTHER_GRAPHS = {  # experts and towers first: such models may have the others' keys too
    "vision_config": "openPangu-VL (a vision tower and multi-modal rope)",
    "num_experts": "openPangu-Pro-MoE or openPangu-R-72B (a mixture of experts)",
    "n_routed_experts": "openPangu-Ultra-MoE (a mixture of experts)",
    "num_routed_experts": "openPangu-Ultra-MoE or openPangu-Pro-MoE (a mixture of experts)",
    "num_local_experts": "a mixture of experts",
    "kv_lora_rank": "openPangu-Ultra-MoE (multi-head latent attention)",
    "param_sink_number": "openPangu-R-7B (attention sinks, sliding windows, partial rope)",
    "qk_rope_dim": "openPangu-R-7B (partial rope)",
    "qk_nope_dim": "openPangu-R-7B (partial rope)",
    "num_nextn_predict_layers": "a variant with a multi-token-prediction layer (openPangu-R)",
    "sliding_window": "a variant with sliding-window attention",
    "layer_types": "openPangu-R-7B (alternating attention types)",
}
_ONE_MODEL = (  # fields of ModelConfig that no rewrite of a checkpoint changes: its shapes and its function
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "biased", "rms_norm_eps", "rope_theta"),
)


@dataclass(frozen=True)
class ModelConfig(Sizes):
    """Sizes, and what else of config.json matters; ids are None where the file has none.

    online_hadamard  what the MLP's last layer reads is to be multiplied by a Hadamard matrix when the model is run, see
                     transforms/rotate.py; such a checkpoint has HADAMARD_METHOD as its quant_method, which others refuse.
    """

    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    eos_token_id: int | None
    pad_token_id: int | None
    torch_dtype: str
    raw: Mapping[str, Any]
    online_hadamard: bool = False

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        if not path.exists():
            close = did_you_mean_path(path.parent) or dangling(path) or _held_below(path.parent)
            raise CheckpointError(f"{path.parent}: no config.json here{close}; wanted a Hugging Face checkpoint directory")
        return cls.from_dict(read_json(path), where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str) -> ModelConfig:
        """Raises CheckpointError for a missing or senseless value and for any other architecture."""
        _refuse_other_graphs(raw, where)
        heads = _count(raw, "num_attention_heads", where)
        kv_heads = _count(raw, "num_key_value_heads", where, default=heads)
        hidden = _count(raw, "hidden_size", where)
        if raw.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
            )
        head_dim = _count(raw, "head_dim", where, default=hidden // heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim is {head_dim}, wanted an even number (rope rotates halves)")
        architecture = ARCHITECTURES[raw["model_type"]]
        return cls(
            hidden_size=hidden,
            intermediate_size=_count(raw, "intermediate_size", where),
            num_hidden_layers=_count(raw, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_count(raw, "vocab_size", where),
            max_position_embeddings=_count(raw, "max_position_embeddings", where),
            rms_norm_eps=_positive(raw, "rms_norm_eps", where, default=architecture.rms_norm_eps),
            rope_theta=_rope_theta(raw, where, default=architecture.rope_theta),
            biased=architecture.biased_layers(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_id=_token_id(raw, "eos_token_id"),
            pad_token_id=_token_id(raw, "pad_token_id"),
            torch_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
            raw=dict(raw),
            online_hadamard=quantization_settings(raw).get("quant_method") == HADAMARD_METHOD,
        )


def differences(reference: ModelConfig, config: ModelConfig) -> Iterator[str]:
    """Why two checkpoints cannot be one model's, a clause for each field; none where one may be a rewriting of the other.

    One question, whoever asks: only within a model is a weight the rounding of another, and does a KL or a ratio of speeds
    say what quantization costs. Of one model may differ: tie_word_embeddings, as a rotation gives a tied head a tensor of
    its own, and online_hadamard, which the weights make up for; the lengths of texts, ids and dtype, which are how it is
    used and stored; and the architecture's name, as both are one network.
    """
    for key in _ONE_MODEL:
        got, wanted = getattr(config, key), getattr(reference, key)
        if got != wanted:
            yield f"{_TOLD.get(key, key)} is {_told(got)}, wanted {_told(wanted)}"


_TOLD = {"biased": "the set of layers with biases"}


def _told(value: Any) -> str:
    """Layers by their short names."""
    return f"[{' '.join(sorted(site.short for site in value))}]" if isinstance(value, frozenset) else str(value)


def check_same_model(directory: Path, config: ModelConfig, against: Path, reference: ModelConfig) -> None:
    """Raises CheckpointError where the two directories' configs have differences()."""
    found = "; ".join(differences(reference, config))
    if found:
        raise CheckpointError(
            f"{directory}: {found}, as in {against}: these are not the same model; give two directories of one model"
        )


def quantization_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """quantization_config of a config.json, empty if there is none."""
    settings = raw.get("quantization_config")
    return settings if isinstance(settings, Mapping) else {}


def _held_below(directory: Path) -> str:
    """Where the checkpoint is that a folder around it was named for; the current snapshot of a download cache."""
    if (directory / "adapter_config.json").exists():
        return ", but an adapter, which counts once it is merged into its model"
    found = [
        sorted(path.parent for path in islice(directory.glob(f"{below}/config.json"), _MOST_FOLDERS))
        for below in ("snapshots/*", "models--*/snapshots/*", "*", "*/*")
    ]
    held = next(filter(None, found), [])
    current = [path for path in held if _is_current(path)]
    shown = current if len(current) == 1 else held
    more = f" and {len(shown) - 1} more: name one" if len(shown) > 1 else ": name that"
    return f", but in {shown[0]}{more}" if shown else ""


def _is_current(snapshot: Path) -> bool:
    """Whether the cache's branch main is at it."""
    with suppress(OSError, ValueError):
        return (snapshot.parent.parent / "refs" / "main").read_text(encoding="utf-8").strip() == snapshot.name
    return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}){did_you_mean_path(path)}") from None
    try:
        raw = json.loads(content)  # of bytes, it takes a byte order mark
    except (ValueError, RecursionError) as error:
        todo = fetching(content, "")
        raise CheckpointError(f"{path}: not readable as JSON ({error}){todo and f'; {todo}'}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: got a JSON {type(raw).__name__}, wanted an object")
    return raw


def _refuse_other_graphs(raw: Mapping[str, Any], where: str) -> None:
    for key, variant in _OTHER_GRAPHS.items():
        value = raw.get(key)
        if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if key == "sliding_window" and raw.get("use_sliding_window") is False:
            continue
        if value:
            raise CheckpointError(
                f"{where}: {key!r} marks {variant}; only openPangu-Embedded-1B/-7B and plain Llama "
                "checkpoints have the graph built here"
            )
    model_type = raw.get("model_type")
    if model_type not in tuple(ARCHITECTURES):  # of a type that has no hash, perhaps
        wanted = ", ".join(map(repr, ARCHITECTURES))
        raise CheckpointError(f"{where}: model_type is {model_type!r}, wanted one of {wanted}")
    if is_diffusion(raw):
        raise CheckpointError(
            f"{where}: 'rms_norm_eps' 1e-06 at openPangu-Embedded-7B's sizes marks an openPangu-7B-Diffusion, which fills "
            "in blocks of masked tokens; the 7B that is read here has 1e-05"
        )
    scaling = raw.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        raise CheckpointError(f"{where}: rope_scaling {dict(scaling)} is not supported; openPangu-Embedded has none")
    if raw.get("mlp_bias"):
        raise CheckpointError(f"{where}: mlp_bias is true; openPangu-Embedded has no biases in its MLP")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{where}: hidden_act is {activation!r}, wanted 'silu'")


def _count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise CheckpointError(f"{where}: {key} is {value!r}, wanted a positive whole number")
    return value


def _positive(raw: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise CheckpointError(f"{where}: {key} is {value!r}, wanted a positive number")
    return float(value)


def _rope_theta(raw: Mapping[str, Any], where: str, default: float) -> float:
    """transformers 5 moves rope_theta into rope_parameters."""
    parameters = raw.get("rope_parameters")
    if isinstance(parameters, Mapping):
        if parameters.get("rope_type", "default") != "default":
            raise CheckpointError(f"{where}: rope_parameters {dict(parameters)} is not supported; wanted type 'default'")
        raw = {**parameters, **raw}
    return _positive(raw, "rope_theta", where, default)


def _token_id(raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
