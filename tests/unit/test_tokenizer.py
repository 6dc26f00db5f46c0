"""checkpoint/tokenizer.py: exact round trips, the chat format, thoughts split by id, and files that are wrong."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from ms_pangu_quant.checkpoint.files import CheckpointNote
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, Thought, Tokenizer, end_ids, find_tokenizer
from ms_pangu_quant.errors import CheckpointError, RequestError

ASSETS = Path(__file__).parents[2] / "ms_pangu_quant/assets"
MINI = ASSETS / "openpangu-mini"
AWKWARD = [
    "",
    " ",
    "    ",
    "a  b   c",
    "  leading",
    "trailing  ",
    "\t\tx = 1\n\n\n",
    "\r\n",
    "a\x00b\x7f",
    "naïve café",
    "e\u0301",
    "你好，世界：",
    "🙂👩‍👩‍👧",
    "\u200b\ufeff\u00a0",
    "ﬁ ①",
    "\U0010ffff",
    "<s>",
    "</s>",
    "x<unk>y",
    "[unused10]",
    "[unused",
    "[unused9]]",
    "[unused16][unused17]  [unused10]\n",
    "<s" * 50,
    "<0x41>",
    "a" * 5000,
]
USER = {"role": "user", "content": "2+2?"}
# openPangu-Embedded-7B's own ids for these tokens: not contiguous, far above the pieces of the model trained below
OPENPANGU_IDS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "[unused1]": 45840,
    "[unused9]": 45887,
    "[unused10]": 45892,
    "[unused16]": 45974,
    "[unused17]": 45982,
    "[unused33]": 144209,
}


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return Tokenizer(MINI)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy_prefix"])
def trained(request: pytest.FixtureRequest) -> bytes:
    """A tiny sentencepiece model; of openPangu's tokens it has only [unused9], under an id of its own."""
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([record["text"] for record in records("calibration.jsonl")[:60]]),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=request.param,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["[unused9]"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture
def pangu(tmp_path: Path, trained: bytes) -> Path:
    """Shaped like openPangu-Embedded-7B's directory: the tokens are in added_tokens_decoder. No chat_template."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    (tmp_path / "tokenizer.model").write_bytes(trained)
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "add_bos_token": True,
            "bos_token": "<s>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
            "eos_token": {"content": "[unused10]", **flags},
            "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in OPENPANGU_IDS.items()},
        },
    )
    return tmp_path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded checkpoint's tokenizer files and configs, to be spoilt."""
    for file in [MINI / "tokenizer.model", *MINI.glob("*.json")]:
        shutil.copy(file, tmp_path)
    return tmp_path


def write(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def change(directory: Path, name: str = "tokenizer_config.json", **changes: Any) -> Tokenizer:
    """Load the directory with some keys of one JSON file set, or removed where the value is ...."""
    value = json.loads((directory / name).read_text(encoding="utf-8")) | changes
    write(directory, name, {key: item for key, item in value.items() if item is not ...})
    return Tokenizer(directory)


# ---- text


def test_decode_inverts_encode_on_every_embedded_text(mini: Tokenizer) -> None:
    texts = [record["text"] for name in ("calibration.jsonl", "validation.jsonl") for record in records(name)]
    assert len(texts) == 856
    assert [mini.decode(mini.encode(text)[1:]) for text in texts] == texts
    assert all(mini.decode(mini.encode(text)) == "<s>" + text for text in texts[:50])


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_decode_inverts_encode_on_awkward_text(mini: Tokenizer, text: str) -> None:
    assert mini.decode(mini.encode(text)[1:]) == text


def test_only_the_sentencepiece_space_symbol_comes_back_as_a_space(mini: Tokenizer) -> None:
    assert mini.decode(mini.encode("a\u2581b")[1:]) == "a b"


def test_chat_text_has_the_plain_sentencepiece_ids_after_bos(mini: Tokenizer) -> None:
    plain = SentencePieceProcessor(model_file=str(MINI / "tokenizer.model"))
    for record in records("calibration.jsonl"):
        expected = [1, *plain.encode(record["text"])]
        assert mini.encode(record["text"]) == expected
        assert mini.encode_chat(record["messages"], add_generation_prompt=False) == expected


def test_the_embedded_tokenizer_has_the_ids_of_its_config(mini: Tokenizer) -> None:
    assert (mini.vocab_size, mini.bos_id, mini.eos_id) == (1024, 1, 4)
    assert (mini.think_start_id, mini.think_end_id) == (5, 6)


def test_bos_is_added_as_the_config_says(copy: Path) -> None:
    for written, added in ((True, 1), (False, 0), ("true", 1), ("False", 0), (..., 1)):
        tokenizer = change(copy, add_bos_token=written)
        assert tokenizer.encode("x").count(1) == tokenizer.encode_chat([USER]).count(1) == added


def test_named_special_tokens_become_their_ids_wherever_they_stand(mini: Tokenizer) -> None:
    a = mini.encode("a")[1:]
    assert mini.encode("a<s>a[unused10]<unk>a")[1:] == [*a, 1, *a, 4, 0, *a]


def test_skipping_special_tokens_leaves_the_thinking_markers(mini: Tokenizer) -> None:
    ids = mini.encode("[unused16]a[unused17]b[unused10]<unk>")
    assert mini.decode(ids, skip_special_tokens=True) == "[unused16]a[unused17]b"
    assert mini.decode(ids) == "<s>[unused16]a[unused17]b[unused10]<unk>"


def test_a_control_piece_that_no_text_makes_is_still_shown(mini: Tokenizer) -> None:
    assert mini.decode([1, 2]) == "<s></s>"


def test_byte_pieces_join_into_characters_and_stray_bytes_into_replacement_characters(mini: Tokenizer) -> None:
    ids = mini.encode("🙂")[1:]
    assert len(ids) == 4
    assert mini.decode(np.array(ids)) == "🙂"
    assert mini.decode(ids[:3]) == "\ufffd" * 3


@pytest.mark.parametrize("bad", [1024, -1, 10**12])
def test_an_id_out_of_range_is_refused(mini: Tokenizer, bad: int) -> None:
    with pytest.raises(RequestError, match=rf"openpangu-mini has the id {bad}; wanted 0 to 1023"):
        mini.decode([300, bad])


def test_a_lone_surrogate_is_refused(mini: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"not valid Unicode .*surrogates not allowed"):
        mini.encode("a\ud800")


# ---- added tokens with ids of their own


def test_added_tokens_keep_their_scattered_ids(pangu: Path) -> None:
    tokenizer = Tokenizer(pangu)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 45892, 144210)
    assert (tokenizer.think_start_id, tokenizer.think_end_id) == (45974, 45982)
    assert tokenizer.encode("".join(OPENPANGU_IDS))[1:] == list(OPENPANGU_IDS.values())
    assert tokenizer.decode(list(OPENPANGU_IDS.values())) == "".join(OPENPANGU_IDS)


def test_an_added_token_wins_over_the_sentencepiece_piece_of_the_same_text(pangu: Path) -> None:
    inside = SentencePieceProcessor(model_file=str(pangu / "tokenizer.model")).piece_to_id("[unused9]")
    assert 0 < inside < 400
    assert inside not in Tokenizer(pangu).encode("a[unused9]b")


def test_segments_between_added_tokens_are_encoded_one_by_one(pangu: Path) -> None:
    tokenizer = Tokenizer(pangu)
    plain = SentencePieceProcessor(model_file=str(pangu / "tokenizer.model"))
    expected = [1, *plain.encode(" x"), 45840, *plain.encode(" def "), 45892]
    assert tokenizer.encode(" x[unused1] def [unused10]") == expected


@pytest.mark.parametrize("text", [*AWKWARD, "a[unused1] b [unused16]  c", "[unused1]" * 3], ids=ascii)
def test_decode_inverts_encode_with_added_tokens_too(pangu: Path, text: str) -> None:
    tokenizer = Tokenizer(pangu)
    assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_the_longest_added_token_is_matched(pangu: Path) -> None:
    write(pangu, "added_tokens.json", {"[unused1]0": 500, "[unused": 501})
    tokenizer = Tokenizer(pangu)
    assert tokenizer.encode("[unused1]0[unused1][unused10][unused")[1:] == [500, 45840, 45892, 501]


def test_an_id_of_the_model_that_no_token_has_is_no_text(pangu: Path) -> None:
    """In the gap between pieces and added tokens, and behind them all."""
    write(pangu, "config.json", {"vocab_size": 150_000})
    tokenizer = Tokenizer(pangu)
    ids = tokenizer.encode(" a b")[1:]
    for stray in (45893, 399 + 1, 149_999):
        assert tokenizer.decode([ids[0], stray, *ids[1:], 45892, stray]) == tokenizer.decode(ids) + "[unused10]"
        assert tokenizer.decode([stray], skip_special_tokens=True) == ""
        assert tokenizer.split_thought([stray, 45892]) == Thought(None, (stray,), True)
    for bad in (150_000, -1):
        with pytest.raises(RequestError, match=rf"has the id {bad}; wanted 0 to 149999"):
            tokenizer.decode([bad])


def test_the_ids_without_a_token_are_told_but_for_such_as_end_an_answer(pangu: Path) -> None:
    write(pangu, "config.json", {"vocab_size": 150_000, "eos_token_id": [45892, 149_000]})
    tokenizer = Tokenizer(pangu)
    barred = tokenizer.without_token(150_000)
    assert barred is not None
    assert set(np.flatnonzero(~barred)) == {*range(400), *OPENPANGU_IDS.values(), 149_000}
    assert Tokenizer(MINI).without_token(1024) is None
    padded = Tokenizer(MINI).without_token(1088)
    assert padded is not None
    assert padded.tolist() == [False] * 1024 + [True] * 64


def test_eos_falls_back_from_the_tokenizer_files_to_the_model_files(copy: Path) -> None:
    change(copy, eos_token=...)
    assert change(copy, "special_tokens_map.json", eos_token="[unused17]").eos_id == 6
    (copy / "special_tokens_map.json").unlink()
    assert change(copy, "generation_config.json", eos_token_id=[5, 4]).eos_id == 5
    (copy / "generation_config.json").unlink()
    tokenizer = change(copy, "config.json", eos_token_id=6)
    assert tokenizer.eos_id == 6
    assert tokenizer.decode([6], skip_special_tokens=True) == ""


def test_every_eos_that_a_file_names_ends_an_answer(copy: Path) -> None:
    change(copy, "generation_config.json", eos_token_id=[9, 8, -1, 99999, None])
    tokenizer = change(copy, "config.json", eos_token_id=7)
    assert tokenizer.eos_id == 4
    assert tokenizer.end_ids == {4, 7, 8, 9}
    assert tokenizer.split_thought([11, 7, 12, 4]).answer == (11,)
    (copy / "tokenizer.model").unlink()
    assert find_tokenizer(copy) is None
    assert end_ids(copy) == {7, 8, 9}


def test_a_pad_id_of_minus_one_means_none(copy: Path) -> None:
    (copy / "special_tokens_map.json").unlink()
    (copy / "generation_config.json").unlink()
    change(copy, "config.json", pad_token_id=-1)
    tokenizer = change(copy, pad_token=...)
    assert tokenizer.decode([0], skip_special_tokens=True) == ""  # unk, which has pad's id here


def test_a_tokenizer_without_bos_and_thinking_tokens_says_so(pangu: Path) -> None:
    decoder = {"450": {"content": "[unused10]"}}
    tokenizer = change(pangu, bos_token=..., added_tokens_decoder=decoder)
    assert (tokenizer.bos_id, tokenizer.think_start_id, tokenizer.think_end_id) == (None, None, None)
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert tokenizer.split_thought([450, 3]) == Thought(None, (), True)


# ---- chats


def test_the_embedded_template_renders_the_calibration_chats(mini: Tokenizer) -> None:
    chats = records("calibration.jsonl")
    assert len(chats) == 256
    for record in chats:
        assert mini.render_chat(record["messages"], add_generation_prompt=False) == record["text"]


def test_the_default_template_renders_the_calibration_chats_too(copy: Path) -> None:
    tokenizer = change(copy, chat_template=...)
    for record in records("calibration.jsonl"):
        assert tokenizer.render_chat(record["messages"], add_generation_prompt=False) == record["text"]


def test_the_default_template_is_openpangus_for_every_role(pangu: Path) -> None:
    roles = ("user", "assistant", "function", "tool", "system")
    messages = [{"role": role, "content": f"{role} <&>\n"} for role in roles]
    assert Tokenizer(pangu).render_chat(messages) == (
        "[unused9]系统：[unused10][unused9]用户：user <&>\n[unused10][unused9]助手：assistant <&>\n[unused10]"
        "[unused9]方法：function <&>\n[unused10][unused9]工具：tool <&>\n[unused10]"
        "[unused9]系统：system <&>\n[unused10][unused9]助手："
    )


@pytest.mark.parametrize(("mode", "suffix"), zip(THINKING_MODES, ["", " /auto_think", " /no_think"], strict=True))
def test_a_mode_is_a_suffix_of_the_last_user_message_and_only_once(mini: Tokenizer, mode: str, suffix: str) -> None:
    messages = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}]
    expected = (
        "[unused9]系统：[unused10][unused9]用户：2+2?[unused10][unused9]助手：4[unused10]"
        f"[unused9]用户：3+3?{suffix}[unused10][unused9]助手："
    )
    assert mini.render_chat(messages, mode=mode) == expected
    assert mini.encode_chat(messages, mode=mode) == mini.encode(expected)
    assert mini.render_chat([*messages[:2], {"role": "user", "content": "3+3?" + suffix}], mode=mode) == expected
    assert messages[2] == {"role": "user", "content": "3+3?"}


