"""A row of another tool from its files to its figures: what llm-compressor and msModelSlim wrote, as goldens hold it."""

import json

import numpy as np
import pytest

from ms_pangu_quant.inference.model import load
from tests.e2e.test_interop import GOLDEN, perplexity, unpacked
from tools.peers import measure


def programs(folder, golden, output):
    """A Python with both tools in it, each of which writes the golden's directory."""
    folder.mkdir()
    for name in ("python", "msmodelslim"):
        text = f'#!/bin/sh\ncase "$2" in *importlib.metadata*) echo 1.2.3; exit;; esac\ncp -r {golden} {output}\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return str(folder / "python")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llmcompressor_w8a8", "msmodelslim_w8a8", "msmodelslim_w4a8_dynamic"])
def test_a_peers_row_is_read_back_measured_as_served_and_measured_once(name, write_checkpoint, tmp_path):
    written, _ = unpacked(name, tmp_path / "golden")
    tool = measure.LLM_COMPRESSOR if name.startswith("llm") else measure.MSMODELSLIM
    with np.load(GOLDEN / f"{name}.npz") as archive:
        seed = int(archive["seed"])
    config = {key: value for key, value in json.loads((written / "config.json").read_text()).items() if key[0] != "_"}
    config.pop("quantization_config", None)
    write_checkpoint(tmp_path / "float", config, seed=seed, dtype="float32")
    rows = np.random.default_rng(0).integers(3, 96, (3, 24))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"token_ids": row.tolist()}) + "\n" for row in rows))
    work = tmp_path / "work"
    python = programs(tmp_path / "bin", written, work / "theirs/checkpoint")
    setting = measure.Setting(tmp_path / "float", texts, texts, work, limit=1, pythons={tool: python})
    row, steps = measure.Row("theirs", "W8A8", tool, "RTN", {"any": "settings"} if tool == "llm-compressor" else [{}]), []
    record = measure.measure(row, setting, steps.append)
    assert steps == ["quantize", "compare"]
    served = load(written, kv_cache_tokens=64).logits(rows[0, :-1].tolist())
    assert record["compare"]["ppl_quantized"] == pytest.approx(perplexity(served, rows[0]), rel=1e-4)
    assert 0 < record["compare"]["kl_mean"] < 1
    assert record["tool_version"] == "1.2.3"
    assert measure.measure(row, setting, steps.append) == record
    assert steps == ["quantize", "compare"]  # nothing was done twice
    other = measure.Row("theirs", "W8A8", tool, "RTN", {"other": "settings"} if tool == "llm-compressor" else [{}, {}])
    measure.measure(other, setting, steps.append)
    assert steps == ["quantize", "compare"] * 2  # other settings under the same name are another row
