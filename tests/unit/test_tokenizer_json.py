"""A tokenizer.json: ids, texts and prompts are those of transformers' AutoTokenizer, and files that are wrong are named."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ms_pangu_quant.checkpoint.tokenizer import Thought, Tokenizer, find_tokenizer
from ms_pangu_quant.errors import CheckpointError, RequestError

ASSETS = Path(__file__).parents[2] / "ms_pangu_quant/assets"
ROWS = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
TEXTS = [re.sub(r"\[unused\d+\]", "", json.loads(row)["text"]) for row in ROWS]
USER = {"role": "user", "content": "2+2 ?"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|start|>system\nYou are helpful<|end|>\n{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if tools is not none %}{{ tools }}{% endif %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>"]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}


def byte_level(*, prefix_space: bool = False) -> Backend:
    """As GPT-2, SmolLM2 and Llama 3 have it."""
    made = Backend(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS[:60], trainer)
    made.add_tokens([AddedToken("<word>", normalized=False), AddedToken("<left>", lstrip=True, normalized=False)])
    return made


def beginning(made: Backend, text: str) -> Backend:
    """With text in front of all, as Llama 3's file says."""
    made.post_processor = processors.TemplateProcessing(
        single=f"{text} $A", special_tokens=[(text, made.token_to_id(text))]
    )
    return made


