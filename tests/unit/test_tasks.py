"""evaluation/tasks and prompts: the shipped benchmarks are the pinned ones, their solutions pass, changed ones do not."""

from __future__ import annotations

import ast
import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_pangu_quant.errors import DataError, RequestError
from ms_pangu_quant.evaluation.prompts import PROMPTS
from ms_pangu_quant.evaluation.sandbox import RLIMITS, Sandbox, find_isolation
from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.evaluation.tasks.task import find_problem, load_problems
from ms_pangu_quant.evaluation.verdict import Outcome

SIZES = {
    "humaneval": 164,
    "mbpp": 257,
    "mbpp_sanitized": 427,
    "mbpp_test": 500,
    "mbpp_full": 974,
    "humaneval_plus": 164,
    "mbpp_plus": 378,
    "mini": 300,
    "mini_validation": 200,
}
JUDGED = ["humaneval", "mbpp", "mbpp_full", "mini", "mini_validation"]  # the others are parts of these, or take long


@pytest.fixture(scope="module")
def judges():
    with Sandbox(find_isolation(RLIMITS)) as judging:
        yield judging


def outcomes(judges, task: str, change=lambda source, entry_point: source, step: int = 1) -> dict[str, Outcome]:
    problems = [*load_problems(TASKS[task]).by_id.values()][::step]
    programs = [(each.task_id, each.program(change(each.reference, each.entry_point))) for each in problems]
    return dict(judges.judge_all(programs))


def returning_something_else(source: str, entry_point: str) -> str:
    """The solution, with its result wrapped; nothing that a test compares equals it."""
    return f"{source}\n_solution = {entry_point}\ndef {entry_point}(*a, **k):\n    return ['mutated', _solution(*a, **k)]\n"


def first_statement_returns_none(source: str, entry_point: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            node.body.insert(0, ast.parse("return None").body[0])
    return ast.unparse(tree)


def not_passed(found: dict[str, Outcome]) -> dict[str, Outcome]:
    return {task_id: outcome for task_id, outcome in found.items() if outcome.verdict != "pass"}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_holds_so_many_problems(task):
    assert len(load_problems(TASKS[task]).by_id) == SIZES[task]


@pytest.mark.parametrize("task", JUDGED)
def test_a_sample_of_the_solutions_passes_and_none_does_when_it_is_changed(judges, task):
    assert not_passed(outcomes(judges, task, step=12)) == {}
    assert len(not_passed(outcomes(judges, task, returning_something_else, step=12))) == len(range(0, SIZES[task], 12))


def test_a_sample_of_the_plus_solutions_passes(judges):
    assert not_passed(outcomes(judges, "humaneval_plus", step=60)) == {}
    assert not_passed(outcomes(judges, "mbpp_plus", step=60)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if not task.endswith("_plus")])
def test_every_solution_passes_and_every_changed_one_fails(judges, task):
    assert not_passed(outcomes(judges, task)) == {}
    assert len(not_passed(outcomes(judges, task, returning_something_else))) == SIZES[task]


@pytest.mark.slow
@pytest.mark.parametrize("task", JUDGED)
def test_a_function_that_returns_nothing_passes_nowhere(judges, task):
    found = outcomes(judges, task, first_statement_returns_none)
    assert [task_id for task_id, outcome in found.items() if outcome.verdict == "pass"] == []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["humaneval_plus", "mbpp_plus"])
def test_every_plus_solution_passes(judges, task):
    assert not_passed(outcomes(judges, task)) == {}


def test_the_problems_that_need_the_solutions_classes_are_judged_in_its_process_and_no_others():
    for task in TASKS:
        beside = {each.task_id for each in load_problems(TASKS[task]).by_id.values() if each.program("").in_process}
        wanted = {"MBPP/367", "MBPP/601", "MBPP/927"} & set(load_problems(TASKS[task]).by_id)
        assert beside == (wanted if task.startswith("mbpp") and task != "mbpp_plus" else set())


def test_set_up_that_uses_the_solutions_class_runs_after_it(judges):
    problem = load_problems(TASKS["mbpp_full"]).by_id["MBPP/367"]
    assert judges.judge(problem.program(problem.reference)).verdict == "pass"
    source = problem.program("CODE").source
    assert source.index("CODE") < source.index("root = Node(1)")


def test_an_answer_may_leave_out_what_the_prompt_defines(judges):
    """HumanEval/38's test calls a helper of the prompt; the answer has neither it nor the imports."""
    for task_id in ("HumanEval/32", "HumanEval/38", "HumanEval/50", "HumanEval/0"):
        problem = load_problems(TASKS["humaneval"]).by_id[task_id]
        body = problem.row["canonical_solution"]
        signature = problem.row["prompt"].rpartition(f"def {problem.entry_point}")[2].partition('"""')[0]
        code = f"def {problem.entry_point}{signature}pass\n{body}" if task_id != "HumanEval/0" else problem.reference
        code = code.replace("from typing import List\n", "")
        assert judges.judge(problem.program(code)).verdict == "pass", task_id


