"""Calibration data: one meaning for every file format, errors that name the row, no benchmark problem let through."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.calibration.data import TokenData, load_token_data
from ms_pangu_quant.calibration.overlap import SHORTEST_BODY, _words, find_benchmark
from ms_pangu_quant.checkpoint.chat import checked_chat
from ms_pangu_quant.checkpoint.messages import THOUGHTS
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.errors import DataError, RequestError
from ms_pangu_quant.evaluation.tasks import TASKS, humaneval, load_problems

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "ms_pangu_quant" / "assets"
BENCHMARKS = ASSETS / "benchmarks"


class ByteTokenizer:
    """Id 1 is BOS, byte b is id b + 2."""

    def encode(self, text: str) -> list[int]:
        return [1, *(byte + 2 for byte in text.encode())]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, mode: str = "slow_think", add_generation_prompt: bool = True
    ) -> list[int]:
        assert mode == "slow_think"
        assert not add_generation_prompt
        for index, message in enumerate(messages):
            if message["role"] not in ("system", "user", "assistant"):
                raise RequestError(f"messages[{index}]: unknown role {message['role']!r}")
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return decode(ids)


def decode(ids: Sequence[int]) -> str:
    return bytes(token - 2 for token in ids if token > 1).decode(errors="replace")


VOCABULARY = 258


def load(path: Path, *, tokenizer: Any = None, max_length: int = 10_000, **options: Any) -> TokenData:
    return load_token_data(
        path, tokenizer=tokenizer or ByteTokenizer(), vocab_size=VOCABULARY, max_length=max_length, **options
    )


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(content: str) -> dict[str, Any]:
    """The content between CJK letters and a mode suffix, as it would stand in a real row."""
    return {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "请完成" + content + " /no_think"},
            {"role": "assistant", "content": "好"},
        ]
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "token_ids": [{"token_ids": [(7 * row + i) % VOCABULARY for i in range(2 + row)]} for row in range(23)],
    "text": [{"text": f"row {row}: 量化 [1]\n" * (row + 1)} for row in range(23)],
    "messages": [chat(f"row {row}") for row in range(23)],
}


def in_every_format(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Path]:
    import datasets

    table = pa.Table.from_pylist(list(rows))
    paths = {
        name: folder / name
        for name in (
            "rows.jsonl",
            "lines.json",
            "array.json",
            "odd [1]*?.parquet",
            "saved",
            "saved_formatted",
            "folder_jsonl",
            "folder_parquet",
            "folder_mixed",
        )
    }
    for name in ("folder_jsonl", "folder_parquet", "folder_mixed"):
        paths[name].mkdir()
    write_lines(paths["rows.jsonl"], rows)
    write_lines(paths["lines.json"], rows)
    paths["array.json"].write_text("\ufeff" + json.dumps(rows, indent=1))
    pa.parquet.write_table(table, paths["odd [1]*?.parquet"])
    dataset = datasets.Dataset.from_list(list(rows))
    dataset.save_to_disk(paths["saved"])
    dataset.with_format("numpy").save_to_disk(paths["saved_formatted"], num_shards=2)
    write_lines(paths["folder_jsonl"] / "a.jsonl", rows[:9])
    write_lines(paths["folder_jsonl"] / "b.jsonl", rows[9:])
    (paths["folder_jsonl"] / "README.md").write_text("not data")
    pa.parquet.write_table(table[:9], paths["folder_parquet"] / "0.parquet")
    pa.parquet.write_table(table[9:], paths["folder_parquet"] / "1.parquet")
    pa.parquet.write_table(table[:9], paths["folder_mixed"] / "0.parquet")
    write_lines(paths["folder_mixed"] / "1.jsonl", rows[9:])
    return paths


# ---- one meaning for every format


@pytest.mark.parametrize("form", ROWS)
def test_every_format_gives_the_same_tokens(tmp_path, form):
    paths = in_every_format(tmp_path, ROWS[form])
    for options in ({}, {"samples": 11}, {"samples": 11, "seed": 5}, {"max_length": 6}):
        loaded = {name: load(path, **options) for name, path in paths.items()}
        assert len({data.sha256 for data in loaded.values()}) == 1, loaded


def test_sequences_are_read_only_int32_in_file_order_and_hashed_with_their_lengths(tmp_path):
    data = load(write_lines(tmp_path / "a.jsonl", ROWS["token_ids"]))
    assert [ids.tolist() for ids in data.sequences] == [row["token_ids"] for row in ROWS["token_ids"]]
    assert all(ids.dtype == np.int32 and not ids.flags.writeable for ids in data.sequences)
    assert (data.tokens, data.truncated) == (sum(range(2, 25)), 0)
    cuts = [[{"token_ids": [1, 2, 3]}, {"token_ids": [4, 5]}], [{"token_ids": [1, 2]}, {"token_ids": [3, 4, 5]}]]
    assert len({load(write_lines(tmp_path / "b.jsonl", rows)).sha256 for rows in cuts}) == 2


def test_text_messages_and_ids_of_the_same_chat_are_the_same_data(tmp_path):
    encode = ByteTokenizer().encode_chat
    ids = [{"token_ids": encode(row["messages"], add_generation_prompt=False)} for row in ROWS["messages"]]
    text = [{"text": decode(row["token_ids"])} for row in ids]
    files = {"ids": ids, "text": text, "messages": ROWS["messages"]}
    assert len({load(write_lines(tmp_path / f"{name}.jsonl", rows)).sha256 for name, rows in files.items()}) == 1


def test_token_ids_win_over_messages_and_messages_over_text(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    both = load(write_lines(tmp_path / "a.jsonl", [{"text": "other", "messages": messages}]))
    assert decode(both.sequences[0]) == "<user>hello"
    three = load(write_lines(tmp_path / "b.jsonl", [{"text": "other", "messages": messages, "token_ids": [3, 4]}]))
    assert three.sequences[0].tolist() == [3, 4]


def test_other_columns_and_blank_lines_do_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "2024-01-01", "meta": 1}\r\n\n{"text": "2024-01-02", "meta": "x", "token_ids": null}\n')
    assert [decode(ids) for ids in load(path).sequences] == ["2024-01-01", "2024-01-02"]


# ---- which rows


def test_without_a_seed_the_first_rows_are_taken_and_with_one_a_shuffle(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS["token_ids"])
    lengths = {seed: [len(ids) for ids in load(path, samples=20, seed=seed).sequences] for seed in (None, 0, 1)}
    assert lengths[None] == list(range(2, 22))
    assert lengths[0] != lengths[1] != lengths[None]
    assert all(len(set(lengths[seed])) == 20 for seed in (0, 1))
    assert load(path, seed=1).sha256 == load(path, seed=1).sha256 != load(path).sha256
    assert len(load(path, samples=1000).sequences) == 23


@given(st.integers(1, 400), st.integers(2, 30), st.integers(0, 5))
def test_no_more_rows_are_taken_than_have_so_many_tokens_and_always_one(tmp_path_factory, tokens, max_length, seed):
    path = write_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", ROWS["token_ids"])
    whole = load(path, max_length=max_length, seed=seed).sequences
    taken = load(path, max_length=max_length, seed=seed, tokens=tokens).sequences
    assert [ids.tolist() for ids in taken] == [ids.tolist() for ids in whole[: len(taken)]]
    count = sum(map(len, taken))
    assert count <= tokens or len(taken) == 1
    assert len(taken) == len(whole) or count + len(whole[len(taken)]) > tokens


def test_only_the_rows_used_are_tokenized(tmp_path):
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text: str) -> list[int]:
            self.calls += 1
            return super().encode(text)

    tokenizer = Counting()
    load(write_lines(tmp_path / "a.jsonl", ROWS["text"]), tokenizer=tokenizer, samples=4, seed=0)
    assert tokenizer.calls == 4


def test_long_sequences_keep_their_beginning_and_are_counted(tmp_path):
    data = load(write_lines(tmp_path / "a.jsonl", ROWS["token_ids"]), max_length=10)
    assert [len(ids) for ids in data.sequences] == [min(2 + row, 10) for row in range(23)]
    assert data.truncated == 14
    assert data.sequences[-1].tolist() == ROWS["token_ids"][-1]["token_ids"][:10]


PROBE = """
import builtins, json, socket, sys
from pathlib import Path
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from ms_pangu_quant.calibration.data import load_token_data
assert "datasets" not in sys.modules and "pyarrow" not in sys.modules
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = load_token_data(path, tokenizer=None, vocab_size=258, max_length=9, seed=7)
    print(path.name, data.sha256)