def metaspace() -> Backend:
    """As Llama 2 has it: bytes of what is no piece, and U+2581 for spaces."""
    made = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(TEXTS[:60], trainers.BpeTrainer(vocab_size=600, special_tokens=words, show_progress=False))
    state = json.loads(made.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are pieces only
    return Backend.from_str(json.dumps(state))


def directory(path: Path, made: Backend, names: dict[str, Any], **files: Any) -> Path:
    """names  tokenizer_config.json.  files  others by name without the ending; config.json is a Llama's but for its."""
    made.save(str(path / "tokenizer.json"))
    model = {"model_type": "llama", "vocab_size": 1000, **files.pop("config", {})}
    for name, value in {"config": model, "tokenizer_config": names, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


CLEANED = {**FAST, "clean_up_tokenization_spaces": True}
LISTED = {
    "9": {"content": "<word>", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": False},
    "3": {"content": "<late>", "lstrip": False, "rstrip": False, "single_word": True, "normalized": True, "special": True},
}
KINDS: dict[str, Callable[[Path], Path]] = {
    "fast": lambda path: directory(path, byte_level(), FAST),
    "bos in the file": lambda path: directory(
        path, beginning(byte_level(), "<|start|>"), {**FAST, "bos_token": "<|start|>"}
    ),
    "cleaned": lambda path: directory(path, byte_level(), CLEANED),
    "space in front": lambda path: directory(path, byte_level(prefix_space=True), FAST),
    "space wanted": lambda path: directory(path, byte_level(), {**FAST, "add_prefix_space": True}),
    "named tokens that are no pieces": lambda path: directory(
        path, byte_level(), {**FAST, "pad_token": "<pad>", "bos_token": "<s>", "additional_special_tokens": ["<|x|>"]}
    ),
    "listed with other flags": lambda path: directory(path, byte_level(), {**FAST, "added_tokens_decoder": LISTED}),
    "older files": lambda path: directory(
        path,
        byte_level(),
        FAST,
        special_tokens_map={"pad_token": "<pad>", "eos_token": "<|end|>"},
        added_tokens={"<l>": 502},
    ),
    "gpt2": lambda path: directory(path, byte_level(), {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE}),
    "llama": lambda path: directory(path, metaspace(), {**LLAMA, "chat_template": TEMPLATE}),
    "llama without bos": lambda path: directory(path, metaspace(), {**LLAMA, "add_bos_token": False}),
    "llama with eos": lambda path: directory(path, metaspace(), {**LLAMA, "add_eos_token": True, "unk_token": None}),
    "nothing named": lambda path: directory(path, metaspace(), {}),
    "truncating": lambda path: directory(path, truncating(), FAST),
}


def truncating() -> Backend:
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=9)
    return made


def texts(count: int) -> list[str]:
    """Pieces of text and of what is awkward; the empty one too."""
    rng = random.Random(0)
    awkward = [
        *"你好量化。🙂é\u0301\u200b\x00▁'",
        "  ",
        "\n",
        "\t",
        " !",
        " n't",
        "<|end|>",
        "<|sta",
        "<word>",
        " <left>",
        "<late>",
    ]
    awkward += ["</s>", "<unk>", "<0x41>", "<pad>", "<|x|>", "<l>", "late<late>", "x = [1, 2 , 3]"]
    found = [""]
    while len(found) < count:
        text = rng.choice(TEXTS)
        start = rng.randrange(len(text))
        found.append(text[start : start + rng.randrange(40)] + "".join(rng.choices(awkward, k=rng.randrange(6))))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(KINDS[kind](tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for text in texts(300):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        for some in (ids, rng.choices(range(ours.vocab_size), k=9)):
            for skip in (False, True):
                assert ours.decode(some, skip_special_tokens=skip) == theirs.decode(some, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in (ours.eos_id, None)
    assert ours.modes == ("no_think",)
    if theirs.chat_template:
        for chat in ([USER], [{"role": "system", "content": "短"}, USER, {"role": "assistant", "content": "<|end|>"}]):
            for asked in (True, False):
                prompt = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=asked)
                assert ours.render_chat(chat, add_generation_prompt=asked) == prompt
                ids = theirs.apply_chat_template(chat, add_generation_prompt=asked)
                assert ours.encode_chat(chat, add_generation_prompt=asked) == ids


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    return KINDS["fast"](tmp_path)


def change(path: Path, name: str = "tokenizer_config.json", **changes: Any) -> Tokenizer:
    value = json.loads((path / name).read_text(encoding="utf-8")) | changes
    (path / name).write_text(json.dumps({key: item for key, item in value.items() if item is not ...}), encoding="utf-8")
    return Tokenizer(path)


def test_tokenizer_json_alone_will_do_where_config_json_names_eos(fast: Path) -> None:
    (fast / "tokenizer_config.json").unlink()
    tokenizer = change(fast, "config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token_id=[2, 1])
    assert tokenizer.eos_id == 1
    assert tokenizer.end_ids == {1, 2}
    assert find_tokenizer(fast) is not None


def test_a_tokenizer_json_with_openpangus_tokens_has_its_chats_and_modes(fast: Path) -> None:
    made = byte_level()
    made.add_special_tokens(["[unused9]", "[unused10]", "[unused16]", "[unused17]"])
    tokenizer = Tokenizer(directory(fast, made, {"eos_token": "[unused10]", "tokenizer_class": "PanguTokenizer"}))
    assert tokenizer.render_chat([USER], mode="no_think").endswith("用户：2+2 ? /no_think[unused10][unused9]助手：")
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    assert tokenizer.split_thought([start, 40, end, 41, tokenizer.eos_id, 42]) == Thought((40,), (41,), True)


def test_with_both_files_the_json_is_read_but_for_openpangus_own_class(fast: Path) -> None:
    prefix = fast / "tokenizer"
    SentencePieceTrainer.train(sentence_iterator=iter(["a b c"]), model_prefix=str(prefix), vocab_size=7, minloglevel=2)
    assert Tokenizer(fast).vocab_size > 400
    slow = change(fast, tokenizer_class="PanguTokenizer", eos_token="</s>", chat_template=...)
    assert slow.vocab_size == 7


def test_a_named_token_beyond_the_model_is_refused_only_where_a_text_has_it(fast: Path) -> None:
    tokenizer = change(fast, "config.json", vocab_size=500, eos_token_id=2)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(RequestError, match=r"'<word>' of the text has id 500, .* vocab_size is 500; leave the token out"):
        tokenizer.encode("a<word>b")


def test_rows_of_the_model_that_are_no_token_are_no_text(fast: Path) -> None:
    tokenizer = Tokenizer(fast)
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([*ids, 999]) == "a b"
    barred = tokenizer.without_token(1000)
    assert barred is not None
    assert barred.tolist() == [token_id >= tokenizer.vocab_size for token_id in range(1000)]
    assert tokenizer.without_token(tokenizer.vocab_size) is None
    for bad in (1000, -1, 10**12):
        with pytest.raises(RequestError, match=rf"has the id {bad}; wanted 0 to 999"):
            tokenizer.decode([*ids, bad])


@pytest.mark.parametrize("token_id", [500, 700])
def test_an_added_token_of_tokenizer_json_beyond_the_model_is_refused_only_where_a_text_has_it(
    fast: Path, token_id: int
) -> None:
    stored = json.loads((fast / "tokenizer.json").read_text(encoding="utf-8"))
    stored["added_tokens"] = [{**token, "id": token_id} if token["content"] == "<word>" else token
                              for token in stored["added_tokens"] if token["content"] != "<left>"]  # fmt: skip
    (fast / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    tokenizer = change(fast, "config.json", vocab_size=500)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(RequestError, match=r"'<word>' of the text has id \d+, .* vocab_size is 500"):
        tokenizer.encode("a<word>b")


def test_a_byte_order_mark_is_no_part_of_tokenizer_json(fast: Path) -> None:
    ids = Tokenizer(fast).encode_chat([USER])
    for path in fast.glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert Tokenizer(fast).encode_chat([USER]) == ids


def test_a_lone_surrogate_is_refused(fast: Path) -> None:
    with pytest.raises(RequestError, match=r"not valid Unicode .*surrogates not allowed"):
        Tokenizer(fast).encode("a\ud800")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"tokenizer\.json: not a tokenizer of the tokenizers library \(.*\); download it again"),
        (b"\xff{", "not a tokenizer of the tokenizers library"),
        (b"[]", "not a tokenizer of the tokenizers library"),
        (b'{"version": "1.0"}', r"tokenizer\.json: not a tokenizer of the tokenizers library \(.*Model missing"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "not a tokenizer of the tokenizers library"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer\.json: .*; run git lfs pull"),
    ],
)
def test_a_broken_tokenizer_json_is_refused(fast: Path, content: bytes, message: str) -> None:
    (fast / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(fast)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config.json",
            {"vocab_size": 499},
            r"tokenizer\.json: got ids up to 499, config\.json's vocab_size is 499; is the",
        ),
        ("tokenizer_config.json", {"eos_token": ...}, "names no eos_token, and config.json no eos_token_id"),
        ("tokenizer_config.json", {"eos_token": 7}, r"tokenizer_config\.json: 7 is not a token, wanted a string"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": ["x"]},
            "added_tokens_decoder is a list, wanted an object of ids",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            r"_config\.json: does not fit tokenizer\.json \(.*'x'",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": 7}}, "7 is not a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<z>"}}, None),
        ("tokenizer_config.json", {"pad_token": None, "model_max_length": 10**30, "auto_map": {"AutoTokenizer": []}}, None),
    ],
)
def test_files_that_do_not_fit_are_named(fast: Path, name: str, changes: dict[str, Any], message: str | None) -> None:
    """None: what transformers does not mind, or has no use for, is not minded here."""
    if message is None:
        change(fast, name, **changes)
        return
    with pytest.raises(CheckpointError, match=message):
        change(fast, name, **changes)