def test_a_helper_of_the_prompt_cannot_be_replaced_by_the_answer(judges):
    """HumanEval/32's test checks a root with the prompt's poly; an answer with its own poly finds none."""
    problem = load_problems(TASKS["humaneval"]).by_id["HumanEval/32"]
    code = "def poly(xs, x):\n    return 0.0\ndef find_zero(xs):\n    return 0.123\n"
    assert judges.judge(problem.program(code)).verdict == "wrong_answer"


@pytest.mark.parametrize(
    "prompt", ["def f(x):\n", "from typing import List\n\ndef f(x: List) -> int:\n    # add\n", "Write f."]
)
def test_your_own_prompt_may_be_a_bare_signature_or_prose(judges, prompt, tmp_path):
    own = tmp_path / "own.jsonl"
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    own.write_text(json.dumps({"task_id": "own", "prompt": prompt, "entry_point": "f", "test": test}))
    problem = load_problems(TASKS["mini"], own).by_id["own"]
    assert judges.judge(problem.program("def f(x):\n    return x + 1\n")).verdict == "pass"
    assert judges.judge(problem.program("def f(x):\n    return x\n")).verdict == "wrong_answer"


SPELLINGS = {
    "mbpp": ("MBPP/11", "Mbpp/11", "mbpp/11", "mbpp_11", "MBPP-11", "MbppPlus/11", "mbpp+/11", "11", 11, " 11", "Mbpp/011"),
    "humaneval": (
        "HumanEval/11",
        "humaneval/11",
        "HUMANEVAL/11",
        "human_eval/11",
        "Human-Eval/11",
        "HumanEval+/11",
        "11",
        11,
    ),
}
SPELLINGS |= {"mbpp_plus": SPELLINGS["mbpp"], "mbpp_full": SPELLINGS["mbpp"], "humaneval_plus": SPELLINGS["humaneval"]}


@pytest.mark.parametrize("task", SPELLINGS)
def test_a_problem_is_found_by_its_number_and_its_benchmarks_name_however_spelt(task):
    problems = load_problems(TASKS[task])
    number = "HumanEval/11" if "humaneval" in task else TASKS[task].prefix + "11"
    if number in problems.by_id:
        assert {find_problem(problems, given).task_id for given in SPELLINGS[task]} == {number}
    others = SPELLINGS["humaneval" if "mbpp" in task else "mbpp"]
    strange = (
        "Mini/11",
        "11/HumanEval",
        "own/11",
        "/11",
        "x11",
        "-11",
        "",
        99999,
        True,
        11.0,
        "1" * 5000,
        "LiveCodeBench/11",
    )
    for strange_id in (*(other for other in others if not str(other).strip().isdecimal()), *strange):
        assert find_problem(problems, strange_id) is None, strange_id


def test_own_problems_keep_ids_of_other_benchmarks_apart(tmp_path):
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1) == 2\n"}
    own = tmp_path / "own.jsonl"
    ids = (11, "humaneval/12", "Mbpp/11", "mine/11", "mine", "Mine_7")
    own.write_text("".join(json.dumps({"task_id": each, **row}) + "\n" for each in ids))
    problems = load_problems(TASKS["humaneval"], own)
    assert [*problems.by_id] == ["HumanEval/11", "HumanEval/12", "Mbpp/11", "mine/11", "HumanEval/mine", "HumanEval/Mine_7"]
    assert [find_problem(problems, each).task_id for each in ids] == [*problems.by_id]
    assert find_problem(problems, "MBPP/12") is find_problem(problems, "theirs/12") is None
    own.write_text("".join(json.dumps({"task_id": each, **row}) + "\n" for each in ("HumanEval/1", 1)))
    with pytest.raises(DataError, match="task_id HumanEval/1 is there twice"):
        load_problems(TASKS["humaneval"], own)


def test_own_problems_may_have_names_where_a_benchmark_has_numbers(tmp_path):
    row = {"task_id": "own", "text": "Add.", "code": "def f(x):\n    return x\n", "test_list": ["assert f(1) == 1"]}
    (tmp_path / "own.json").write_text(json.dumps([row, {**row, "task_id": 3}]))
    assert [*load_problems(TASKS["mbpp"], tmp_path / "own.json").by_id] == ["MBPP/own"]  # 3 is none of the test part


