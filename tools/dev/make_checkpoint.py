#!/usr/bin/env python3
"""Write a random openPangu-Embedded checkpoint: real shapes and layout, made-up weights.

What it is for: measuring memory and time at the real 1B and 7B sizes, and giving tests any small shape, offline.
How it works: the tensors of a config are planned first, so that every file header and size is known; then the numbers
are drawn slice by slice on all cores and appended to one safetensors file after another. No tensor is ever whole in
memory.

The bytes depend on (seed, dtype, config) alone. Value i of a tensor is the sum of the four 16-bit quarters of word i of
the PCG64 stream seeded with (seed, SHA-256 of the tensor's name): near normal, at most 3.46 sigma. Integer sums, one
float32 multiplication and one addition give the same bits on every machine. NumPy's standard_normal is no faster on two
cores, takes its tails from libm, and its stream may change with NumPy's version.

Scales (they keep activations sane at any depth): weights 1/sqrt(fan_in), o_proj and down_proj 1/sqrt(2 * layers) of
that, so the residual stream ends near 1; q and k times sqrt(2), so attention scores have std 2 and are not flat;
embedding and head 2.5/sqrt(hidden), so logits have a std of a few whatever the width; biases a tenth; norm weights
1 +- 0.2.

What it does not do: write a tokenizer or modelling code, imitate the outlier channels of trained models, import
mindspore.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np

from ms_pangu_quant.checkpoint.architecture import ARCHITECTURES

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}  # safetensors' name, bytes
SHARD_BYTES = 4_500_000_000
SLICE = 1 << 21  # values one task draws: 16 MB of random words at most in flight per task
CELL = 1 << 14  # values drawn at a time inside a task, so that they stay in the L2 cache
SUM_STD = math.sqrt(4 * (65536**2 - 1) / 12)  # std of the sum of four uniform 16-bit integers

EMBEDDED: dict[str, Any] = {  # what openPangu-Embedded-1B and -7B have in common
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "model_type": "PanguEmbedded",
    "bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "vocab_size": 153376,
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "pad_token_id": 0,
    "use_cache": True,
    "transformers_version": "4.53.2",
}
SHAPES: dict[str, dict[str, Any]] = {  # no head_dim: the published configs have none either
    "1b": {
        **EMBEDDED,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 26,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "rope_theta": 4000000.0,
        "tie_word_embeddings": True,
    },
    "7b": {
        **EMBEDDED,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 16000000.0,
        "tie_word_embeddings": False,
    },
    "tiny": {
        **EMBEDDED,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 96,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    },
}
HELP = """\
Write a random openPangu-Embedded checkpoint in Hugging Face layout (config.json, generation_config.json,
model*.safetensors), for measuring time and memory, or for tests. Text that such a model generates is noise."""
EPILOG = """\
shapes   tensors  parameters  bfloat16   what
  1b         340      1.16e9    2.3 GB   openPangu-Embedded-1B: 26 layers, tied head, one file
  7b         445      8.03e9   16.1 GB   openPangu-Embedded-7B: 34 layers, untied head, four files
  tiny        28      8.0e4     0.2 MB   2 layers, hidden 64, 4 heads, 2 key/value heads, vocabulary 96, tied head

No tokenizer is written: calibrate and run such a model with token ids ({"token_ids": [...]} lines), not with text.
The same seed gives the same bytes on every machine. Memory stays below 0.4 GB. config.json comes last: a directory
without it is the rest of a killed run and can be deleted.

Example:
  python tools/dev/make_checkpoint.py --shape tiny --output /tmp/tiny
  python tools/dev/make_checkpoint.py --shape 7b --layers 4 --output /tmp/pangu-7b-4-layers
"""


class MakeCheckpointError(Exception):
    """The output or the request is unusable; the message is one line."""


@dataclass(frozen=True)
class Tensor:
    """One tensor to draw: mean + std * (near normal, |x| <= 3.46)."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def make_config(shape: str, *, layers: int | None = None, dtype: str = "bfloat16", **changes: Any) -> dict[str, Any]:
    """config.json of a shape of SHAPES, with fewer (or more) layers and any other field changed."""
    config = {**SHAPES[shape], "torch_dtype": dtype, **changes}
    return config if layers is None else {**config, "num_hidden_layers": layers}


