"""chats/: who is asked what, what is dropped, and that a run that was killed ends in the bytes of an undisturbed one.

The model is a fake whose answers depend on its whole batch, as a float network's last bits do.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ms_pangu_quant.calibration.data import load_token_data
from ms_pangu_quant.chats import job
from ms_pangu_quant.chats.facts import facts_of, origin_of, told
from ms_pangu_quant.chats.job import CalibrationRequest, calibrate, fault, prepare
from ms_pangu_quant.chats.prompts import SHIPPED, Asked, Prompt, load_prompts, prompts_of
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, Tokenizer
from ms_pangu_quant.errors import CheckpointError, DataError, OutputError, PanguQuantError, RequestError
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.inference.model import Generation
from ms_pangu_quant.job import ranks
from tests.conftest import MINI

KINDS = ("write", "mend", "explain", "test", "mathematics", "instructions", "dialogue")
END = 4  # of the embedded tokenizer


class Killed(BaseException):
    pass


class FakeModel:
    """Answers with the numbers of a draw, in an order of its own; one in eight loops. After `left` answers it is killed."""

    def __init__(self, left=10**9):
        self.left, self.asked, self.batches = left, 0, []

    def stream(self, prompts, settings, *, streams, max_batch, on_tokens):
        tokenizer = Tokenizer(MINI)
        self.batches.append(len(prompts))
        for index in np.random.default_rng(len(prompts)).permutation(len(prompts)):
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.asked += 1
            draw = np.random.default_rng([settings.seed, streams[index], max_batch, *streams]).integers(1 << 40)
            on_tokens(4)
            said = "go " * 40 if draw % 8 == 0 else f"```\nx = {draw}\n```\nIt is {draw}."
            ids = tuple(tokenizer.encode(f"[unused16]{draw}[unused17]{said}")[1:])
            thought = tokenizer.split_thought(ids)
            yield (
                int(index),
                Generation(
                    tokenizer.decode(ids), str(draw), said, ids, len(prompts[index]), "eos", True,
                    len(thought.thought), END,
                ),
            )  # fmt: skip


@pytest.fixture
def answering(monkeypatch):
    """A model -> it is what requests load."""

    def use(model):
        @contextmanager
        def loaded(prepared):
            yield model

        monkeypatch.setattr(job, "_model", loaded)
        return model

    return use


REQUEST = CalibrationRequest(MINI, SHIPPED, samples=40, batch_size=2)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_the_shipped_prompts_are_three_hundred_of_seven_kinds_in_two_languages_and_hold_no_benchmark():
    """load_prompts searches for every benchmark's problems; the embedded checkpoint's own tests are looked for here."""
    prompts = load_prompts(SHIPPED).all
    assert len(prompts) >= 300
    counts = Counter((prompt.kind, prompt.language) for prompt in prompts)
    assert set(counts) == {(kind, language) for kind in KINDS for language in ("en", "zh")}
    assert min(counts.values()) >= 15
    texts = ["\n".join(message["content"] for message in prompt.messages) for prompt in prompts]
    assert len(set(texts)) == len(texts)
    held_out = [
        problem.statement.text
        for name in ("mini", "mini_validation")
        for problem in load_problems(TASKS[name]).by_id.values()
    ]
    docstrings = {text.partition('"""')[2].partition("\n")[0] for text in held_out}
    assert len(docstrings) > 300
    assert not [text for text in texts for docstring in docstrings if docstring in text]


def test_a_checkpoint_is_asked_its_own_prompts_where_its_folder_has_some(tmp_path):
    assert prompts_of(MINI) == MINI / "prompts.jsonl"
    assert prompts_of(tmp_path) == SHIPPED
    assert prepare(CalibrationRequest(MINI)).prompts == load_prompts(MINI / "prompts.jsonl")
    assert prepare(CalibrationRequest(MINI, SHIPPED)).prompts == load_prompts(SHIPPED)