"""


def test_loading_is_deterministic_silent_offline_and_leaves_nothing_behind(tmp_path):
    data, home, cwd, scratch = (tmp_path / name for name in ("data", "home", "cwd", "scratch"))
    for folder in (data, home, cwd, scratch):
        folder.mkdir()
    in_every_format(data, ROWS["token_ids"])
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    outputs = []
    for hash_seed in ("0", "1"):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "PYTHON"))}
        env |= {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-B", "-c", PROBE, str(data)], cwd=cwd, env=env, capture_output=True, text=True
        )
        assert (run.returncode, run.stderr) == (0, ""), run.stderr
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]
    hashes = {line.rsplit(" ", 1)[1] for line in outputs[0].splitlines()}
    assert hashes == {load(data / "saved", max_length=9, seed=7).sha256}
    assert [*home.rglob("*"), *cwd.rglob("*"), *scratch.rglob("*")] == []
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


# ---- errors name file, row, what was got and what was wanted

BAD_LINES = {
    "malformed": ('{"text": "a"}\n\n{"text": "b"\n', ["line 3", "not valid JSON", '{"text": "b"', "one object per line"]),
    "not utf-8": ('{"text": "a"}\n{"text": "\udcff"}\n', ["line 2", "not valid JSON"]),
    "not an object": ('{"text": "a"}\n[1, 2]\n', ["line 2", "a JSON list", "token_ids, messages, text"]),
    "no known key": ('{"text": "a"}\n{"prompt": "b", "x": 1}\n', ["line 2", "'prompt', 'x'", "token_ids, messages, text"]),
    "mixed forms": (
        '{"messages": [{"role": "user", "content": "a"}]}\n{"text": "b"}\n',
        ["line 2", "got 'text'", "'messages'", "same form in every row"],
    ),
    "text of wrong type": ('{"text": "a"}\n{"text": 5}\n', ["line 2", "text: got 5", "wanted a string"]),
    "blank text": ('{"text": "a"}\n{"text": " \\n"}\n', ["line 2", "text", "not empty"]),
    "half a character": ('{"text": "a"}\n{"text": "\\ud800"}\n', ["line 2", "text", "wanted a string"]),
    "messages of wrong type": ('{"messages": "hello"}\n', ["line 1", "messages: got 'hello'", "wanted a list"]),
    "no messages": ('{"messages": []}\n', ["line 1", "messages: got []", "not empty"]),
    "message without content": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}\n',
        ["line 1", "messages[1]", "{'role': 'assistant'}", "'content'"],
    ),
    "unknown role": ('{"messages": [{"role": "wizard", "content": "a"}]}\n', ["line 1", "messages[0]", "'wizard'"]),
    "id too large": ('{"token_ids": [1, 2]}\n{"token_ids": [1, 258]}\n', ["line 2", "got 258", "0 to 257"]),
    "id negative": ('{"token_ids": [1, -2]}\n', ["line 1", "got -2", "0 to 257"]),
    "id a fraction": ('{"token_ids": [1, 2.0]}\n', ["line 1", "got 2.0", "integers"]),
    "id a truth": ('{"token_ids": [1, true]}\n', ["line 1", "got True", "integers"]),
    "id null": ('{"token_ids": [1, null]}\n', ["line 1", "got None", "integers"]),
    "id enormous": ('{"token_ids": [1, 99999999999999999999999]}\n', ["line 1", "integers from 0 to 257"]),
    "no ids": ('{"token_ids": []}\n', ["line 1", "token_ids: got []"]),
    "one id": ('{"token_ids": [1, 2]}\n{"token_ids": [1]}\n', ["line 2", "got 1 token,", "wanted 2 or more"]),
    "empty": ("", ["no rows"]),
    "blank": ("\n \n", ["no rows"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, case):
    content, wanted = BAD_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert [part for part in [str(path), *wanted] if part not in message] == []
    assert "\n" not in message
    assert len(message) < 400


PARQUET_ROWS = {
    "ids of wrong type": ([{"token_ids": ["a", "b"]}], ["row 1", "got 'a'", "integers"]),
    "id too large": ([{"token_ids": [1, 2]}, {"token_ids": [1, 300]}], ["row 2", "got 300", "0 to 257"]),
    "text of wrong type": ([{"text": 1}], ["row 1", "text: got 1"]),
    "messages of wrong type": ([{"messages": ["a"]}], ["row 1", "messages[0]: got 'a'"]),
    "missing value": ([{"text": "a"}, {"text": "b"}, {"text": None}], ["row 3", "got nothing", "'text'"]),
    "mixed forms": ([{"text": "a"}, {"token_ids": [1, 2]}], ["row 1", "got 'text'", "'token_ids'"]),
    "no known column": ([{"prompt": "a", "answer": "b"}], ["'prompt', 'answer'", "token_ids, messages, text"]),
    "only nulls": ([{"text": None}], ["every row is null"]),
}


@pytest.mark.parametrize("case", PARQUET_ROWS)
def test_a_bad_parquet_row_is_named(tmp_path, case):
    rows, wanted = PARQUET_ROWS[case]
    path = tmp_path / "rows.parquet"
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(DataError) as caught:
        load(path)
    assert [part for part in [str(path), *wanted] if part not in str(caught.value)] == []


def test_files_that_are_not_data_are_refused(tmp_path):
    import datasets

    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 is not enough")
    (tmp_path / "damaged.json").write_text('[{"text": "a"},\n{"text": ]')
    write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    split = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "splits")
    for name, wanted in {
        "squad": ["not found", "nothing is downloaded"],
        "rows.jsonl/x": ["not found"],
        "empty_folder": ["no .jsonl or .parquet file in it"],
        "rows.csv": ["unknown kind", ".jsonl"],
        "damaged.parquet": ["not readable", ".parquet"],
        "damaged.json": ["not valid JSON", "line 2"],
        "saved": ["not readable"],
        "splits": ["splits (test, train)", "folder of one"],
    }.items():
        with pytest.raises(DataError) as caught:
            load(tmp_path / name)
        assert [part for part in [str(tmp_path / name), *wanted] if part not in str(caught.value)] == []
    assert len(load(tmp_path / "splits" / "train").sequences) == 1


def test_forms_may_not_mix_between_the_files_of_a_folder(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    write_lines(tmp_path / "b.jsonl", [{"token_ids": [1, 2]}])
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: got 'text', where other rows have 'token_ids'"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_without_a_tokenizer_only_ids_can_be_used(tmp_path, form):
    def without_tokenizer(name: str) -> TokenData:
        path = write_lines(tmp_path / "rows.jsonl", ROWS[name])
        return load_token_data(path, tokenizer=None, vocab_size=VOCABULARY, max_length=8)

    with pytest.raises(DataError, match=rf"{form}.*no tokenizer\.json or tokenizer\.model.*token_ids"):
        without_tokenizer(form)
    assert len(without_tokenizer("token_ids").sequences) == 23


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "aaa"}, {"text": "zzz"}])
    with pytest.raises(DataError, match=r"line 2: the tokenizer gives id 124.*end at 119.*another checkpoint"):
        load_token_data(path, tokenizer=ByteTokenizer(), vocab_size=120, max_length=8)


@pytest.mark.parametrize("options", [{"max_length": 1}, {"samples": 0}, {"tokens": 0}, {"seed": -1}])
def test_senseless_numbers_are_refused(tmp_path, options):
    with pytest.raises(RequestError, match=next(iter(options))):
        load(write_lines(tmp_path / "rows.jsonl", ROWS["text"]), **options)


# ---- what other programs write into a chat


CALL = {"id": "1", "type": "function", "function": {"name": "double", "arguments": '{"x": 1}'}}
USER, ANSWER = {"role": "user", "content": "Double it."}, {"role": "assistant", "content": "2 * x"}


@pytest.mark.parametrize("key", THOUGHTS)
def test_a_thought_beside_the_content_is_the_data_that_the_model_writes_itself(tmp_path, key):
    """The embedded chats that have a thought, and those that have none, in every format: the ids do not change."""
    rows = [json.loads(line) for line in (ASSETS / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:12]]
    rows = [{"messages": row["messages"]} for row in rows]
    apart = [{"messages": [_thought_apart(message, key) for message in row["messages"]]} for row in rows]
    assert 0 < sum(key in message for row in apart for message in row["messages"]) < 12
    tokenizer = Tokenizer(ASSETS / "openpangu-mini")
    (tmp_path / "whole").mkdir()
    wanted = _sha(write_lines(tmp_path / "whole" / "rows.jsonl", rows), tokenizer)
    found = {name: _sha(path, tokenizer) for name, path in in_every_format(tmp_path, apart).items()}
    assert found == dict.fromkeys(found, wanted)


def _thought_apart(message: Mapping[str, str], key: str) -> dict[str, str]:
    thought, marker, answer = message["content"].removeprefix("[unused16]").partition("[unused17]")
    return {"role": message["role"], "content": answer, key: thought} if marker else dict(message)


def _sha(path: Path, tokenizer: Tokenizer) -> str:
    return load_token_data(path, tokenizer=tokenizer, vocab_size=1024, max_length=2048).sha256


def test_a_thought_without_an_answer_counts_and_two_that_agree_are_one(tmp_path):
    tokenizer = Tokenizer(ASSETS / "openpangu-mini")
    written = {"role": "assistant", "content": "[unused16]so so[unused17]"}
    spellings = [
        {"reasoning_content": "so so", "content": ""},
        {"reasoning": "so so", "content": None},
        {"thinking": "so so"},
        {"reasoning": "so so", "reasoning_content": "so so", "content": "", "tool_calls": [], "name": None},
        {"content": [{"type": "thinking", "thinking": "so so", "signature": "x"}]},
    ]
    wanted = tokenizer.encode_chat([USER, written])
    for spelling in spellings:
        assert tokenizer.encode_chat([USER, {"role": "assistant", **spelling}]) == wanted, spelling


def test_parts_of_text_stand_on_lines_of_their_own_and_what_says_nothing_is_left_out(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    odd = {"id": "x1", "weight": 1.0, "train": True, "refusal": None, "annotations": [], "tool_calls": None}
    answer = {**ANSWER, "content": [{"type": "text", "text": ANSWER["content"]}]}
    rows = [{"messages": [{**USER, **odd, "content": parts}, answer], "tools": [], "source": "web"}]
    plain = [{"messages": [{"role": "user", "content": "a\nb"}, ANSWER]}]
    wanted = load(write_lines(tmp_path / "plain.jsonl", plain)).sha256
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load(write_lines(tmp_path / "rows.jsonl", rows)).sha256 == wanted
    assert load(tmp_path / "rows.parquet").sha256 == wanted


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
LOST = {  # a row -> what the message names
    "calls": ([USER, {**ANSWER, "tool_calls": [CALL]}], "messages[1].tool_calls: got"),
    "calls in place of content": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "[1].tool_calls: "),
    "an older call": ([USER, {**ANSWER, "function_call": CALL["function"]}], "messages[1].function_call: got"),
    "what a call gave": (
        [USER, {"role": "tool", "tool_call_id": "1", "content": "2"}],
        "messages[1].tool_call_id: got '1'",
    ),
    "a speaker": ([{**USER, "name": "Ada"}], "messages[0].name: got 'Ada'"),
    "a refusal": ([USER, {**ANSWER, "refusal": "no"}], "messages[1].refusal: got 'no'"),
    "a picture": ([{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}], "content[1]: got 'image_url'"),
    "use of a tool": ([{"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}], "content[0]: got 'tool_use'"),
    "a part of no text": ([{"role": "user", "content": [{"type": "text", "text": None}]}], "content[0]: got"),
    "no content": ([USER, {"role": "assistant", "content": None}], "messages[1]: got"),
    "two thoughts": ([USER, {**ANSWER, "reasoning": "a", "reasoning_content": "b"}], "reasoning_content and reasoning are"),
    "a thought of the user": ([{**USER, "reasoning": "a"}], "messages[0].reasoning: a thought of role 'user'"),
    "a thought of parts": ([USER, {**ANSWER, "reasoning": ["a"]}], "messages[1].reasoning: got ['a'], wanted a string"),
    "a thought twice": (
        [USER, {"role": "assistant", "content": "[unused16]a[unused17]b", "reasoning": "a"}],
        "messages[1]: a thought in reasoning_content, and [unused16]",
    ),
}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", LOST)
def test_what_a_chat_would_lose_is_refused_by_row_and_key(tmp_path, case, format):
    messages, wanted = LOST[case]
    path, place = tmp_path / f"rows.{format}", "line 2" if format == "jsonl" else "row 1"
    if format == "jsonl":
        write_lines(path, [{"messages": [USER, ANSWER]}, {"messages": messages}])
    else:  # which has no place for strings beside lists
        pa.parquet.write_table(pa.Table.from_pylist([{"messages": messages}]), path)
    with pytest.raises(DataError) as caught:
        load_token_data(path, tokenizer=Tokenizer(ASSETS / "openpangu-mini"), vocab_size=1024, max_length=64)
    assert f"{path}: {place}: " in str(caught.value)
    assert wanted in str(caught.value)


@pytest.mark.parametrize("key", ["tools", "functions", "documents", "system"])
def test_what_stands_beside_messages_and_belongs_into_the_prompt_is_refused(tmp_path, key):
    rows = [{"messages": [USER, ANSWER], key: None}, {"messages": [USER, ANSWER], key: "be brief"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path, place in ((write_lines(tmp_path / "rows.jsonl", rows), "line 2"), (tmp_path / "rows.parquet", "row 2")):
        with pytest.raises(DataError, match=rf"{place}: {key}: got 'be brief' beside messages"):
            load(path)
    assert len(load(write_lines(tmp_path / "ids.jsonl", [{**rows[1], "token_ids": [1, 2]}])).sequences) == 1
    first = {"role": "system", "content": "be brief"}
    if key == "system":  # which is there, then
        assert load(write_lines(tmp_path / "there.jsonl", [{"messages": [first, USER], key: "be brief"}])).tokens


def test_a_thought_is_refused_where_the_model_has_no_tokens_for_it():
    chat = [USER, {**ANSWER, "reasoning": "a"}]
    with pytest.raises(RequestError, match=r"messages\[1\]\.reasoning_content: this model has no thinking tokens"):
        checked_chat(chat, None, ("no_think",), thinks=False)
    assert checked_chat([USER, ANSWER], None, ("no_think",), thinks=False) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "todo"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            "'conversations': rename it to 'messages', 'from' to 'role'",
        ),
        ({"prompt": "a", "response": "b"}, "'prompt': write {'messages': [{'role': 'user'"),
        ({"instruction": "a", "output": "b"}, "'instruction': write {'messages': [{'role': 'user'"),
        ({"question": "a", "answer": "b"}, "'question': write {'messages': [{'role': 'user'"),
        ({"input_ids": [1, 2]}, "'input_ids': rename it to 'token_ids'"),
        ({"content": "a"}, "'content': rename it to 'text'"),
    ],
)
def test_rows_of_other_programs_are_told_what_to_do(tmp_path, row, todo):
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    for path in (write_lines(tmp_path / "rows.jsonl", [row]), tmp_path / "rows.parquet"):
        with pytest.raises(DataError) as caught:
            load(path)
        assert todo in str(caught.value)


# ---- files that are not the data


def test_an_empty_parquet_has_no_rows_and_is_no_fault_beside_others(tmp_path):
    empty = pa.table({"text": pa.array([], pa.string())})
    pa.parquet.write_table(empty, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no rows"):
        load(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows"):
        load(tmp_path)
    pa.parquet.write_table(pa.table({"text": ["a b"]}), tmp_path / "b.parquet")
    assert len(load(tmp_path).sequences) == 1


def test_a_folder_without_rows_names_the_folders_below_that_have_some(tmp_path):
    import datasets

    (tmp_path / ".git" / "data").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / ".git" / "data" / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "README.md").write_text("a data set")
    write_lines(tmp_path / "data" / "train.jsonl", [{"text": "a"}])
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert f"no .jsonl or .parquet file in it, but in {tmp_path / 'data'}: give it" in str(caught.value)
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "x" / "saved")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert f"but in {tmp_path / 'data'}, {tmp_path / 'x' / 'saved'}: give one of them" in str(caught.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}', mtime=0))
    with pytest.raises(DataError, match=r"no \.jsonl or \.parquet file in it, but rows\.jsonl\.gz: give"):
        load(tmp_path / "other")


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "._rows.jsonl").write_bytes(b"\0\5\x16\7Mac OS X")
    assert len(load(tmp_path).sequences) == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", POINTER, "is a git-lfs pointer, not the data; run git lfs pull"),
        ("rows.parquet", POINTER, "is a git-lfs pointer, not the data; run git lfs pull"),
        ("rows.jsonl", b"\xef\xbb\xbf<!doctype html><title>Login</title>", "not the data; it is a web page"),
        ("rows.parquet", b"\n<html>", "not the data; it is a web page"),
        ("rows.json", b"<html>", "not the data; it is a web page"),
        ("rows.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "is compressed; run gzip -d on it"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0), "is compressed; run gzip -d on it"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd\0", "is compressed; run zstd -d on it"),
        ("rows.jsonl", b"PAR1\0PAR1", "is a parquet file; name it .parquet"),
        ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("rows.txt", b"a", "is text without rows"),
        ("rows.csv", b"text\na\n", "from_csv"),
    ],
)
def test_a_file_that_holds_something_else_is_told_as_what_it_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert f"{tmp_path / name}: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "lines.json", "array.json"])
def test_a_byte_order_mark_is_no_data(tmp_path, name):
    row = json.dumps({"text": "a"})
    for content in (row, f"\n{row}"):
        content = f"[{content}]" if name == "array.json" else content
        (tmp_path / name).write_text(content)
        plain = load(tmp_path / name).sha256
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert load(tmp_path / name).sha256 == plain


# ---- benchmark problems


def human_eval() -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((BENCHMARKS / "HumanEval.jsonl.gz").read_bytes()).splitlines()]


def mbpp() -> list[dict[str, Any]]:
    full = [json.loads(line) for line in (BENCHMARKS / "mbpp.jsonl").read_text().splitlines()]
    sanitized = json.loads((BENCHMARKS / "sanitized-mbpp.json").read_text())
    return full + [{**problem, "text": problem["prompt"]} for problem in sanitized]


def chat_text(content: str) -> str:
    return "\n".join(message["content"] for message in chat(content)["messages"])


def test_every_human_eval_prompt_and_solution_is_found_in_a_chat():
    problems = human_eval()
    assert len(problems) == 164
    prompts = [find_benchmark(chat_text(problem["prompt"])) for problem in problems]
    assert None not in prompts
    named = [found == f"{problem['task_id']} prompt" for found, problem in zip(prompts, problems, strict=True)]
    assert sum(named) >= 160  # a few share 13 words with an earlier problem and are found under its name
    functions = [find_benchmark(chat_text("\n".join(humaneval.solution(problem)))) for problem in problems]
    assert None not in functions
    long = [
        problem["canonical_solution"] for problem in problems if len(_words(problem["canonical_solution"])) >= SHORTEST_BODY
    ]
    assert len(long) == 128
    assert None not in [find_benchmark(chat_text(body)) for body in long]


def test_every_mbpp_sentence_and_solution_is_found_in_a_chat():
    problems = mbpp()
    assert len(problems) == 974 + 427
    for key in ("text", "code"):
        missed = [problem["task_id"] for problem in problems if find_benchmark(chat_text(problem[key])) is None]
        assert missed == [], key


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.kept_out])
def test_what_a_task_asks_and_every_solution_of_it_is_found(task):
    problems = load_problems(TASKS[task]).by_id.values()
    assert [each.task_id for each in problems if find_benchmark(chat_text(each.statement.text)) is None] == []
    assert [each.task_id for each in problems if find_benchmark(chat_text("\n".join(each.solution))) is None] == []


def test_only_the_embedded_checkpoints_own_tasks_are_not_searched_for():
    assert {name for name, task in TASKS.items() if not task.kept_out} == {"mini", "mini_validation"}


def test_a_task_added_to_the_table_is_searched_for_from_then_on(tmp_path, monkeypatch):
    prompt = 'def tally(votes):\n    """Count how often every candidate was named by a voter of the last three rounds."""\n'
    body = (
        "    counted = {}\n    for vote in votes:\n        counted[vote] = counted.get(vote, 0) + 1\n    return counted\n"
    )
    row = {"task_id": "7", "prompt": prompt, "entry_point": "tally", "canonical_solution": body, "test": "check = print"}
    path = write_lines(tmp_path / "own.jsonl", [row])
    own = {"name": "own", "file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "prefix": "Own/"}
    texts = [prompt, "def tally(votes):\n" + body, body]
    assert [find_benchmark(chat_text(text)) for text in texts] == [None, None, None]
    monkeypatch.setitem(TASKS, "own", replace(TASKS["humaneval"], **own))
    assert [find_benchmark(chat_text(text)) for text in texts] == ["Own/7 prompt", "Own/7 solution", "Own/7 solution"]
    with pytest.raises(DataError, match=r"line 1: Own/7 solution"):
        load(write_lines(tmp_path / "rows.jsonl", [{"text": body}]))
    monkeypatch.undo()
    assert find_benchmark(chat_text(body)) is None


def test_a_text_of_several_problems_has_the_name_of_the_first_in_the_largest_set():
    """Of all 974, though the table has the sanitized 427 before them, and the plus sets have their own spelling."""
    assert find_benchmark(load_problems(TASKS["mbpp_sanitized"]).by_id["MBPP/602"].statement.text) == "MBPP/217 prompt"
    assert find_benchmark(load_problems(TASKS["mbpp_plus"]).by_id["Mbpp/11"].statement.text) == "MBPP/11 prompt"


def test_layout_case_and_markdown_do_not_hide_a_problem():
    problem = human_eval()[0]
    for disguise in (
        str.upper,
        lambda text: " ".join(text.split()),
        lambda text: text.replace("\n", "\n> **"),
        lambda text: text.replace("has_close_elements", "f").replace(",", " ,"),
    ):
        assert find_benchmark(chat_text(disguise(problem["prompt"]))) == "HumanEval/0 prompt"


def test_ordinary_text_is_no_benchmark_problem():
    assert find_benchmark("") is None
    assert find_benchmark("return x + y") is None
    assert find_benchmark(" ".join(map(str, range(100)))) is None
    assert find_benchmark("0 1 2 3 4 5 6 7 8 9 a b c d e f") is None
    bubble_sort = (
        "for i in range(n):\n    for j in range(0, n - i - 1):\n        if arr[j] > arr[j + 1]:\n"
        "            arr[j], arr[j + 1] = arr[j + 1], arr[j]\n"
    )
    assert find_benchmark("def bubble_sort(arr):\n    n = len(arr)\n    " + bubble_sort) is None


def test_the_standard_library_holds_no_benchmark_problem():
    functions = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines(keepends=True)
        functions += [
            "".join(lines[node.lineno - 1 : node.end_lineno])
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef)
        ]
    assert len(functions) > 2000
    assert [found for text in functions if (found := find_benchmark(text))] == []


@pytest.mark.parametrize("name", ["calibration", "validation", "heldout"])
def test_the_embedded_data_holds_no_benchmark_problem(name):
    lines = (ASSETS / f"{name}.jsonl").read_text().splitlines()
    strings = ["\n".join(value for value in json.loads(line).values() if isinstance(value, str)) for line in lines]
    assert [found for text in strings if (found := find_benchmark(text))] == []


def test_the_embedded_files_load_and_their_messages_and_text_agree(tmp_path):
    tokenizer = Tokenizer(ASSETS / "openpangu-mini")

    def embedded(path: Path) -> TokenData:
        return load_token_data(path, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_length=512)

    calibration, validation = embedded(ASSETS / "calibration.jsonl"), embedded(ASSETS / "validation.jsonl")
    assert (len(calibration.sequences), len(validation.sequences)) == (256, 600)
    assert (calibration.truncated, validation.truncated) == (0, 0)
    rows = [json.loads(line) for line in (ASSETS / "calibration.jsonl").read_text().splitlines()]
    text = embedded(write_lines(tmp_path / "text.jsonl", [{"text": row["text"]} for row in rows]))
    assert text.sha256 == calibration.sha256
    ids = [{"token_ids": sequence.tolist()} for sequence in calibration.sequences]
    from_ids = embedded(write_lines(tmp_path / "ids.jsonl", ids))
    assert from_ids.sha256 == calibration.sha256


@pytest.mark.parametrize("form", ["messages", "text", "token_ids"])
def test_benchmark_rows_are_refused_by_name_unless_allowed(tmp_path, form):
    tokenizer = ByteTokenizer()
    contents = ["a harmless row", human_eval()[53]["prompt"], *(problem["text"] for problem in mbpp()[:7])]
    rows = {
        "messages": map(chat, contents),
        "text": ({"text": text} for text in contents),
        "token_ids": ({"token_ids": tokenizer.encode(text)} for text in contents),
    }
    path = write_lines(tmp_path / "rows.jsonl", list(rows[form]))
    with pytest.raises(DataError) as caught:
        load(path, tokenizer=tokenizer)
    message = str(caught.value)
    assert str(path) in message
    assert "8 of 9 rows" in message
    assert "line 2: HumanEval/53 prompt; line 3: MBPP/1 prompt;" in message
    assert "and 3 more" in message
    assert "allow_benchmark_overlap" in message
    allowed = load(path, tokenizer=tokenizer, allow_benchmark_overlap=True)
    assert len(allowed.sequences) == 9
    assert len(load(path, tokenizer=tokenizer, samples=1).sequences) == 1  # only the rows used matter


def test_ids_that_no_tokenizer_can_decode_are_not_searched(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"token_ids": ByteTokenizer().encode(human_eval()[53]["prompt"])}])
    assert len(load_token_data(path, tokenizer=None, vocab_size=VOCABULARY, max_length=512).sequences) == 1


def test_rows_of_two_thousand_words_are_checked_quickly():
    find_benchmark("")
    words = [
        word
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-e]*.py"))
        for word in path.read_text(encoding="utf-8", errors="replace").split()
    ]
    starts = np.random.default_rng(0).integers(0, len(words) - 2000, 200)
    rows = [" ".join(words[start : start + 2000]) for start in starts]
    started = time.process_time()
    assert [find_benchmark(row) for row in rows] == [None] * 200
    assert time.process_time() - started < 10  # 0.2 s where it was written