def plan_tensors(config: dict[str, Any]) -> list[Tensor]:
    """Every tensor of the checkpoint in model order; 12 per layer plus biases, nothing is drawn yet.

    The layers that the architecture of model_type says have biases.
    """
    try:
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    except KeyError as missing:
        raise MakeCheckpointError(f"config: {missing.args[0]} is missing") from None
    head_dim = config.get("head_dim") or hidden // heads
    biased = ARCHITECTURES[config.get("model_type", EMBEDDED["model_type"])].biased_layers(config)
    depth = 1 / math.sqrt(2 * layers)  # two additions to the residual stream per layer

    def linear(name: str, out: int, fan_in: int, gain: float = 1.0) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (out, fan_in), gain / math.sqrt(fan_in))
        if any(name.endswith(site.name) for site in biased):
            yield Tensor(f"{name}.bias", (out,), 0.1 * gain)

    def layer(at: str) -> Iterator[Tensor]:
        yield Tensor(f"{at}.input_layernorm.weight", (hidden,), 0.2, 1.0)
        yield from linear(f"{at}.self_attn.q_proj", heads * head_dim, hidden, math.sqrt(2))
        yield from linear(f"{at}.self_attn.k_proj", kv_heads * head_dim, hidden, math.sqrt(2))
        yield from linear(f"{at}.self_attn.v_proj", kv_heads * head_dim, hidden)
        yield from linear(f"{at}.self_attn.o_proj", hidden, heads * head_dim, depth)
        yield Tensor(f"{at}.post_attention_layernorm.weight", (hidden,), 0.2, 1.0)
        yield from linear(f"{at}.mlp.gate_proj", inner, hidden)
        yield from linear(f"{at}.mlp.up_proj", inner, hidden)
        yield from linear(f"{at}.mlp.down_proj", hidden, inner, depth)

    tensors = [Tensor("model.embed_tokens.weight", (vocab, hidden), 2.5 / math.sqrt(hidden))]
    for index in range(layers):
        tensors += layer(f"model.layers.{index}")
    tensors.append(Tensor("model.norm.weight", (hidden,), 0.2, 1.0))
    if not config.get("tie_word_embeddings", False):
        tensors += linear("lm_head", vocab, hidden, 2.5)
    return tensors


