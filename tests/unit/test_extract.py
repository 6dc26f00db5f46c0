"""evaluation/extract.py: the code that an answer means, by a rule that is recorded."""

from __future__ import annotations

import ast
import time
from textwrap import indent

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


# --- the smallest repair --------------------------------------------------------------------------------------------

COUNT = "def f(xs):\n    n = 0\n    for x in xs:\n        n += x\n    return n"
BODY = "n = 0\nfor x in xs:\n    n += x\nreturn n\n"
COUNTS = 'def f(xs):\n    """The sum."""\n'
FENCES = ("```", "~~~", "````", "~~~~~")


def counts(answer: str, stub: str = COUNTS) -> str | None:
    """The rule by which the answer is found, None unless what is found is right."""
    found = extract(answer, "f", stub)
    names: dict = {}
    exec(compile(found.code or "", "<answer>", "exec", dont_inherit=True), names)
    assert names["f"]([2, 3]) == 5
    return found.rule


@pytest.mark.parametrize("stub", [COUNTS, ""])
@pytest.mark.parametrize("fence", FENCES)
def test_of_a_fence_behind_a_statement_only_the_fence_goes(fence, stub):
    opened = f"So:\n{fence}python\n{COUNT}{fence}"
    assert counts(opened, stub) == "fenced"
    assert counts(f"{opened}\nIt's the sum.\n", stub) == "fenced"
    assert counts(f"{opened}\nUse:\n{fenced('print(f([1]))', 'python', fence)}", stub) == "fenced"
    assert counts(f"{opened}\nUse:\n{fenced('print(f([1]))', '', fence)}", stub) == "fenced"
    assert counts(f"{fence}\n{DRAFT}{fence}\nThat's wrong.\n{fence}\n{COUNT}{fence}\nDone.", stub) == "fenced"
    assert counts(f"{COUNT}{fence}\nIt's the sum.\n", stub) == "embedded"


def test_a_fence_before_the_first_statement_takes_no_statement_along():
    for language in ("", "python ", "py ", "Python3 "):
        assert counts(f"So:\n```{language}{COUNT}\n```\nDone.", "") == "fenced"


@pytest.mark.parametrize("inside", ["# see ```", 's = "```"', 's = """\n    a```\n    """', "s = 'it```s'  # don't ```"])
def test_a_fence_in_a_string_or_a_comment_closes_nothing(inside):
    program = COUNT.replace("    n = 0", f"    {inside}\n    n = 0")
    assert extract(fenced(program), "f").code == program


@pytest.mark.parametrize("fence", FENCES)
def test_a_fence_behind_a_body(fence):
    assert counts(f"{fence}\n{indent(BODY, '    ').rstrip()}{fence}\nIt's so.") == "fenced_body"
    assert counts(f"{indent(BODY, '    ').rstrip()}{fence}\nIt's so.") == "body"


@pytest.mark.parametrize("prefix", ["", " ", "  ", "    ", "\t", "     "])
def test_what_is_indented_as_a_whole_is_no_body(prefix):
    program = indent("import math\n" + COUNT, prefix)
    assert counts(program) == "plain"
    assert counts(program.lstrip()) == "plain"
    assert counts(f"{prefix}import math\n{indent(COUNT, ' ' * 7)}") == "plain"
    assert counts(fenced(program)) == "fenced"
    assert counts(f"```\n{program}") == "cut_fence"
    assert counts(f"It's so:\n\n{program}\n\nThat's all (") == "embedded"


@pytest.mark.parametrize("unit", ["  ", "   ", "    ", "     ", "        ", "\t"])
@pytest.mark.parametrize("base", ["", " ", "  ", "   ", "     ", "\t"])
@pytest.mark.parametrize("first", [None, "", " ", "   ", "    ", "      ", "\t"])
def test_a_body_has_any_indentation_and_its_first_line_another(unit, base, first):
    """As long as its own lines agree; a first line may have lost some to a tokenizer or a strip."""
    body = indent(BODY.replace("    ", unit), base)
    if first is not None:
        body = first + body.lstrip()
    assert counts(body) in ("body", "plain")
    assert counts(fenced(body)) in ("fenced_body", "fenced")


def test_a_body_whose_tabs_stand_for_spaces():
    assert counts("    n = 0\n\tfor x in xs:\n\t\tn += x\n    return n") == "body"
    assert counts("        n = 0\n\tfor x in xs:\n\t    n += x\n        return n") == "body"


def test_of_the_readings_of_a_body_the_one_of_which_most_parses_is_taken():
    assert counts(f"    n = 0\n{indent(BODY[6:], '  ')}\nIt's so (") == "body"
    assert counts(f"    n = 0\n{BODY[6:]}") == "body"


