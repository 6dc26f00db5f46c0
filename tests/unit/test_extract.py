"""evaluation/extract.py: the code that an answer means, by a rule that is recorded."""

from __future__ import annotations

import ast
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_pangu_quant.evaluation.extract import extract, split_text

STUB = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """Add one.\n    >>> f(1)\n    2\n    """\n'
GOOD = "def f(x):\n    return x + 1"
DRAFT = "def f(x):\n    return x"


def fenced(code: str, info: str = "python", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}\n{fence}\n"


ANSWERS = {  # answer -> (rule, a line the code must have)
    "the whole answer": (GOOD, "plain", "return x + 1"),
    "a docstring with a fence": (
        'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x + 1',
        "plain",
        "x + 1",
    ),
    "one block": (f"Here you are:\n{fenced(GOOD)}Enjoy.", "fenced", "x + 1"),
    "draft, final, usage": (
        f"{fenced(DRAFT)}That is wrong. Final:\n{fenced(GOOD)}Usage:\n{fenced('print(f(1))')}",
        "fenced",
        "x + 1",
    ),
    "a last block that does not parse": (f"{fenced(GOOD)}Output:\n{fenced('def f(x) gives 2', '')}", "fenced", "x + 1"),
    "tildes and no language": (f"Text\n{fenced(GOOD, '', '~~~~')}", "fenced", "x + 1"),
    "a block in a list": ("1. So:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n", "fenced", "x + 1"),
    "a fence inside a longer one": (f"````\n{GOOD}\ns = '''\n```\n'''\n````\n", "fenced", "x + 1"),
    "windows line ends": (f"Text\r\n{fenced(GOOD)}".replace("\n", "\r\n"), "fenced", "x + 1"),
    "an assigned lambda": (fenced("f = lambda x: x + 1"), "fenced", "x + 1"),
    "a body in a block": (f"Sure.\n{fenced('    return x + 1')}", "fenced_body", "x + 1"),
    "a body whose indentation was stripped": (f"Sure.\n{fenced('return x + 1')}", "fenced_body", "x + 1"),
    "a body of which the first line was stripped": (
        f"Sure.\n{fenced('y = x' + chr(10) + '    return y + 1')}",
        "fenced_body",
        "return y + 1",
    ),
    "begin and done": (f"[BEGIN]\n{GOOD}\n[DONE]\nAnd more text.", "begin_done", "x + 1"),
    "done alone": (f"{GOOD}\n[DONE]\n", "begin_done", "x + 1"),
    "a completion": ("    return x + 1\n", "body", "x + 1"),
    "a completion that runs on": ("    return x + 1\n\n\nprint(f(1)\nmore text", "body", "x + 1"),
    "a completion and a fence": ("    return x + 1\n```\nThat adds one.", "body", "x + 1"),
    "a cut block": (f"{fenced(DRAFT)}Better:\n```python\n{GOOD}\n\nprint(f(", "fenced", "return x"),
    "only a cut block": (f"Text\n```python\n{GOOD}\n\nprint(f(", "cut_fence", "x + 1"),
    "prose around code": (f"The function is\n\nimport math\n{GOOD}\n\nIt adds one.", "embedded", "import math"),
    "code that does not parse": ("def f(x)\n    return x", "unparsable", "def f(x)"),
    "a block that does not parse": (f"So:\n{fenced('def f(x)' + chr(10) + '    return x')}", "unparsable", "def f(x)"),
    "a zero byte": (GOOD + "\n\0", "unparsable", "def f(x)"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_rule_that_fires_and_the_code_it_finds(name):
    answer, rule, line = ANSWERS[name]
    found = extract(answer, "f", STUB)
    assert found.rule == rule
    assert line in found.code
    assert "That is wrong" not in found.code


@pytest.mark.parametrize("answer", ["", "I do not know.", fenced("print(1)"), "def g(x):\n    return 1\n", "```", "\ud800"])
def test_an_answer_without_the_function_has_no_code(answer):
    found = extract(answer, "f")
    assert (found.code, found.rule) == (None, "no_code")


def test_an_unclosed_thought_is_no_answer_whatever_it_holds():
    assert extract(fenced(GOOD), "f", closed=False).rule == "unclosed_thought"


@pytest.mark.parametrize(
    ("text", "thought", "answer", "closed"),
    [
        ("[unused16]hm[unused17]answer[unused10]", "hm", "answer", True),
        ("hm[unused17]answer", "hm", "answer", True),
        ("[unused16]hm", "hm", "", False),
        ("<think>\nhm</think>answer", "\nhm", "answer", True),
        ("hm</think>answer", "hm", "answer", True),
        ("<think>hm", "hm", "", False),
        ("answer with <think> in it", None, "answer with <think> in it", True),
        ("a[unused17]b[unused17]c", "a", "b[unused17]c", True),
        ("answer[unused10]rest", None, "answer", True),
    ],
)
def test_raw_text_is_cut_at_the_first_end_of_the_thought(text, thought, answer, closed):
    found = split_text(text)
    assert (found.thought, found.answer, found.closed) == (thought, answer, closed)


ABOVE = ("N = 2", "TABLE: dict = {\n    1: 2,\n}", "# a comment\nM = [\n  1]", "import math", "def g():\n    return 1", "")


@settings(max_examples=200, deadline=None)
@given(above=st.lists(st.sampled_from(ABOVE)), prose=st.sampled_from(["So x = 1, say:\n", "As you asked\n\n", ""]))
def test_code_between_prose_is_found_with_all_that_stands_above_it(above, prose):
    program = "\n".join([*above, GOOD])
    found = extract(f"{prose}{program}\n\nIt adds one.", "f", STUB)
    assert found.rule == "embedded"
    assert ast.dump(ast.parse(found.code)) == ast.dump(ast.parse(program))


def test_an_example_above_the_code_is_not_a_part_of_it():
    assert extract(f"For example\ny = f(1)\n\n{GOOD}\n\nIt adds one.", "f", STUB).code.strip() == GOOD


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["```", "```python", "~~~", "def f(x):", "    return x", "x = (", "[BEGIN]", "é", '"""', "\t"])
    )
)
def test_any_answer_gives_code_that_parses_or_a_rule_that_says_why_not(lines):
    found = extract("\n".join(lines), "f", STUB)
    if found.code is not None and found.rule != "unparsable":
        assert any(getattr(node, "name", "") == "f" for node in ast.parse(found.code).body)


@pytest.mark.parametrize(
    "answer",
    [
        "\n".join(f"So we think about line {i}, and ```maybe``` x = {i} (" for i in range(800)) + "\n" + fenced(GOOD),
        "\n".join(f"x{i} = [{i}," for i in range(800)),
        GOOD + "\n" + "\n".join(f"y = {i}" for i in range(400)) + "\nand so on (\n" * 400,
        fenced(DRAFT) * 200,
        "[BEGIN]\n" * 800,
    ],
)
def test_an_answer_of_800_lines_does_not_take_for_ever(answer):
    started = time.process_time()
    extract(answer, "f", STUB)
    assert time.process_time() - started < 5  # hundredths; parsing from every line to every other takes minutes
