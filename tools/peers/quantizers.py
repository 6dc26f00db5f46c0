"""Other quantizers as commands: what they are given, and how they are asked.

llm-compressor and msModelSlim need packages that contradict this project's, and some that contradict each other's, so each
runs in a Python of its own. Nothing here imports them.

They are given a float32 copy of a checkpoint as what both know, a Llama (with biases, if the checkpoint has them): on the
CPU neither runs every step in bfloat16. Its tokenizer has a word for every id, the id's decimal digits, so that text of
such words is the very token ids that the other tools calibrate on, whatever tokenizer the checkpoint came with.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import CARRIED_OVER, carry_over

PACKAGES = {"llm-compressor": "llmcompressor", "msmodelslim": "msmodelslim"}
ANSWERS = "n\n" * 9  # msModelSlim asks whether it may go on with settings that it has no experience with

LLM_COMPRESSOR = """
import json
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=DTYPE)
data = {}
if DATA:
    rows = [json.loads(line)["token_ids"] for line in open(DATA)]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    longest = max(len(row["input_ids"]) for row in rows)
    data = dict(dataset=Dataset.from_list(rows), num_calibration_samples=len(rows), max_seq_length=longest)
oneshot(model=model, recipe=RECIPE, **data)
model.save_pretrained(OUTPUT, save_compressed=True)
"""


class PeerError(Exception):
    """A peer cannot be run, or failed; the message is one line."""


def version_of(python: str | None, tool: str) -> str:
    """Of the tool that this interpreter has. Raises PeerError where there is none."""
    option = f"--{PACKAGES[tool]}-python"
    if python is None:
        raise PeerError(f"{tool}: no interpreter given; pass {option} PYTHON, of an environment that has it installed")
    program = f"from importlib.metadata import version; print(version({PACKAGES[tool]!r}))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    except OSError as error:
        raise PeerError(f"{option} {python}: {error.strerror}") from None
    if done.returncode:
        raise PeerError(f"{option} {python}: has no package {PACKAGES[tool]}")
    return done.stdout.strip()


def python_command(python: str, program: str, **values: Any) -> list[str]:
    """Run `program` with these names set to their values as text."""
    lines = [f"{name} = {str(value)!r}" for name, value in values.items()]
    return [python, "-c", "\n".join(lines) + program]


def llmcompressor_command(
    python: str, source: Path, output: Path, modifiers: Mapping[str, Any], data: Path | None, dtype: str = "float32"
) -> list[str]:
    """modifiers  name of each llm-compressor modifier -> its arguments, in order.  data  rows of `token_ids`, or None.
    dtype  that the source is read in."""
    recipe = json.dumps({"default_stage": {"default_modifiers": modifiers}})  # JSON is YAML
    return python_command(python, LLM_COMPRESSOR, SOURCE=source, OUTPUT=output, RECIPE=recipe, DATA=data or "", DTYPE=dtype)


def msmodelslim_command(
    python: str, source: Path, output: Path, processors: Sequence[Mapping[str, Any]], data: Path
) -> list[str]:
    """Writes the settings beside the output. processors  of `spec.process`.  data  rows of `inputs_pretokenized`.

    Answer what it asks with ANSWERS on standard input.
    """
    settings = {
        "apiversion": "modelslim_v1",
        "metadata": {
            "config_id": output.name,
            "score": 90,
            "verified_model_types": ["default"],
            "label": {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False},
        },
        "spec": {
            "runner": "layer_wise",
            "process": [*processors],
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
            "dataset": str(data.absolute()),
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_name(f"{output.name}.yaml")
    file.write_text(json.dumps(settings))
    command = [str(Path(python).with_name("msmodelslim")), "quant", "--model_type", "default", "--device", "cpu"]
    command += ["--model_path", str(source), "--save_path", str(output), "--trust_remote_code", "False"]
    return [*command, "--config_path", str(file)]


def linear_quant(
    *, act: str = "per_token", symmetric: bool = True, bits: int = 8, method: str = "minmax"
) -> dict[str, Any]:
    """msModelSlim's processor that rounds every linear layer but the head, weights per channel, activations to int8."""
    return {
        "type": "linear_quant",
        "qconfig": {
            "act": {"scope": act, "dtype": "int8", "symmetric": symmetric, "method": "minmax"},
            "weight": {"scope": "per_channel", "dtype": f"int{bits}", "symmetric": True, "method": method},
        },
        "include": ["*"],
        "exclude": ["*lm_head*"],
    }


def as_llama(config: Mapping[str, Any], *, biases: bool) -> dict[str, Any]:
    """config.json of a Llama with biases where the layers have some; an openPangu-Embedded model is one."""
    kept = {key: value for key, value in config.items() if key not in ("bias", "auto_map")}
    return {
        **kept,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": biases,
        "mlp_bias": False,
    }


def write_source(checkpoint: Path, directory: Path, dtype: str = "float32") -> None:
    """The copy of a checkpoint that the peers are given. float32: whole in memory, as they read it too. bfloat16: links to
    a checkpoint that is stored so."""
    reader = CheckpointReader(checkpoint)
    config = as_llama(reader.config.raw, biases=bool(reader.config.biased))
    directory.mkdir(parents=True, exist_ok=True)
    if dtype == "float32":
        tensors = {name: reader.files.read_float32(name) for name in reader.files.entries}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        for file in checkpoint.glob("*.safetensors*"):
            (directory / file.name).symlink_to(file.absolute())
    model = {"type": "WordLevel", "vocab": {str(i): i for i in range(reader.config.vocab_size)}, "unk_token": "0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "0", "pad_token": "0"}
    for name, value in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", names),
        ("config.json", {**config, "torch_dtype": dtype}),
    ):
        (directory / name).write_text(json.dumps(value))


def give_back_tokenizer(checkpoint: Path, directory: Path) -> None:
    """The checkpoint's own tokenizer files in a directory that has the words, or what a peer made of them."""
    for name in CARRIED_OVER:
        (directory / name).unlink(missing_ok=True)
    carry_over(checkpoint, directory)


def write_calibration(sequences: Sequence[NDArray[np.int32]], directory: Path) -> None:
    """The same token ids for llm-compressor (token_ids.jsonl) and for msModelSlim (words.jsonl)."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [sequence.tolist() for sequence in sequences]
    (directory / "token_ids.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in rows))
    words = ({"inputs_pretokenized": " ".join(map(str, row))} for row in rows)
    (directory / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