def test_prompts_of_a_benchmark_are_refused_by_line(tmp_path):
    statement = load_problems(TASKS["humaneval"]).by_id["HumanEval/7"].statement.text
    rows = [{"prompt": "Say something."}, {"prompt": f"Please do this:\n{statement}"}]
    with pytest.raises(DataError, match=r"1 of 2 prompts .*line 2: HumanEval/7 prompt"):
        load_prompts(written(tmp_path / "prompts.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "line 1: got keys 'text', wanted 'prompt'"),
        ({"prompt": "a", "messages": []}, "line 1: got both"),
        ({"prompt": " "}, "line 1: wanted something that the user says"),
        ({"prompt": 3}, "line 1: messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "line 1: wanted something",
        ),
        ({"prompt": "a", "kind": 3}, "line 1: kind: got 3"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(row, said, tmp_path):
    with pytest.raises(DataError, match=said):
        load_prompts(written(tmp_path / "prompts.jsonl", [row]))


def test_every_mode_meets_every_kind_and_languages_are_spread_evenly():
    asked = Asked(load_prompts(SHIPPED).all, THINKING_MODES, 150, seed=0)
    counts = Counter(asked.places)
    assert len(counts) == 3 * len(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    questions = asked.fill(range(150))
    assert len({question.prompt.number for question in questions}) == 150
    assert 0.35 < np.mean([question.prompt.language == "zh" for question in questions]) < 0.5
    again = Asked(load_prompts(SHIPPED).all, THINKING_MODES, 150, seed=0).fill(range(150))
    other = Asked(load_prompts(SHIPPED).all, THINKING_MODES, 150, seed=1).fill(range(150))
    assert questions == again != other


def test_a_prompt_that_comes_again_has_another_draw():
    prompts = [Prompt(number, "write", "en", ({"role": "user", "content": str(number)},)) for number in range(3)]
    questions = Asked(prompts, ["no_think"], 7, seed=0).fill(range(7))
    assert len({question.stream for question in questions}) == 7
    assert sorted(question.draw for question in questions) == [0, 0, 0, 1, 1, 1, 2]


# --- answers --------------------------------------------------------------------------------------------------------


def test_rows_are_the_generated_ids_which_the_loader_takes_as_they_are(answering, tmp_path):
    answering(FakeModel())
    made = calibrate(REQUEST, tmp_path / "chats.jsonl")
    rows = read(made.output)
    tokenizer = Tokenizer(MINI)
    data = load_token_data(made.output, tokenizer=tokenizer, vocab_size=1024, max_length=512)
    assert [ids.tolist() for ids in data.sequences] == [row["token_ids"] for row in rows]
    for row in rows:
        *asked, answered = row["messages"]
        prompt = tokenizer.encode_chat(asked)  # the mode's suffix is in it
        assert row["token_ids"][: row["prompt_tokens"]] == prompt
        assert row["token_ids"][-1] == END
        whole = tokenizer.encode_chat(row["messages"], add_generation_prompt=False)
        assert tokenizer.decode(row["token_ids"]) == tokenizer.decode(whole)
        assert answered["content"].startswith("[unused16]")
    assert Counter(row["mode"] for row in rows).keys() == set(THINKING_MODES)


def test_what_is_dropped_is_counted_and_replaced_by_another_prompt(answering, tmp_path):
    model = answering(FakeModel())
    seen = []
    facts = calibrate(REQUEST, tmp_path / "chats.jsonl", on_begin=seen.append, on_row=lambda: seen.append("row")).facts
    assert facts["rows"] == 40
    assert facts["dropped"]["loop"] == model.asked - 40 > 0
    assert seen == [40, *["row"] * 40]
    assert sum(mode["rows"] for mode in facts["modes"].values()) == 40
    assert sum(facts["kinds"].values()) == 40
    assert 0.3 < facts["code"] < 0.9
    assert f"dropped: loop {model.asked - 40}" in told(facts)


def test_an_answer_that_loops_breaks_off_its_thought_or_says_nothing_is_of_no_use():
    good = Generation("[unused16]a[unused17]b", "a", "b", (1, 2, 3), 5, "eos")
    problem = load_problems(TASKS["mbpp"]).by_id
    benchmark = next(iter(problem.values())).statement.text
    assert fault(good, "b") is None
    assert fault(replace(good, finish_reason="length"), "b") is None
    assert fault(replace(good, token_ids=(7, 8) * 20), "b") == "loop"
    assert fault(replace(good, thought_closed=False, answer=""), "b") == "unfinished thought"
    assert fault(replace(good, answer=" \n"), "b") == "empty"
    assert fault(good, f"Here is one more: {benchmark}") == "benchmark"


@pytest.mark.parametrize("left", [0, 1, 13, 39, 44])
def test_a_run_that_was_killed_goes_on_to_the_bytes_of_an_undisturbed_one(left, answering, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    first = answering(FakeModel())
    calibrate(REQUEST, whole)
    answering(FakeModel(left))
    with pytest.raises(Killed):
        calibrate(REQUEST, stopped)
    last = answering(FakeModel())
    rows = []
    calibrate(REQUEST, stopped, resume=True, on_row=lambda: rows.append(1))
    for suffix in (".jsonl", ".json"):
        assert stopped.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert last.asked <= first.asked - left + job.GROUP * REQUEST.batch_size
    assert len(rows) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stopped.json",
        "stopped.jsonl",
        "whole.json",
        "whole.jsonl",
    ]


def test_a_run_that_was_killed_between_its_two_files_is_completed(answering, tmp_path, monkeypatch):
    answering(FakeModel())
    output = tmp_path / "chats.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_json", kill)
        with pytest.raises(Killed):
            calibrate(REQUEST, output)
    made = calibrate(REQUEST, output, resume=True)
    assert origin_of(output) == made.facts
    assert calibrate(REQUEST, output, resume=True).was_complete


def test_an_output_of_another_run_is_left_as_it_is(answering, tmp_path):
    answering(FakeModel(5))
    output = tmp_path / "chats.jsonl"
    with pytest.raises(Killed):
        calibrate(REQUEST, output)
    answering(FakeModel())
    with pytest.raises(OutputError, match="holds an unfinished run; continue it with --resume"):
        calibrate(REQUEST, output)
    for other in (replace(REQUEST, seed=1), replace(REQUEST, temperature=0.5), replace(REQUEST, batch_size=3)):
        with pytest.raises(OutputError, match="was begun with another checkpoint, prompts or settings"):
            calibrate(other, output, resume=True)
    calibrate(REQUEST, output, resume=True)
    with pytest.raises(OutputError, match="is there already"):
        calibrate(REQUEST, output)
    with pytest.raises(OutputError, match="is of another run"):
        calibrate(replace(REQUEST, seed=1), output, resume=True)
    output.write_bytes(output.read_bytes() + b"\n")
    assert origin_of(output) is None
    with pytest.raises(OutputError, match="was changed since"):
        calibrate(REQUEST, output, resume=True)
    with pytest.raises(OutputError, match=r"wanted the name of a \.jsonl file"):
        calibrate(REQUEST, tmp_path / "chats.json")


def test_nothing_is_left_where_no_answer_is_of_use_or_nothing_could_be_asked(answering, tmp_path):
    class Looping(FakeModel):
        def stream(self, prompts, settings, **more):
            for index, generation in super().stream(prompts, settings, **more):
                yield index, replace(generation, token_ids=(7, 8) * 20)

    answering(Looping())
    with pytest.raises(DataError, match=r"not one of 120 answers is of use \(loop 120\)"):
        calibrate(REQUEST, tmp_path / "new" / "chats.jsonl")
    answering(FakeModel(0))
    with pytest.raises(Killed):
        calibrate(REQUEST, tmp_path / "new" / "chats.jsonl")
    long = [{"prompt": "word " * 600}]
    with pytest.raises(DataError, match="longer than the model's max_position_embeddings 512"):
        calibrate(replace(REQUEST, prompts=written(tmp_path / "long.jsonl", long)), tmp_path / "chats.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"]


# --- how it is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "asked", "drawn"),
    [
        ({}, {}, (1.0, 1.0, 0)),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": -1}, {}, (0.7, 0.8, 0)),
        ({"temperature": 0.7, "top_k": 20}, {"temperature": 0.2, "top_k": 0}, (0.2, 1.0, 0)),
    ],
)
def test_answers_are_drawn_as_the_checkpoint_says(own, asked, drawn, tmp_path):
    checkpoint = shutil.copytree(MINI, tmp_path / "checkpoint", copy_function=shutil.copyfile)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": END, **own}))
    settings = prepare(CalibrationRequest(checkpoint, **asked)).settings
    assert (settings.temperature, settings.top_p, settings.top_k) == drawn


def test_requests_that_make_no_sense_are_refused(tmp_path, monkeypatch):
    for wrong in ({"samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(RequestError):
            CalibrationRequest(MINI, **wrong)
    with pytest.raises(RequestError, match="thinking mode 'slow' is unknown"):
        prepare(CalibrationRequest(MINI, modes=["slow"]))
    with pytest.raises(RequestError, match="modes: got none"):
        prepare(CalibrationRequest(MINI, modes=[]))
    checkpoint = shutil.copytree(MINI, tmp_path / "checkpoint", copy_function=shutil.copyfile)
    for value, said in (
        ("warm", "temperature: got 'warm', wanted a number"),
        (-2, "temperature: got -2, wanted a number of"),
    ):
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "temperature": value}))
        with pytest.raises(CheckpointError, match=said):
            prepare(CalibrationRequest(checkpoint))
    monkeypatch.setattr(ranks, "in_job", lambda: True)
    with pytest.raises(RequestError, match="one process answers; start it without msrun"):
        prepare(REQUEST)


def test_a_batch_that_the_memory_does_not_hold_is_refused(tmp_path):
    with pytest.raises(PanguQuantError, match=r"batch_size 100000000: answers of up to 512 tokens take a cache of .*lower"):
        calibrate(replace(REQUEST, batch_size=100_000_000), tmp_path / "chats.jsonl")
    assert not any(tmp_path.iterdir())


def test_figures_of_a_file_are_those_of_its_rows():
    row = {
        "token_ids": [1, 2, 3], "messages": [{"role": "assistant", "content": "[unused16]t[unused17]a\n```\nxy\n```"}],
        "mode": "slow_think", "kind": "write", "language": "en", "thought_tokens": 1, "finish_reason": "length",
    }  # fmt: skip
    facts = facts_of([row, {**row, "mode": "no_think", "language": "zh"}], ["loop", "loop", "empty"], 1, 3)
    assert (facts["rows"], facts["wanted"], facts["tokens"], facts["cut"]) == (2, 3, 6, 2)
    assert facts["modes"]["slow_think"] == {"rows": 1, "tokens": 3, "thought_tokens": 1}
    assert facts["languages"] == {"en": 1, "zh": 1}
    assert facts["dropped"] == {"loop": 2, "empty": 1}
    assert facts["code"] == round(2 / len("a\n```\nxy\n```"), 3)
    assert told(facts).startswith(
        "2 of 3 rows of 6 tokens: slow_think 1 of 3 (1 thought), no_think 1 of 3 (1 thought); prompts: "
    )


def kill(*_):
    raise Killed


def written(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