def test_a_model_without_thinking_tokens_has_one_mode_and_it_adds_nothing(pangu: Path) -> None:
    tokenizer = change(pangu, added_tokens_decoder={"450": {"content": "[unused10]"}})
    assert tokenizer.modes == ("no_think",)
    assert tokenizer.render_chat([USER], mode="no_think") == tokenizer.render_chat([USER])
    with pytest.raises(RequestError, match="mode 'auto_think': this model has no thinking tokens, wanted no_think"):
        tokenizer.render_chat([USER], mode="auto_think")


def test_the_1b_has_one_mode_to_which_no_word_is_said_and_that_is_told(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    shape = {"hidden_size": 1536, "num_hidden_layers": 26, "num_attention_heads": 12, "vocab_size": 153376}
    write(copy, "config.json", {**config, **shape})
    tokenizer = Tokenizer(copy)
    assert tokenizer.modes == ("no_think",)
    assert tokenizer.render_chat([USER], mode="no_think") == tokenizer.render_chat([USER])
    with pytest.raises(RequestError, match="mode 'slow_think': this model thinks in no mode but no_think, wanted no_think"):
        tokenizer.render_chat([USER], mode="slow_think")
    with pytest.warns(CheckpointNote, match="1B thinks in no mode but no_think, which is taken"):
        tokenizer.tell_only_mode()
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}  # a chat that another model wrote
    assert "[unused16]2 and 2[unused17]4" in tokenizer.render_chat([USER, thought, USER])