@pytest.mark.parametrize(
    "program",
    [
        f"if True:\n{indent(COUNT, '    ')}",
        f"if not __debug__:\n    pass\nelif 1:\n{indent(COUNT, '    ')}\nelse:\n    f = None",
        f"try:\n    import absent\nexcept ImportError:\n{indent(COUNT, '    ')}",
        f"try:\n{indent(COUNT, '  ')}\nfinally:\n  pass",
        f"import contextlib\nwith contextlib.suppress(Exception):\n{indent(COUNT, '    ')}",
        f"for _ in [0]:\n{indent(COUNT, '    ')}",
        f"match 1:\n    case 1:\n{indent(COUNT, '        ')}",
        "from typing import Callable\nf: Callable[[list], int] = sum",
        "f, g = sum, max",
        "[g, f] = max, sum",
        "(f := sum)",
        "g = f = sum",
        "from builtins import sum as f",
        "from builtins import (\n    max,\n    sum as f,\n)",
        "class f:\n    def __new__(cls, xs):\n        return sum(xs)",
    ],
)
def test_all_that_gives_a_name_to_something_defines_it(program):
    for stub in (COUNTS, ""):
        assert counts(program, stub) == "plain"
        assert counts(fenced(program), stub) == "fenced"
        assert counts(indent(program, "    "), stub) == "plain"


def test_an_example_that_imports_the_function_is_not_its_definition():
    assert counts(f"{fenced(COUNT)}Use it:\n{fenced('from solution import f' + chr(10) + 'print(f([1]))')}") == "fenced"


@pytest.mark.parametrize("body", ["    f = 0\n    for x in xs:\n        f += x\n    return f", "f = sum(xs)\nreturn f"])
def test_a_variable_of_the_functions_name_does_not_make_a_body_a_program(body):
    assert counts(body) == "body"


@pytest.mark.parametrize(
    "name", ["def f(xs):\n    return 5 (", "class f:\n    x = 5 (", "async def f(xs):\n    return 5 ("]
)
@pytest.mark.parametrize("prefix", ["", "    "])
def test_a_body_does_not_define_the_entry_point(name, prefix):
    found = extract(indent(f"n = 1\n{name}", prefix), "f", COUNTS)
    assert found.rule in ("unparsable", "no_code")


METHOD = "class Solution:\n    def f(self, xs):\n        return sum(xs)"


@pytest.mark.parametrize("stub", [COUNTS, ""])
@pytest.mark.parametrize("answer", [METHOD, fenced(METHOD), f"So:\n\n{METHOD}\n\nIt's so (", indent(METHOD, "    ")])
def test_a_method_alone_is_told_from_no_code(answer, stub):
    found = extract(answer, "f", stub)
    assert (found.code, found.rule) == (None, "method")
    assert counts(f"{METHOD}\n\nf = Solution().f", stub) == "plain"


@pytest.mark.parametrize("mark", ["\ufeff", "\u200b", "\u2060"])
def test_what_cannot_be_seen_is_not_code(mark):
    for answer in (COUNT, fenced(COUNT), f"```\n{mark}{COUNT}\n```", COUNT.replace("n += x", f"n {mark}+= x")):
        assert counts(mark + answer) in ("plain", "fenced")
    assert counts(mark + indent(BODY, "    ")) == "body"
    assert split_text(f"{mark}<think>hm</think>{COUNT}").thought == "hm"


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2003"])
def test_spaces_that_python_refuses_are_spaces_where_the_program_does_not_parse_with_them(space):
    assert counts(COUNT.replace(" ", space)) == "plain"
    assert counts(f"It's so:\n\n{COUNT.replace('  ', space * 2)}\n\nThat's all (") == "embedded"
    assert counts(indent(BODY, "    ").replace("  ", space * 2)) == "body"
    kept = f"{COUNT}\nX = '{space}'"
    assert extract(kept, "f").code == kept


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
        st.sampled_from(
            [
                *(
                    "```",
                    "```python",
                    "~~~",
                    "def f(x):",
                    "    return x",
                    "x = (",
                    "[BEGIN]",
                    "é",
                    '"""',
                    "\t",
                    "\ufeff",
                    "it's",
                ),
                *(
                    "    return x```",
                    "class f:",
                    "  def f(self):",
                    "import f",
                    "if x:",
                    "try:",
                    "    f = 1",
                    "\tf: int = 2",
                ),
            ]
        )
    )
)
def test_any_answer_gives_code_that_parses_or_a_rule_that_says_why_not(lines):
    found = extract("\n".join(lines), "f", STUB)
    if found.code is not None and found.rule != "unparsable":
        assert any(
            "f" in (getattr(node, "name", ""), getattr(node, "id", "")) or getattr(node, "asname", "") == "f"
            for node in ast.walk(ast.parse(found.code))
        )


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
