"""What servers read in the place of openPangu's own tokenizer class: the same ids, and nothing of the checkpoint is run."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Backend

from ms_pangu_quant.checkpoint.fast_tokenizer import served_files, unserved
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, Tokenizer
from ms_pangu_quant.checkpoint.writer import carry_over

ASSETS = Path(__file__).parents[2] / "ms_pangu_quant/assets"
MINI = ASSETS / "openpangu-mini"
ROWS = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
TEXTS = [json.loads(row)["text"] for row in ROWS]
STRINGS = 2000  # for each of the models below
IDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|User|>:": 1500, "[unused9]": 1501, "[unused10]": 1502, "[unused16]": 1503}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a space in front": {"add_dummy_prefix": True},
    "spaces made one": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "symbols that are not listed": {"add_dummy_prefix": True, "user_defined_symbols": ["[unused77]", "aa", "<|x|>"]},
    "no bytes": {"add_dummy_prefix": True, "byte_fallback": False, "vocab_size": 1200},
    "pieces across words": {"split_by_whitespace": False, "vocab_size": 900},
}
CHAT = [{"role": "system", "content": "你好"}, {"role": "user", "content": "写一个函数 f(x) 😀"}]


@cache
def trained(name: str) -> bytes:
    settings = {
        "model_type": "bpe",
        "vocab_size": 450,
        "byte_fallback": True,
        "character_coverage": 0.999,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["[unused9]"],
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "minloglevel": 2,
    }
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:100]), model_writer=out, **{**settings, **MODELS.get(name, {}), **OTHER.get(name, {})}
    )
    return out.getvalue()


OTHER: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
}


def directory(folder: Path, name: str, **config: Any) -> Path:
    """Shaped like openPangu-Embedded-7B's: its own class, and the tokens in added_tokens_decoder."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    listed = {str(token_id): {"content": text, **flags} for text, token_id in IDS.items()}
    tokens = {"bos_token": "<s>", "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>"}
    value = {"tokenizer_class": "PanguTokenizer", "add_bos_token": True, **tokens, "added_tokens_decoder": listed, **config}
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(trained(name))
    (folder / "tokenizer_config.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def strings(seed: int) -> Iterator[str]:
    """Pieces of code and Chinese text, runs of one character, scripts, emoji, rare characters and every kind of token."""
    draw = random.Random(seed)
    tokens = [*IDS, "[unused17]", "[unused77]", "aa", "<0x0A>", "\u2581"]
    alphabets = [
        "abcdef xyz",
        "  \t\n",
        "=-#*",
        "的一是在不了有和人这",
        "日本語テスト",
        "😀👩‍👩‍👧🇨🇳❤️",
        "éüñß",
        "\u0300\u200d\ufeff\x00\x7f",
    ]
    for _ in range(STRINGS):
        parts = []
        for _ in range(draw.randint(1, 6)):
            kind, text, alphabet = draw.random(), draw.choice(TEXTS), draw.choice(alphabets)
            if kind < 0.2:
                parts.append(draw.choice(tokens))
            elif kind < 0.5:
                start = draw.randrange(len(text))
                parts.append(text[start : start + draw.randint(1, 90)])
            elif kind < 0.6:
                parts.append(draw.choice(alphabet) * draw.randint(1, 40))
            elif kind < 0.9:
                parts.append("".join(draw.choices(alphabet, k=draw.randint(1, 12))))
            else:
                parts.append(chr(draw.choice([draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x110000)])))
        yield "".join(parts)


@pytest.mark.parametrize("name", ["the embedded checkpoint's", *MODELS])
def test_the_ids_are_those_of_the_sentencepiece_model(tmp_path: Path, name: str) -> None:
    """14,000 strings in all, by the library and by this package, which prefers tokenizer.json as transformers does."""
    source = MINI if name not in MODELS else directory(tmp_path / "source", name)
    (tmp_path / "out").mkdir()
    carry_over(source, tmp_path / "out")
    before, after = Tokenizer(source), Tokenizer(tmp_path / "out")
    written = Backend.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in strings(len(name)):
        ids = before.encode(text)
        assert written.encode(text).ids == ids, text
        assert after.encode(text) == ids, text
        if name in ("the embedded checkpoint's", "plain", "pieces across words"):
            assert after.decode(ids) == before.decode(ids)
    assert after.end_ids == before.end_ids
    assert (after.think_start_id, after.think_end_id, after.bos_id) == (
        before.think_start_id,
        before.think_end_id,
        before.bos_id,
    )


