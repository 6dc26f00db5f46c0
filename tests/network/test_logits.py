"""The network's float32 logits against Hugging Face transformers' Llama with biases (goldens: tools/goldens/network.py)."""

import hashlib

import numpy as np
import pytest

from ms_pangu_quant.inference.model import BLOCK_SIZE, load
from tests.conftest import MINI, ROOT, golden, golden_checkpoint

NAMES = sorted(path.stem for path in (ROOT / "tests" / "golden").glob("*.npz"))
TOLERANCE = 1e-4
PLAIN_BY_DEFAULT = ("mini", "pangu_head_dim")  # with kernels switched off, the others are slow tests


def sequences(values):
    return [values[f"ids_{index}"].tolist() for index in range(sum(key.startswith("ids_") for key in values))]


def tables(lengths):
    """Cache blocks of each sequence, interleaved so that no sequence's blocks are contiguous."""
    count = [-(-length // BLOCK_SIZE) for length in lengths]
    free = iter(range(sum(count)))
    out = [[] for _ in lengths]
    while any(len(table) < wanted for table, wanted in zip(out, count, strict=True)):
        for table, wanted in zip(out, count, strict=True):
            if len(table) < wanted:
                table.append(next(free))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_the_goldens_were_made_from_the_weights_the_tool_writes_today(name, tmp_path, write_checkpoint):
    path = golden_checkpoint(name, tmp_path, write_checkpoint)
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(golden(name)["weights_sha256"])


@pytest.mark.parametrize(
    ("name", "mode", "kernels"),
    [
        pytest.param(
            name, mode, kernels, marks=() if kernels == "auto" or name in PLAIN_BY_DEFAULT else (pytest.mark.slow,)
        )
        for name in NAMES
        for mode in ("graph", "pynative")
        for kernels in ("auto", "off")
    ],
)
def test_prefill_of_a_batch_and_decode_through_the_cache_equal_transformers(
    name, mode, kernels, tmp_path, write_checkpoint, monkeypatch
):
    monkeypatch.setenv("MS_PANGU_QUANT_KERNELS", kernels)
    values = golden(name)
    model = load(golden_checkpoint(name, tmp_path, write_checkpoint), mode=mode, kv_cache_tokens=2048)
    ids = sequences(values)
    blocks = tables([len(sequence) for sequence in ids])

    prompts = [max(1, len(sequence) - 3) for sequence in ids]
    together = model.forward(
        [sequence[:prompt] for sequence, prompt in zip(ids, prompts, strict=True)], [0] * len(ids), blocks, phase="logits"
    )
    wanted = {
        index: dict(
            zip(
                values.get(f"positions_{index}", range(len(sequence))).tolist()
                if f"positions_{index}" in values
                else range(len(sequence)),
                values[f"logits_{index}"],
                strict=True,
            )
        )
        for index, sequence in enumerate(ids)
    }
    start = 0
    for index, prompt in enumerate(prompts):
        for position in range(prompt):
            if position in wanted[index]:
                assert np.abs(together[start + position] - wanted[index][position]).max() < TOLERANCE
        start += prompt

    for step in range(3):
        live = [index for index, sequence in enumerate(ids) if prompts[index] + step < len(sequence)]
        if not live:
            break
        rows = model.forward(
            [[ids[index][prompts[index] + step]] for index in live],
            [prompts[index] + step for index in live],
            [blocks[index] for index in live],
            phase="decode",
        )
        for index, row in zip(live, rows, strict=True):
            position = prompts[index] + step
            if position in wanted[index]:
                assert np.abs(row - wanted[index][position]).max() < TOLERANCE


@pytest.fixture(scope="module")
def mini():
    return load(MINI, kv_cache_tokens=2048)


def test_logits_of_the_public_call_are_those_of_the_golden(mini):
    values = golden("mini")
    logits = mini.logits(values["ids_0"].tolist())
    assert logits.dtype == np.float32
    assert logits.shape == (len(values["ids_0"]), mini.config.vocab_size)
    assert np.abs(logits[values["positions_0"]] - values["logits_0"]).max() < TOLERANCE


def test_a_prompt_prefilled_in_pieces_gives_the_logits_of_one_piece(mini):
    ids = golden("mini")["ids_0"].tolist()
    whole = mini.logits(ids)
    table = [list(range(7, 7 + -(-len(ids) // BLOCK_SIZE)))]
    pieces = [mini.forward([ids[start : start + 50]], [start], table, phase="logits") for start in range(0, len(ids), 50)]
    assert np.abs(np.concatenate(pieces) - whole).max() < 1e-4


def test_one_graph_serves_every_prompt_length(mini):
    compiled = len(mini.network.compile_cache)
    for length in (1, 2, 17, 40):
        mini.logits(list(range(3, 3 + length)))
    assert len(mini.network.compile_cache) == max(compiled, 1)
