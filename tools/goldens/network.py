#!/usr/bin/env python3
"""Make tests/golden/*.npz: logits of Hugging Face transformers' Llama, the yardstick for our own network.

openPangu-Embedded is Llama with biases on q, k, v and o, so transformers runs it as LlamaConfig(attention_bias=True,
mlp_bias=False): torch on the CPU, float32, eager attention, one sequence at a time, no cache and no padding.

Each file holds, besides `made_with` (versions):
  config          config.json as a JSON string, to hand to make_checkpoint.write_checkpoint
  weights_sha256  of model.safetensors, so that a drift of the weights is told apart from a drift of the network
  ids_<i>         int32 [tokens]
  logits_<i>      float32 [tokens, vocabulary]
pangu_*.npz and llama_*.npz: tiny random models. Their weights are not kept; `seed` and dtype float32 give them again.
mini.npz: the embedded checkpoint (bfloat16 weights, computed in float32) on the first texts of assets/validation.jsonl;
  logits_<i> keeps the rows at positions_<i> only.

Needs torch and transformers, which nothing else in this project does: `make goldens` installs them first.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np

from ms_pangu_quant.job.arguments import Parser
from tools.dev.make_checkpoint import make_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
ASSETS = ROOT / "ms_pangu_quant/assets"
SEED = 7
LENGTHS = (1, 7, 33, 64)  # tokens
MINI_TEXTS, MINI_STEP = 2, 8  # texts of validation.jsonl; every 8th position is kept
TOLERANCE = 1e-4  # of --check, absolute: logits are 1 to 10, other CPUs differ by about 1e-5

GROUPS: dict[str, dict[str, Any]] = {  # query heads per key/value head
    "gqa1": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gqa4": {"num_attention_heads": 8, "num_key_value_heads": 2},
}
CASES: dict[str, dict[str, Any]] = {
    f"pangu_{group}_{'tied' if tied else 'untied'}": {**heads, "tie_word_embeddings": tied}
    for group, heads in GROUPS.items()
    for tied in (True, False)
}
CASES["pangu_head_dim"] = {**GROUPS["gqa2"], "head_dim": 24}  # 4 heads of 24 in a hidden size of 64
CASES["llama_no_bias"] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False}


def load_llama(directory: Path) -> Any:
    """The checkpoint as transformers' LlamaForCausalLM in float32; every tensor must find its place."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((directory / "config.json").read_text())
    biased = config["attention_bias"] if config["model_type"] == "llama" else config["bias"]
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rope_theta",
        "rms_norm_eps",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "hidden_act",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "head_dim",
    )
    kept = {field: config[field] for field in fields if field in config}  # head_dim may be absent
    model = LlamaForCausalLM(LlamaConfig(**kept, attention_bias=biased, mlp_bias=False, attn_implementation="eager"))
    model = model.to(torch.float32).eval()
    weights = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing != (["lm_head.weight"] if config["tie_word_embeddings"] else []):
        raise RuntimeError(f"{directory}: tensors do not fit Llama: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """[tokens] -> f32 [tokens, vocabulary]"""
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def describe(directory: Path) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "config": (directory / "config.json").read_text(),
        "weights_sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def tiny_golden(case: str, directory: Path) -> dict[str, Any]:
    config = make_config("tiny", dtype="float32", **CASES[case])
    if config["model_type"] == "llama":
        config = {key: value for key, value in config.items() if key not in ("bias", "auto_map")}
    write_checkpoint(directory, config, seed=SEED, dtype="float32")
    model = load_llama(directory)
    golden = {**describe(directory), "seed": np.int64(SEED)}
    for i, length in enumerate(LENGTHS):
        words = np.random.PCG64(length).random_raw(length)
        ids = (3 + words % np.uint64(config["vocab_size"] - 3)).astype(np.int32)  # above pad, bos and eos
        golden |= {f"ids_{i}": ids, f"logits_{i}": logits_of(model, ids)}
    return golden


def mini_golden() -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    directory = ASSETS / "openpangu-mini"
    model = load_llama(directory)
    tokenizer = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    golden = describe(directory)
    lines = (ASSETS / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines[:MINI_TEXTS]):
        ids = np.array([1, *tokenizer.encode(json.loads(line)["text"])], np.int32)
        positions = np.arange(0, len(ids), MINI_STEP, dtype=np.int32)
        golden |= {f"ids_{i}": ids, f"positions_{i}": positions, f"logits_{i}": logits_of(model, ids)[positions]}
    return golden


def differences(case: str, made: dict[str, Any]) -> list[str]:
    """What is not as in the file on disk: logits by more than TOLERANCE, anything else at all."""
    path = GOLDEN / f"{case}.npz"
    if not path.exists():
        return [f"{case}: {path} is missing"]
    with np.load(path) as file:
        kept = {key: file[key] for key in file.files}
    wrong = [f"{case}: {key} is in one of the two only" for key in sorted(kept.keys() ^ made.keys())]
    for key in sorted((kept.keys() & made.keys()) - {"made_with"}):
        if np.shape(made[key]) != kept[key].shape:
            wrong.append(f"{case}: {key}: shape {np.shape(made[key])}, on disk {kept[key].shape}")
        elif key.startswith("logits"):
            error = float(np.abs(made[key] - kept[key]).max())
            if not error <= TOLERANCE:
                wrong.append(f"{case}: {key}: off by {error:.2e}, allowed {TOLERANCE:.0e}")
        elif not np.array_equal(made[key], kept[key]):
            wrong.append(f"{case}: {key}: not as on disk")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/goldens/network.py --check")
    parser.add_argument("--check", action="store_true", help="compute and compare with the files, write nothing")
    check = parser.parse_args(arguments).check
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"goldens/network: {error}; run `make goldens`, or pip install -e '.[goldens]'", file=sys.stderr)
        return 2
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in [*CASES, "mini"]:
            golden = mini_golden() if case == "mini" else tiny_golden(case, Path(scratch) / case)
            logits = np.concatenate([golden[key] for key in golden if key.startswith("logits")])
            print(f"{case:20} logits std {logits.std():.2f}, largest {np.abs(logits).max():.1f}")
            if check:
                wrong += differences(case, golden)
            else:
                GOLDEN.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(GOLDEN / f"{case}.npz", **golden)
    for line in wrong:
        print(f"goldens/network: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