def test_bos_is_not_doubled_when_the_template_writes_it(copy: Path) -> None:
    assert change(copy, chat_template="{{ bos_token }}{{ messages[0]['content'] }}").encode_chat([USER]).count(1) == 1


def test_chat_template_jinja_is_preferred_and_blocks_are_trimmed_as_in_transformers(copy: Path) -> None:
    template = "{% for m in messages %}\n  {% if m %}\n{{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n"
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert Tokenizer(copy).render_chat([USER]) == "2+2?[unused10]\n"


def test_of_several_templates_the_default_one_is_taken(copy: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "{{ tools }}"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    assert change(copy, chat_template=templates).render_chat([USER]) == "2+2?"


@pytest.mark.parametrize(
    ("files", "rendered"),
    [
        ({"tokenizer_config.json": {"tool_use": "-", "default": "object"}}, "object"),
        ({"tokenizer_config.json": [{"name": "default", "template": "list"}]}, "list"),
        ({"tokenizer_config.json": "config", "chat_template.json": "older"}, "config"),
        ({"tokenizer_config.json": None, "chat_template.json": "older"}, "older"),
        ({"tokenizer_config.json": {"rag": "-"}, "chat_template.json": "older"}, "older"),
        ({"tokenizer_config.json": "config", "chat_template.jinja": "file", "chat_template.json": "older"}, "file"),
        ({"tokenizer_config.json": "config", "additional_chat_templates/tool_use.jinja": "-"}, "config"),
        ({"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "-"}, "file"),
        ({"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "folder"}, "folder"),
        ({"tokenizer_config.json": None, "additional_chat_templates/default.jinja": "folder"}, "folder"),
    ],
)
def test_the_template_is_the_default_one_wherever_it_is(copy: Path, files: dict[str, Any], rendered: str) -> None:
    add_templates(copy, files)
    assert Tokenizer(copy).render_chat([USER]) == f"{rendered}2+2?"


def add_templates(directory: Path, files: dict[str, Any]) -> None:
    """Each shows its name in front of the messages."""
    shown = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def template(value: Any) -> Any:
        match value:
            case str():
                return value + shown
            case dict():
                return {name: template(item) for name, item in value.items()}
            case list():
                return [{**entry, "template": template(entry["template"])} for entry in value]
        return value

    for name, value in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".json":
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            write(directory, name, old | {"chat_template": template(value)})
        else:
            path.write_text(template(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": {"tool_use": "-", "rag": "-"}},
            r"tokenizer_config\.json: of .* 'tool_use', 'rag' none is",
        ),
        ({"tokenizer_config.json": [{"name": "rag", "template": "-"}]}, r"tokenizer_config\.json: of the .* 'rag' none is"),
        (
            {"tokenizer_config.json": None, "additional_chat_templates/rag.jinja": "-"},
            r"additional_chat_templates: of the chat templates 'rag' none is the default; save .* as chat_template\.jinja",
        ),
    ],
)
def test_without_a_default_template_the_names_there_are_are_told(copy: Path, files: dict[str, Any], message: str) -> None:
    add_templates(copy, files)
    tokenizer = Tokenizer(copy)
    assert tokenizer.encode("text needs none")
    with pytest.raises(CheckpointError, match=message):
        tokenizer.render_chat([USER])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja", "chat_template.json"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(copy: Path, mini: Tokenizer, name: str, encoding: str) -> None:
    template = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    change(copy, chat_template=...)
    (copy / name).parent.mkdir(exist_ok=True)
    text = json.dumps({"chat_template": template}) if name.endswith(".json") else template
    (copy / name).write_text(text, encoding=encoding)
    assert Tokenizer(copy).encode_chat([USER], mode="no_think") == mini.encode_chat([USER], mode="no_think")
    assert change(copy, chat_template="\ufeff" + template).render_chat([USER]) == mini.render_chat([USER])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_in_a_json_file_is_none_of_it(copy: Path, mini: Tokenizer, encoding: str) -> None:
    write(copy, "added_tokens.json", {"[x]": 7})
    for path in copy.glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    tokenizer = Tokenizer(copy)
    assert tokenizer.end_ids == mini.end_ids
    assert tokenizer.encode("[x]")[1:] == [7]
    assert tokenizer.encode_chat([USER]) == mini.encode_chat([USER])


def test_a_template_that_is_not_utf_8_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").write_bytes(b"\xc3(")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8 \(.*; copy it"):
        Tokenizer(copy).render_chat([USER])


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{% set y = strftime_now('%Y') %}{{ messages[0].content }}", "2+2?"),
        ("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", "26 Jul 2024 2+2?"),
        (
            "{% if strftime_now is defined %}{{ strftime_now() }}{% else %}own {% endif %}{{ messages[0].content }}",
            "own 2+2?",
        ),
        ("{{ strftime_now('%A') if strftime_now else 'own' }} {{ messages[0].content }}", "own 2+2?"),
        ("{{ '=' * 3 }} {{ 2 * loop_count | default(3) }} {{ messages[0].content }}", "=== 6 2+2?"),
    ],
)
def test_a_prompt_does_not_depend_on_the_day(copy: Path, template: str, rendered: str) -> None:
    assert change(copy, chat_template=template).render_chat([USER]) == rendered


def test_templates_have_the_extensions_that_transformers_gives_them(copy: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    message = {"role": "user", "content": "<系统>"}
    assert change(copy, chat_template=template).render_chat([message]) == '{"role": "user", "content": "<系统>"}'


@pytest.mark.parametrize(
    ("messages", "mode", "message"),
    [
        ([], "slow_think", "messages is empty"),
        ([USER], "fast", "thinking mode 'fast' is unknown, wanted one of slow_think, auto_think, no_think"),
        ([USER, {"role": "human", "content": "x"}], "slow_think", r"messages\[1\]: role is 'human', wanted one of system"),
        ([{"role": "user"}], "slow_think", r"messages\[0\]: got .* wanted 'content', a string"),
        ([{"role": "user", "content": [1]}], "slow_think", r"messages\[0\]\.content\[0\]: got 1, wanted a text part"),
        ([{"role": "assistant", "content": "x"}], "no_think", "mode 'no_think' is asked for .* there is none"),
        ([{"role": "user", "content": "x /no_think"}], "auto_think", "mode is 'auto_think', but .* asks for another"),
        ([USER, {"role": "tool", "content": "42"}], "slow_think", r"messages\[1\]: .* leaves out this tool message"),
    ],
)
def test_messages_that_make_no_chat_are_refused(mini: Tokenizer, messages: Any, mode: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mini.render_chat(messages, mode=mode)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'].codecs.open('PWNED', 'w') }}",
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ self.__init__.__globals__.__builtins__.open('PWNED', 'w') }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now.__init__.__globals__ }}",
        "{{ strftime_now('%Y', 2) }}",
        "{{ strftime_now.day }}",
        "{{ 'ab' * 'c' }}",
        "{{ 1 // 0 }}",
        "{% include '/etc/passwd' %}",
    ],
    ids=range(16),
)
def test_a_hostile_template_fails_with_our_error_and_reaches_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(copy)
    tokenizer = change(copy, chat_template=template)
    with pytest.raises(CheckpointError, match=r"chat_template fails, .*; take the original"):
        tokenizer.render_chat([USER])
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 12345678900 }}", r"operator \* is not allowed"),
        ("{{ (('x' * 60000) * 60000) | length }}", r"operator \* is not allowed"),
        ("{{ ['x'] * 60000 }}", r"operator \* is not allowed"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", r"operator \*\* is not allowed"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{{ 'x' }}{% endfor %}{% endfor %}", "more than 4194304 char"),
    ],
)
def test_a_template_cannot_fill_the_memory(copy: Path, template: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        change(copy, chat_template=template).render_chat([USER])


def test_a_template_may_refuse_messages(copy: Path) -> None:
    with pytest.raises(RequestError, match="chat_template refuses these messages: no system turn"):
        change(copy, chat_template="{{ raise_exception('no system turn') }}").render_chat([USER])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "chat_template is not a jinja2 template"),
        ("{{ 1 }}" * 10_000, "chat_template is not a string of at most 65536 characters"),
        ([{"name": "default", "template": 7}], r"tokenizer_config\.json: chat_template is not a string"),
        (7, "chat_template is not a string"),
    ],
)
def test_a_template_that_is_none_is_refused_where_a_chat_is_rendered(copy: Path, template: Any, message: str) -> None:
    tokenizer = change(copy, chat_template=template)
    assert tokenizer.decode(tokenizer.encode("text needs none")[1:]) == "text needs none"
    with pytest.raises(CheckpointError, match=message):
        tokenizer.render_chat([USER])