def test_your_own_problems_take_a_tasks_form(tmp_path):
    row = {"task_id": "own", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1) == 2\n"}
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(row) + "\n")
    problems = load_problems(TASKS["mini"], own)
    assert [*problems.by_id] == ["own"]
    assert problems.sha256 != TASKS["mini"].sha256
    for text in (
        json.dumps(row),
        json.dumps([row], indent=1),
        f"{json.dumps(row)}\n\ufeff{json.dumps({**row, 'task_id': 'b'})}",
    ):
        for content in (
            b"\xef\xbb\xbf" + text.encode(),
            gzip.compress(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()),
        ):
            own.write_bytes(content)
            assert next(iter(load_problems(TASKS["mini"], own).by_id)) == "own"
    own.write_text(json.dumps({**row, "prompt": "# one\u2028line\ndef f(x):\n"}, ensure_ascii=False))
    assert "\u2028" in load_problems(TASKS["mini"], own).by_id["own"].statement.text
    (tmp_path / "own.json.gz").write_bytes(gzip.compress(json.dumps([row]).encode()))
    assert [*load_problems(TASKS["mini"], tmp_path / "own.json.gz").by_id] == ["own"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no problems"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"\x1f\x8b junk", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (gzip.compress(b"{}" * 99, mtime=0)[:-12] + b"x" * 12, "not JSON"),
        (b"[1]", "problem 1: lacks task_id, prompt, entry_point, test"),
        (b'{"task_id": "a", "prompt": "p", "entry_point": "f"}', "lacks test"),
        (b'{"task_id": "a", "prompt": 5, "entry_point": "f", "test": "t"}', r"\(a\): is not a mini problem"),
        (b'{"task_id": "a", "prompt": "p", "entry_point": "f", "test": "t"}\n' * 2, "task_id a is there twice"),
    ],
)
def test_a_malformed_file_is_one_clear_line(content, said, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load_problems(TASKS["mini"], path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="cannot read"):
        load_problems(TASKS["mini"], tmp_path / "absent")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=9),
        st.sampled_from(["def f(x):\n", "assert f(1)"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(task=st.sampled_from([*TASKS.values()]), values=st.lists(JSON, min_size=8, max_size=8), cut=st.integers(0, 300))
def test_any_file_gives_problems_or_one_clear_line(task, values, cut, tmp_path):
    path = tmp_path / "own.jsonl"
    row = dict(zip(("task_id", *task.fields, "text", "test_imports"), values, strict=False))
    for content in (
        json.dumps(row).encode(),
        json.dumps(row).encode()[:cut],
        json.dumps([row, *values]).encode("utf-16")[:cut],
    ):
        path.write_bytes(content)
        said = f"{path}: nothing"
        try:
            load_problems(task, path)
        except DataError as error:
            said = str(error)
        assert said.startswith(f"{path}: ")
        assert "\n" not in said


def test_a_changed_benchmark_file_is_refused(monkeypatch):
    import dataclasses

    with pytest.raises(DataError, match="sha256"):
        load_problems(dataclasses.replace(TASKS["humaneval"], sha256="0" * 64))


# --- prompts --------------------------------------------------------------------------------------------------------


def test_every_prompt_shows_what_must_be_solved_or_says_that_it_does_not_fit():
    fits = set()
    for task in TASKS:
        problem = next(iter(load_problems(TASKS[task]).by_id.values()))
        for name, prompt in PROMPTS.items():
            if prompt.needs_stub not in (None, bool(problem.statement.stub)):
                with pytest.raises(RequestError, match="take one of"):
                    prompt.render(problem)
                continue
            messages = prompt.render(problem)
            fits.add((name, bool(problem.statement.stub)))
            assert messages[-1]["role"] == "user"
            assert problem.statement.text.strip().splitlines()[0] in messages[-1]["content"]
            assert problem.entry_point in messages[-1]["content"]
    assert fits == {
        *(("zero_shot_instruct", True), ("zero_shot_instruct", False), ("evalplus", True), ("evalplus", False)),
        *(("mbpp_3shot", False), ("opencompass_mbpp", False)),
        *(("opencompass_humaneval", True), ("lm_eval_humaneval_instruct", True)),
    }


def test_the_few_shot_prompt_is_problems_2_3_and_4_and_their_solutions():
    problem = load_problems(TASKS["mbpp"]).by_id["MBPP/11"]
    messages = PROMPTS["mbpp_3shot"].render(problem)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    full = load_problems(TASKS["mbpp_full"]).by_id
    for number, shot, solution in zip((2, 3, 4), messages[::2], messages[1::2], strict=False):
        assert full[f"MBPP/{number}"].row["text"] in shot["content"]
        assert solution["content"].startswith("[BEGIN]\n")
        assert solution["content"].endswith("\n[DONE]")
    assert "\r" not in json.dumps(messages[:6])


def test_a_prompts_wording_does_not_change_under_its_id():
    """A new wording is a new version: then add its hash here and keep the old one's."""
    import hashlib

    digests = {}
    for prompt in PROMPTS.values():
        task = "humaneval" if prompt.needs_stub is not False else "mbpp"
        problem = next(iter(load_problems(TASKS[task]).by_id.values()))
        digests[prompt.id] = hashlib.sha256(json.dumps(prompt.render(problem)).encode()).hexdigest()[:12]
    assert digests == {
        "zero_shot_instruct/v1": "5c56b6e938c8",
        "mbpp_3shot/v1": "21f9ab604046",
        "opencompass_humaneval/v1": "f94abe48d271",
        "opencompass_mbpp/v1": "e6320821d733",
        "lm_eval_humaneval_instruct/v1": "4391c8cc4d32",
        "evalplus/v1": "9cf73f26ffe6",
    }