def plan_shards(tensors: list[Tensor], itemsize: int, shard_bytes: int) -> dict[str, list[Tensor]]:
    """File name -> its tensors, in model order, at most shard_bytes of data each; a larger tensor gets a file alone."""
    shards: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size * itemsize > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size * itemsize
    if len(shards) == 1:
        return {"model.safetensors": tensors}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def header(tensors: list[Tensor], dtype: str) -> bytes:
    """safetensors header: u64 little-endian length, JSON padded with spaces to a multiple of 8; the data follow."""
    code, itemsize = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size * itemsize
        entries[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draw(tensor: Tensor, start: int, stop: int, seed: int, dtype: str) -> np.ndarray:
    """Values start..stop of the flattened tensor, in `dtype` (bfloat16 as uint16 bits). Releases the GIL."""
    key = np.frombuffer(hashlib.sha256(tensor.name.encode()).digest(), "<u4")
    stream = np.random.PCG64(np.random.SeedSequence([seed, *key.tolist()])).advance(start)
    scale, mean = np.float32(tensor.std / SUM_STD), np.float32(tensor.mean)
    low_halves = np.uint64(0x0000FFFF0000FFFF)
    out = np.empty(stop - start, {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[dtype])
    for cell in range(0, out.size, CELL):
        part = out[cell : cell + CELL]
        words = stream.random_raw(part.size)
        pairs = words >> np.uint64(16)
        pairs &= low_halves
        words &= low_halves
        pairs += words  # two 17-bit sums in each word
        halves = pairs.view(np.uint32)
        sums = (halves[0::2] + halves[1::2]).astype(np.int32)
        sums -= 2 * 65535  # symmetric around 0
        values = sums.astype(np.float32)  # exact: |sum| < 2**24
        values *= scale
        values += mean
        part[:] = bfloat16_bits(values) if dtype == "bfloat16" else values
    return out


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round f32 to nearest even bfloat16, as u32 < 2**16; values must be finite. (ml_dtypes would hold the GIL.)"""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded


def write_checkpoint(
    output: Path,
    config: dict[str, Any],
    *,
    seed: int,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write config and random weights into `output`, which must be empty or absent; all or nothing.

    config    as config.json will say, any sizes; model_type one that the package reads. torch_dtype becomes `dtype`.
    on_bytes  called with the bytes of each piece of data written, for a progress bar.
    Files appear under temporary names and are renamed when whole, config.json last. On an error or Ctrl-C what was
    written is removed again.
    """
    if dtype not in DTYPES:
        raise MakeCheckpointError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    shards = plan_shards(plan_tensors(config), DTYPES[dtype][1], shard_bytes)
    headers = {name: header(tensors, dtype) for name, tensors in shards.items()}
    data_bytes = sum(tensor.size for tensors in shards.values() for tensor in tensors) * DTYPES[dtype][1]
    check_output(output, data_bytes + sum(map(len, headers.values())) + (1 << 20))
    made_here = [path for path in (output, *output.parents) if not path.exists()]
    written: list[Path] = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, tensors in shards.items():
            with whole_file(output / name, written) as file:
                file.write(headers[name])
                for piece in drawn_in_order(tensors, seed, dtype):
                    file.write(piece)
                    on_bytes(piece.nbytes)
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        documents = {"generation_config.json": generation_config(config), "config.json": {**config, "torch_dtype": dtype}}
        if len(shards) > 1:
            metadata = {"total_parameters": data_bytes // DTYPES[dtype][1], "total_size": data_bytes}
            index = {"metadata": metadata, "weight_map": weight_map}
            documents = {"model.safetensors.index.json": index, **documents}
        for name, document in documents.items():
            with whole_file(output / name, written) as file:
                file.write(json.dumps(document, indent=2).encode() + b"\n")
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        for path in made_here:
            with contextlib.suppress(OSError):  # somebody else put something there: theirs
                path.rmdir()
        raise


def check_output(output: Path, needed: int) -> None:
    """Refuse an output that is a file, holds anything, or whose disk has less than `needed` bytes free."""
    if output.exists() and not output.is_dir():
        raise MakeCheckpointError(f"{output}: is a file; wanted an empty or new directory")
    if output.is_dir() and any(output.iterdir()):
        rest = "" if (output / "config.json").exists() else " (no config.json in it: the rest of a killed run?)"
        raise MakeCheckpointError(f"{output}: is not empty{rest}; delete it or name another directory")
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MakeCheckpointError(f"{output}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


@contextlib.contextmanager
def whole_file(path: Path, written: list[Path]) -> Iterator[Any]:
    """A file that has its name only once it is whole; both names are noted in `written` for the clean-up."""
    partial = path.with_name(f".{path.name}.partial")
    written += [partial, path]
    with open(partial, "wb") as file:
        yield file
    os.replace(partial, path)


def drawn_in_order(tensors: list[Tensor], seed: int, dtype: str) -> Iterator[np.ndarray]:
    """The data of one file, slice by slice, drawn on all cores a few slices ahead of the writer."""
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    waiting: deque[Any] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for tensor in tensors:
            for start in range(0, tensor.size, SLICE):
                waiting.append(pool.submit(draw, tensor, start, min(start + SLICE, tensor.size), seed, dtype))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    return {**ids, "do_sample": False}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=list(SHAPES), help="whose sizes to use; see below")
    parser.add_argument("--output", required=True, type=Path, metavar="D", help="directory to write: new, or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights (default: 0)")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="of the weights (default: bfloat16)")
    parser.add_argument("--layers", type=int, metavar="N", help="write N decoder layers instead of all")
    chosen = parser.parse_args(arguments)
    if chosen.seed < 0 or (chosen.layers is not None and chosen.layers < 1):
        parser.error("--seed must be 0 or more, --layers 1 or more")
    return chosen


def run(chosen: argparse.Namespace) -> str:
    """Write the checkpoint under a progress bar (drawn on a terminal only); returns the closing line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    config = make_config(chosen.shape, layers=chosen.layers, dtype=chosen.dtype)
    tensors = plan_tensors(config)
    total = sum(tensor.size for tensor in tensors) * DTYPES[chosen.dtype][1]
    console = Console(stderr=True)
    columns = ("writing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=total)
        write_checkpoint(
            chosen.output, config, seed=chosen.seed, dtype=chosen.dtype, on_bytes=lambda count: progress.advance(bar, count)
        )
    return (
        f"{chosen.output}: {len(tensors)} tensors, {total / 1e9:.3g} GB, "
        f"{len(list(chosen.output.glob('*.safetensors')))} file(s), {time.monotonic() - began:.1f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    try:
        print(run(chosen))
    except (MakeCheckpointError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_checkpoint: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