def test_another_models_chats_are_not_given_the_openpangu_format(pangu: Path) -> None:
    tokenizer = change(pangu, added_tokens_decoder={}, eos_token="</s>")
    assert "[unused9]" in tokenizer.render_chat([USER])  # this sentencepiece model knows it
    plain = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(["a b c"]), model_writer=plain, vocab_size=7, minloglevel=2)
    (pangu / "tokenizer.model").write_bytes(plain.getvalue())
    with pytest.raises(RequestError, match=r"has no chat_template, and openPangu's needs an \[unused9\] token"):
        Tokenizer(pangu).render_chat([USER])


# ---- thoughts: 5 = [unused16], 6 = [unused17], 4 = [unused10] = eos


@pytest.mark.parametrize(
    ("ids", "thought", "answer", "closed"),
    [
        ([], None, [], True),
        ([10, 11], None, [10, 11], True),
        ([10, 4, 11], None, [10], True),
        ([5, 10, 6, 11, 4, 12], [10], [11], True),
        ([5, 6, 11], [], [11], True),
        ([5, 10, 6], [10], [], True),
        ([5, 10, 11], [10, 11], [], False),
        ([5], [], [], False),
        ([5, 10, 4, 6, 11], [10], [], False),  # eos ends everything, a thought included
        ([5, 10, 6, 11, 6, 12], [10], [11, 6, 12], True),  # the first end counts ...
        ([5, 10, 5, 11, 6, 12], [10, 5, 11], [12], True),  # ... and the first start
        ([9, 5, 10, 6, 11], [10], [11], True),  # what precedes the start is dropped
        ([10, 6, 11], [10], [11], True),  # the start may be missing
        ([10, 6, 11, 5, 12], [10], [11, 5, 12], True),
    ],
    ids=str,
)
def test_a_thought_is_split_off_by_id(
    mini: Tokenizer, ids: list[int], thought: list[int] | None, answer: list[int], closed: bool
) -> None:
    expected = Thought(None if thought is None else tuple(thought), tuple(answer), closed)
    assert mini.split_thought(ids) == mini.split_thought(np.array(ids, np.int32)) == expected


