"""A process that loads and closes many models does not keep their weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tools.dev import make_checkpoint

LOADS = """
import ctypes, gc, os, sys
from pathlib import Path
from ms_pangu_quant.inference.model import load

for number in range(5):
    with load(sys.argv[1], kv_cache_tokens=64) as model:
        model.logits([1, 2, 3])
    del model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), flush=True)
"""


@pytest.mark.slow
def test_five_loads_leave_less_than_a_tenth_of_the_weights_of_four(tmp_path):
    """The first load warms up. What is left of each is its compiled graph, whatever the size of the weights."""
    config = make_checkpoint.make_config("tiny", layers=1, dtype="float32", vocab_size=400_000, tie_word_embeddings=False)
    make_checkpoint.write_checkpoint(tmp_path / "model", config, seed=0, dtype="float32", shard_bytes=10**9)
    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    command = [sys.executable, "-c", LOADS, str(tmp_path / "model")]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=1500, check=True)
    held = [int(line) for line in result.stdout.split()]
    assert len(held) == 5
    assert held[-1] - held[0] < 0.1 * 4 * weights, [round(each / 2**20) for each in held]


def test_a_closed_model_of_joined_blocks_points_at_no_weight(quantized):
    from ms_pangu_quant.errors import RequestError
    from ms_pangu_quant.inference.model import load
    from ms_pangu_quant.kernels.library import library

    with load(quantized("w8a8"), kv_cache_tokens=64) as model:
        runs = [run for run, _ in model.network.model.runs]
        assert bool(runs) == (library() is not None)
        assert all(run.kept and run.table.asnumpy().any() for run in runs)
    assert not any(run.kept or run.table.asnumpy().any() for run in runs)
    with pytest.raises(RequestError, match="was closed"):
        model.logits([1, 2, 3])
