"""Two ranks, started by msrun as on a cluster: what they compute together is what one computes alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.msrun import Job, run
from ms_pangu_quant.pipeline import quantize
from ms_pangu_quant.recipe import load_recipe
from tests.conftest import ROOT
from tests.e2e import msrun_job

SHAPE = {
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
MIXED = """
scheme: w4a8_g32
layers:
  model.layers.0.*: w8a8
  model.layers.1.*: w8a8_static
  model.layers.2.mlp.down_proj: float
transforms: [smooth]
rounding: gptq
"""


def two_ranks(folder, *arguments: str, job: Job | None = None) -> int:
    script = str(ROOT / "tests" / "e2e" / "msrun_job.py")
    return run(job or Job(workers=2, log_dir=str(folder / "logs")), "quantize", [script, str(folder), *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_checkpoint):
    """A float checkpoint, quantized by one rank and by two; answers of two ranks to the prompts of msrun_job."""
    folder = tmp_path_factory.mktemp("msrun")
    write_checkpoint(folder / "float", SHAPE, seed=3)
    (folder / "recipe.yaml").write_text(MIXED)
    data = msrun_job.random_data(SHAPE["vocab_size"])
    quantize(CheckpointReader(folder / "float"), load_recipe(folder / "recipe.yaml"), folder / "one", data=data)
    assert two_ranks(folder, "quantize", "one") == 0
    return folder


def test_x(folder):
    import json
    from ms_pangu_quant.formats.reader import open_checkpoint
    one, two = open_checkpoint(folder / "one"), open_checkpoint(folder / "two")
    for i in range(4):
        b1, l1 = one.block(i); b2, l2 = two.block(i)
        for s in l1:
            d = l1[s].weight.codes.astype(int) - l2[s].weight.codes
            ds = np.abs(l1[s].weight.scale / l2[s].weight.scale - 1).max()
            print(i, s, l1[s].kind, (d != 0).sum(), d.size, np.abs(d).max(), ds, l1[s].input_scale, l2[s].input_scale)
        for t in b1.tensors: 
            e=np.abs(b1[t]-b2[t]).max()
            if e: print(i,t,e)
    print(json.loads((folder/"one"/"quantization_report.json").read_text())["blocks"][1]["output_error"], json.loads((folder/"two"/"quantization_report.json").read_text())["blocks"][1]["output_error"])
    alone = msrun_job.answers(load(folder / "one", **msrun_job.TENSORS))
    for rank in range(2):
        with np.load(folder / f"one.rank{rank}.npz") as z:
            for k, v in alone.items():
                print(rank, k, np.abs(z[k] - v).max(), np.abs(v).max())