@pytest.mark.parametrize("source", ["openpangu-mini", "openpangu-mini-tied"])
def test_transformers_reads_it_without_remote_code_and_renders_chats_with_bos(tmp_path: Path, source: str) -> None:
    from transformers import AutoTokenizer

    carry_over(ASSETS / source, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(ASSETS / source)
    for text in [*TEXTS[:50], "a </s><s> [unused9]b", ""]:
        assert theirs(text).input_ids == ours.encode(text)
    for mode, suffix in zip(THINKING_MODES, ("", " /auto_think", " /no_think"), strict=True):
        chat = [CHAT[0], {**CHAT[1], "content": CHAT[1]["content"] + suffix}]
        wanted = ours.encode_chat(CHAT, mode=mode)
        assert theirs.apply_chat_template(chat, add_generation_prompt=True) == wanted
        assert Tokenizer(tmp_path).encode_chat(CHAT, mode=mode) == wanted
    thought = [5, *ours.encode("x")[1:], 6, 4]
    assert (
        theirs.decode(thought, skip_special_tokens=True) == "[unused16]x[unused17]"
    )  # a thought can be told from an answer


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("config", "file", "written"),
    [
        ({"chat_template": TEMPLATE}, None, "tokenizer_config.json"),
        ({"chat_template": "{{ bos_token }}" + TEMPLATE}, None, None),
        ({"chat_template": TEMPLATE, "add_bos_token": False}, None, None),
        ({"chat_template": [{"name": "default", "template": TEMPLATE}]}, None, "chat_template.jinja"),
        ({"chat_template": "never"}, "chat_template.jinja", "chat_template.jinja"),
        ({}, "additional_chat_templates/default.jinja", "additional_chat_templates/default.jinja"),
        ({}, "chat_template.json", "chat_template.jinja"),
        ({}, None, "tokenizer_config.json"),  # openPangu's, for it has its tokens
    ],
)
def test_the_template_that_counts_writes_the_bos_once(
    tmp_path: Path, config: dict[str, Any], file: str | None, written: str | None
) -> None:
    source = directory(tmp_path / "source", "plain", **config)
    if file is not None:
        (source / file).parent.mkdir(exist_ok=True)
        said = TEMPLATE if file.endswith(".jinja") else json.dumps({"chat_template": TEMPLATE})
        (source / file).write_text(said, encoding="utf-8")
    (tmp_path / "out").mkdir()
    carry_over(source, tmp_path / "out")
    before, after = Tokenizer(source), Tokenizer(tmp_path / "out")
    assert after.encode_chat(CHAT) == before.encode_chat(CHAT)
    assert after.encode_chat(CHAT).count(1) == (config.get("add_bos_token") is not False)
    changed = [
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and "a server that renders" in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert changed == ([] if written is None else [written])


def test_a_directory_that_was_completed_is_completed_to_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    carry_over(MINI, tmp_path / "first")
    assert served_files(tmp_path / "first") == {}
    carry_over(tmp_path / "first", tmp_path / "second")
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("name", OTHER)
def test_where_no_equal_one_can_be_made_the_original_stays_and_it_is_told(tmp_path: Path, name: str) -> None:
    source = directory(tmp_path / "source", name)
    (tmp_path / "out").mkdir()
    carry_over(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in source.iterdir()} | {
        "generation_config.json"
    }
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert re.search(r"tokenizer\.model: no tokenizer\.json of the same ids", str(unserved(tmp_path / "out")))


def test_a_piece_whose_id_another_token_takes_is_named(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", "plain")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["300"] = {**config["added_tokens_decoder"]["0"], "content": "<taken>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert "has the id of an added token" in str(unserved(source))


def test_other_tokenizers_are_left_as_they_are(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", "plain", tokenizer_class="LlamaTokenizer")
    assert served_files(source) == {}
    shutil.copy(MINI / "tokenizer_config.json", tmp_path)
    assert served_files(tmp_path) == {}