def test_text_that_only_looks_like_a_marker_is_no_marker(mini: Tokenizer) -> None:
    ids = [i for char in "[unused16]a[unused17]b" for i in mini.encode(char)[1:]]
    assert mini.split_thought(ids) == Thought(None, tuple(ids), True)


def test_the_thought_and_answer_of_every_embedded_chat_are_found(mini: Tokenizer) -> None:
    for record in records("calibration.jsonl"):
        reply = record["messages"][-1]["content"]
        found = mini.split_thought(mini.encode(reply + "[unused10]")[1:])
        head, marker, tail = reply.partition("[unused17]")
        assert mini.decode(found.answer) == (tail if marker else head)
        assert ("[unused16]" + mini.decode(found.thought) == head) if found.thought is not None else not marker


# ---- files that are wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", None, r"tokenizer\.model: cannot read \(No such file.*sentencepiece.*tokenizer\.json"),
        ("tokenizer.model", b"", r"tokenizer\.model: these 0 bytes are not a sentencepiece model; download it again"),
        ("tokenizer.model", b"PK\x03\x04", "these 4 bytes are not a sentencepiece model"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "not a sentencepiece model; run git lfs pull"),
        ("tokenizer_config.json", None, r"tokenizer_config\.json: cannot read \(No such file.*copy it from the original"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: not JSON \(.*copy it from the original"),
        ("tokenizer_config.json", b"\xff\xfe\xfa", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", b"[" * 100_000, r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json: got a JSON list, wanted an object"),
        ("special_tokens_map.json", b"nope", r"special_tokens_map\.json: not JSON"),
        ("config.json", b"1", r"config\.json: got a JSON int"),
    ],
)
def test_a_missing_or_malformed_file_is_named(copy: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(copy)


def test_a_truncated_sentencepiece_model_is_refused(copy: Path) -> None:
    whole = (copy / "tokenizer.model").read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 1):
        (copy / "tokenizer.model").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a sentencepiece model"):
            Tokenizer(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": "<end>"}, r"config\.json: eos_token '<end>' is neither an added token nor a piece of .*with its id"),
        ({"bos_token": 7}, "7 is not a token, wanted a string"),
        ({"pad_token": {"id": 7}}, r"\{'id': 7\} is not a token"),
        ({"added_tokens_decoder": ["x"]}, "added_tokens_decoder is a list, wanted an object of ids"),
        ({"added_tokens_decoder": {"7": None}}, "None is not a token"),
        ({"added_tokens_decoder": {"7": ""}}, "'' is not a token"),
        ({"added_tokens_decoder": {"-1": "[x]"}}, "got id '-1', wanted 0 to 2147483647; are the files of one"),
        ({"added_tokens_decoder": {"x": "[x]"}}, "got id 'x', wanted 0 to 2147483647"),
        ({"added_tokens_decoder": {"9" * 5000: "[x]"}}, "got id '9999"),
        ({"added_tokens_decoder": {"7": "[x]", "8": "[x]"}}, r"token '\[x\]' with id 8 clashes with '\[x\]' with id 7"),
        ({"added_tokens_decoder": {"7": "[x]", "07": "[y]"}}, r"token '\[y\]' with id 7 clashes with '\[x\]' with id 7"),
    ],
)
def test_a_wrong_tokenizer_config_says_what_is_wrong(copy: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        change(copy, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "text", "message"),
    [
        ("added_tokens.json", {"[PAD]": 1024}, "[PAD]", r"token '\[PAD\]' of the text has id 1024, .* vocab_size is 1024"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1025": {"content": "[x]"}}}, "[x]", r"'\[x\]' of .* id 1025"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "[PAD]", r"token '\[PAD\]' of the text has no id; list it"),
        ("special_tokens_map.json", {"pad_token": {"content": "[PAD]"}}, None, None),  # tokenizer_config.json has another
        ("config.json", {"pad_token_id": 1024, "unk_token_id": 5000}, None, None),
        ("generation_config.json", {"pad_token_id": 1024}, None, None),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {"content": "<mask>", "lstrip": True}}},
            "<mask>",
            "token '<mask>' of the text sets lstrip, which is not supported; leave it out",
        ),
    ],
)
def test_a_token_that_no_text_has_is_not_minded(
    copy: Path, mini: Tokenizer, name: str, changes: dict[str, Any], text: str | None, message: str | None
) -> None:
    """As in transformers; a text that has it is refused."""
    write(copy, name, json.loads((copy / name).read_text(encoding="utf-8") if (copy / name).exists() else "{}") | changes)
    tokenizer = Tokenizer(copy)
    assert tokenizer.encode_chat([USER], mode="no_think") == mini.encode_chat([USER], mode="no_think")
    assert (tokenizer.end_ids, tokenizer.bos_id) == (mini.end_ids, mini.bos_id)
    if text is not None:
        with pytest.raises(RequestError, match=message):
            tokenizer.encode(f"a {text} b")
        with pytest.raises(RequestError, match=message):
            tokenizer.encode_chat([{"role": "user", "content": text}])


