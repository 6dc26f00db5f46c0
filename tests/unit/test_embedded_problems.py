"""tools/embedded/: generated functions do what their steps say, splits never meet, a seed gives the same bytes."""

from __future__ import annotations

import json
import random
import re

import pytest

from tools.embedded import problems as made
from tools.embedded.chats import THINKS_FROM, answer, chat
from tools.embedded.steps import BY_NAME, STEPS

EXAMPLES = {
    "list": [3, -4, 12, 3],
    "words": ["Moon", "ice"],
    "text": "Kite 43 dog",
    "number": 27,
    "counts": {"a": 2, "b": 1},
}
GIVES = {"list": list, "words": list, "text": str, "number": int, "counts": dict, "truth": bool}
FIELDS = {"n": 3, "m": 9, "k": 3, "a": "a", "b": "e", "p": "-"}


def drawn(split: str, count: int, seed: int = 3) -> list[made.Function]:
    rng = random.Random(seed)
    return [made.draw(rng, split) for _ in range(count)]


def pattern_of(phrase: str) -> str:
    """Matches the phrase with whatever numbers are filled in; a number that stands twice is the same."""
    pattern = re.escape(phrase)
    for name in set(re.findall(r"{(\w)}", phrase)):
        place = re.escape("{" + name + "}")
        pattern = pattern.replace(place, f"(?P<{name}>.+?)", 1).replace(place, f"(?P={name})")
    return pattern


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_gives_the_kind_it_says_and_its_phrases_tell_every_number_in_its_code(step):
    code = step.code.format(v="value", out="out", **FIELDS)
    names = {"value": EXAMPLES[step.takes]}
    exec(code if step.is_block else f"out = {code}", names)
    assert type(names["out"]) is GIVES[step.gives]
    used = set(re.findall(r"(?<!{){(\w)}", step.code)) - {"v"}
    for phrase in step.phrases:
        assert set(re.findall(r"{(\w)}", phrase)) == used


def test_two_steps_never_share_a_name_a_code_or_a_phrase_for_one_kind_of_value():
    assert len(BY_NAME) == len(STEPS)
    assert len({(step.takes, step.code) for step in STEPS}) == len(STEPS)
    phrases = [(step.takes, phrase) for step in STEPS for phrase in step.phrases]
    assert len(set(phrases)) == len(phrases)


def test_a_function_is_its_steps_one_after_the_other():
    """Computed step by step from the table, with the numbers read off the plan, in place of running the body."""
    checked = 0
    for function in drawn("train", 300):
        if function.second:
            continue
        value = start = EXAMPLES[function.kind]
        try:
            for name, said in zip(function.steps, function.plan, strict=True):
                step = BY_NAME[name]
                fields = {**FIELDS, **re.fullmatch(pattern_of(step.phrases[0]), said).groupdict()}
                names = {"value": value}
                code = step.code.format(v="value", out="out", **fields)
                exec(code if step.is_block else f"out = {code}", names)
                value = names["out"]
        except (ValueError, IndexError):
            continue
        assert function(start) == value, function.body
        checked += 1
    assert checked > 150


def test_lettered_steps_read_in_the_given_order_are_the_steps_told_plainly():
    shuffled = 0
    for function in drawn("train", 300):
        listed = re.findall(r"\((\w)\) (.+?)(?=; \(|\. Order)", function.docstring)
        if not listed:
            continue
        order = re.search(r"Order: ([a-e, ]+)\.", function.docstring)[1].split(", ")
        told = [dict(listed)[letter] for letter in order]
        for name, said in zip(function.steps, told, strict=True):
            assert any(re.fullmatch(pattern_of(phrase), said) for phrase in BY_NAME[name].phrases), (name, said)
        shuffled += order != sorted(order)
    assert shuffled > 50


def test_splits_share_no_combination_and_a_hash_alone_decides():
    combinations = {split: {function.steps for function in drawn(split, 400)} for split in made.SPLITS}
    assert not combinations["train"] & (combinations["test"] | combinations["validation"])
    assert not combinations["test"] & combinations["validation"]
    assert made.split_of(("reverse",)) == "train"


def test_asserts_accept_the_solution_and_refuse_it_without_one_of_its_steps():
    refused = 0
    for function in drawn("test", 60):
        check = made._asserts(random.Random(1), function)
        if check is None:  # two of its steps undo each other
            continue
        names = {}
        exec(f"{function.signature}\n{function.body}\n{check}check({function.name})", names)
        lines = function.body.splitlines(keepends=True)
        for index, line in enumerate(lines[:-1]):
            if line.startswith(f"    {function.argument} = "):
                body = "".join(lines[:index] + lines[index + 1 :])
                with pytest.raises(Exception):  # noqa: B017, PT011 (an assert, or what the wrong value breaks)
                    exec(f"{function.signature}\n{body}\n{check}check({function.name})", {})
                refused += 1
    assert refused > 10


def test_problems_are_the_same_for_a_seed_distinct_and_as_many_of_each_length_as_wanted():
    counts = {2: 4, 3: 5}
    rows = list(made.problems(5, "test", counts, "Mini"))
    assert json.dumps(rows) == json.dumps(list(made.problems(5, "test", counts, "Mini")))
    assert rows != list(made.problems(6, "test", counts, "Mini"))
    assert len({tuple(row["steps"]) for row in rows}) == 9
    assert sorted(len(row["steps"]) for row in rows) == [2] * 4 + [3] * 5
    assert [row["task_id"] for row in rows] == [f"Mini/{number}" for number in range(9)]


def test_so_many_problems_of_each_length_are_lettered():
    rows = made.problems(5, "test", {2: 8, 4: 4}, "Mini", lettered=0.25)
    lettered = [len(row["steps"]) for row in rows if re.search(r"Order: \w, ", row["prompt"])]
    assert sorted(lettered) == [2, 2, 4]


def test_a_mode_decides_whether_a_chat_thinks_and_the_thought_is_the_plan():
    rng = random.Random(2)
    for function in drawn("train", 60):
        plan = "\n".join(f"{number}. {each}" for number, each in enumerate(function.plan, 1))
        thought = f"[unused16]{plan}[unused17]"
        assert answer(function, "slow_think").startswith(thought)
        assert answer(function, "auto_think").startswith(thought) == (len(function.steps) >= THINKS_FROM)
        assert answer(function, "no_think").startswith("```python\ndef ")
    for row in (chat(rng, "train") for _ in range(60)):
        user, said = row["messages"][1]["content"], row["messages"][2]["content"]
        suffix = {"slow_think": "", "auto_think": " /auto_think", "no_think": " /no_think"}[row["mode"]]
        assert user.endswith(suffix)
        assert row["text"] == f"{row['prompt']}{said}[unused10]"


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split: got 'dev', wanted one of train, validation, test"):
        made.draw(random.Random(0), "dev")
