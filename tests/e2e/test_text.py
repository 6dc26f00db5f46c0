"""A plain model with a tokenizer.json: chats in, text out, through every command that reads text."""

from __future__ import annotations

import json

import pytest

import ms_pangu_quant as pq
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.cli import main
from tests.unit.test_tokenizer_json import FAST, byte_level, directory
from tools.dev.make_checkpoint import make_config, write_checkpoint

CHAT = [{"role": "user", "content": "Say 量化 🙂."}, {"role": "assistant", "content": "量化 🙂"}]


@pytest.fixture
def plain(tmp_path):
    config = make_config("tiny", vocab_size=512, max_position_embeddings=1024)
    write_checkpoint(tmp_path / "plain", config, seed=0, dtype="float32")
    return directory(tmp_path / "plain", byte_level(), FAST, config=config, generation_config={"eos_token_id": [2, 1]})


@pytest.mark.parametrize("stored_as", ["mindformers", "compressed-tensors"])
def test_a_checkpoint_with_a_tokenizer_json_goes_from_text_to_text(plain, tmp_path, capsys, stored_as):
    chats, texts, output = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl", tmp_path / "quantized"
    chats.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(4)))
    texts.write_text(json.dumps({"text": "Some text, 有字 🙂."}) + "\n")
    pq.quantize(plain, "w8a8", output, calibration=chats, stored_as=stored_as)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (plain / name).read_bytes()
    assert Tokenizer(output).encode_chat(CHAT) == Tokenizer(plain).encode_chat(CHAT)
    assert pq.compare(plain, output, texts).kl_mean > 0
    capsys.readouterr()
    assert main(["generate", str(output), "--prompt", CHAT[0]["content"], "--max-new-tokens", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == len(Tokenizer(plain).encode_chat(CHAT[:1]))
    assert answer["text"] == Tokenizer(plain).decode(answer["token_ids"])
    command = ["evaluate", str(output), "--tasks", "mini", "--limit", "2", "--max-new-tokens", "5", "--samples-only"]
    assert main([*command, "--output", str(tmp_path / "evaluation")]) == 0
    samples = [json.loads(line) for line in (tmp_path / "evaluation/samples.jsonl").read_text().splitlines()]
    assert [sample["mode"] for sample in samples] == ["no_think"] * 2
    assert main([*command, "--modes", "slow_think", "--output", str(tmp_path / "other")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "thinking mode 'slow_think': this model has no thinking tokens, wanted no_think" in said


def test_rows_that_pad_the_embedding_are_never_drawn_and_may_be_in_a_prompt(plain):
    tokens = Tokenizer(plain).vocab_size
    assert tokens < 511  # of the model's 512
    model = pq.load(plain)
    drawn = model.generate([[3, 511, 5]] * 8, 150, temperature=100.0, seed=1)
    assert sum(len(answer.token_ids) for answer in drawn) > 500  # uniformly, one in fifty would be of no token
    assert all(0 <= token_id < tokens for answer in drawn for token_id in answer.token_ids)
    model.close()