def test_named_tokens_beyond_the_model_are_no_end_and_no_beginning(copy: Path) -> None:
    write(copy, "added_tokens.json", {"<end>": 1024, "<begin>": 1025})
    tokenizer = change(copy, eos_token="<end>")
    assert (tokenizer.eos_id, tokenizer.end_ids) == (4, {4})
    with pytest.raises(RequestError, match="token '<begin>' of the text has id 1025, which the model does not know"):
        change(copy, bos_token="<begin>").encode("a")
    assert change(copy, bos_token="<begin>", add_bos_token=False).encode("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"[unused10]": 45893}, r"'\[unused10\]' with id 45893 clashes with '\[unused10\]' with id 45892; keep"),
        ({"[x]": 45892}, r"added_tokens\.json: .* '\[x\]' with id 45892 clashes with '\[unused10\]' with id 45892"),
        ({"[x]": True}, r"added_tokens\.json: added token '\[x\]': got id True"),
        ({"[x]": 1.5}, "got id 1.5"),
    ],
)
def test_added_tokens_json_may_not_contradict_the_config(pangu: Path, content: dict[str, Any], message: str) -> None:
    write(pangu, "added_tokens.json", content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(pangu)


def test_a_tokenizer_of_another_checkpoint_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: got 1024 pieces, config\.json's vocab_size is 1000"):
        change(copy, "config.json", vocab_size=1000)


def test_a_checkpoint_without_eos_is_refused(copy: Path) -> None:
    for name in ("special_tokens_map.json", "generation_config.json"):
        (copy / name).unlink()
    change(copy, eos_token=...)
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id: got id 5000, wanted 0 to 1023"):
        change(copy, "config.json", eos_token_id=5000)
    with pytest.raises(CheckpointError, match=r"names no eos_token, and config\.json no eos_token_id"):
        change(copy, "config.json", eos_token_id=...)
