#!/usr/bin/env python3
"""Make tests/golden/formats/*.npz: quantized checkpoints and logits of programs that are not ours.

msmodelslim_<scheme>.npz   what msModelSlim writes for a tiny Llama with biases on the CPU (round to nearest, AscendV1)
llmcompressor_w8a8.npz     what llm-compressor writes for the same model (QuantizationModifier, scheme W8A8)
  tensor/<name>   every tensor;  json/<file>  config.json and the description;  seed of the float32 weights, which
  make_checkpoint writes again, and weights_sha256 of its model.safetensors
compressed_tensors.npz     logits of transformers with the compressed-tensors library on the embedded checkpoint in our
  compressed-tensors format, decompressed: `ids` [tokens] and logits_<recipe> [tokens, vocabulary] of recipes without
  calibration, activations left in float; sha256_<recipe> of what was loaded

Each needs packages that contradict each other's and this project's, so each is made by its own interpreter:
  tools/goldens/formats.py msmodelslim        --python PY   with msmodelslim==26.1.0 torch transformers==4.57.1
  tools/goldens/formats.py llmcompressor      --python PY   with llmcompressor==0.14.0.1
  tools/goldens/formats.py compressed_tensors --python PY   with compressed-tensors==0.19.0 transformers==5.17.0 accelerate
PY is any Python that has them; this file is run by the project's own.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np
from safetensors.numpy import load_file

from ms_pangu_quant.job.arguments import Parser
from tools.dev.make_checkpoint import make_config, write_checkpoint
from tools.peers.quantizers import (
    ANSWERS,
    as_llama,
    linear_quant,
    llmcompressor_command,
    msmodelslim_command,
    python_command,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/formats"
MINI = ROOT / "ms_pangu_quant/assets/openpangu-mini"
SEED = 7
SCHEMES = {  # msModelSlim
    "w8a8_dynamic": linear_quant(),
    "w4a8_dynamic": linear_quant(bits=4),
    "w8a8": linear_quant(act="per_tensor", symmetric=False),
}
W8A8 = {"QuantizationModifier": {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}}  # llm-compressor
RECIPES = ("w8a8_rtn", "w4a8_g128_rtn")

TOKENIZER = """
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
letters = {**{"<unk>": 0, "<s>": 1, "</s>": 2}, **{chr(i + 32): i + 3 for i in range(93)}}
made = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
).save_pretrained(DIRECTORY)
"""

TRANSFORMERS = """
import numpy as np, torch
from compressed_tensors.quantization import disable_quantization
from transformers import CompressedTensorsConfig, LlamaForCausalLM
settings = CompressedTensorsConfig(run_compressed=False)
model = LlamaForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32, quantization_config=settings)
model.apply(disable_quantization)  # of activations: the weights have been decompressed
ids = torch.from_numpy(np.load(IDS).astype(np.int64))[None]
with torch.inference_mode():
    np.save(OUTPUT, model(ids).logits[0].numpy())
"""


def tiny_llama(directory: Path) -> Path:
    config = make_config(
        "tiny",
        dtype="float32",
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        attention_bias=True,
        vocab_size=96,
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )
    config = {key: value for key, value in config.items() if key not in ("bias", "auto_map")}
    write_checkpoint(directory, config, seed=SEED, dtype="float32")
    return directory


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, input=ANSWERS, text=True)


def golden_of(written: Path, source: Path) -> dict[str, Any]:
    tensors = {name: value for file in sorted(written.glob("*.safetensors")) for name, value in load_file(file).items()}
    texts = {name: (written / name) for name in ("config.json", "quant_model_description.json")}
    return {
        **{f"tensor/{name}": value for name, value in tensors.items()},
        **{f"json/{name}": path.read_text() for name, path in texts.items() if path.exists()},
        "seed": np.int64(SEED),
        "weights_sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest(),
    }


def msmodelslim(python: str, scratch: Path) -> dict[str, dict[str, Any]]:
    source = tiny_llama(scratch / "tiny")
    run(python_command(python, TOKENIZER, DIRECTORY=source))
    rows = [{"inputs_pretokenized": text} for text in ("def add(a, b): return a + b", "The fox jumps over the dog.")]
    (scratch / "calib.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}
    for name, processor in SCHEMES.items():
        run(msmodelslim_command(python, source, scratch / name, [processor], scratch / "calib.jsonl"))
        made[f"msmodelslim_{name}"] = golden_of(scratch / name, source)
    return made


def llmcompressor(python: str, scratch: Path) -> dict[str, dict[str, Any]]:
    source = tiny_llama(scratch / "tiny")
    run(python_command(python, TOKENIZER, DIRECTORY=source))
    run(llmcompressor_command(python, source, scratch / "out", W8A8, None))
    return {"llmcompressor_w8a8": golden_of(scratch / "out", source)}


def compressed_tensors(python: str, scratch: Path) -> dict[str, dict[str, Any]]:
    from ms_pangu_quant.checkpoint.reader import CheckpointReader
    from ms_pangu_quant.formats.reader import FORMATS
    from ms_pangu_quant.pipeline.loop import quantize
    from ms_pangu_quant.recipe.parse import find_recipe, load_recipe

    ids = np.arange(3, 1024, 32, dtype=np.int32)
    np.save(scratch / "ids.npy", ids)
    golden: dict[str, Any] = {"ids": ids}
    for recipe in RECIPES:
        output = scratch / recipe
        stored_as = FORMATS["compressed-tensors"]
        quantize(CheckpointReader(MINI), load_recipe(find_recipe(recipe)), output, stored_as=stored_as)
        golden[f"sha256_{recipe}"] = (output / "SHA256SUMS").read_text()
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps(as_llama(config, biases=config["bias"])))
        ids_and_logits = {"IDS": scratch / "ids.npy", "OUTPUT": scratch / "logits.npy"}
        run(python_command(python, TRANSFORMERS, DIRECTORY=output, **ids_and_logits))
        golden[f"logits_{recipe}"] = np.load(scratch / "logits.npy")
    return {"compressed_tensors": golden}


def main() -> int:
    parser = Parser(description=__doc__, example="python tools/goldens/formats.py llmcompressor --python llmc/bin/python")
    makers = {each.__name__: each for each in (msmodelslim, llmcompressor, compressed_tensors)}
    parser.add_argument("which", choices=makers)
    parser.add_argument("--python", required=True, help="interpreter that has the package")
    arguments = parser.parse_args()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, golden in makers[arguments.which](arguments.python, Path(scratch)).items():
            np.savez_compressed(GOLDEN / f"{name}.npz", **golden)
            print(f"{name}: {(GOLDEN / f'{name}.npz').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
