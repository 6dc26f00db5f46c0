"""evaluation/score.py, samples.py, summary.py: a samples file becomes verdicts, once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_pangu_quant.checkpoint.writer import lock
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import DataError, OutputError
from ms_pangu_quant.evaluation.job import alone_in
from ms_pangu_quant.evaluation.samples import Journal, read_records
from ms_pangu_quant.evaluation.score import load_samples
from ms_pangu_quant.evaluation.statistics import wilson
from ms_pangu_quant.evaluation.summary import summarize
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems

SCORE = ("evaluate", "--score-only", "--tasks", "humaneval", "--sandbox", "rlimits", "--cpu-seconds", "2")
HUMANEVAL = {"humaneval": load_problems(TASKS["humaneval"])}
ENTRY = "separate_paren_groups"  # HumanEval/1's


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [record for _, record in read_records(path)]


def solutions(count: int) -> list[dict]:
    problems = [*load_problems(TASKS["humaneval"]).by_id.values()][:count]
    return [{"task_id": each.task_id, "sample_id": 0, "completion": each.row["canonical_solution"]} for each in problems]


def score_file(samples, output, *more) -> int:
    return main([*SCORE, "--samples", str(samples), "--output", str(output), *more])


def test_a_subset_with_several_samples_is_scored_from_raw_text(tmp_path, capsys):
    good = solutions(2)
    rows = [
        good[0],
        {**good[0], "sample_id": 1, "completion": "[unused16]hm[unused17]```python\nreturn False\n```[unused10]"},
        {**good[0], "sample_id": "c", "completion": "[unused16]I think"},
        {**good[1], "completion": "I do not know"},
        {**good[1], "sample_id": 1, "completion": f"class S:\n    def {ENTRY}(self, x):\n        return []"},
    ]
    assert score_file(write(tmp_path / "samples.jsonl", rows), tmp_path / "out", "--json") == 0
    results = rows_of(tmp_path / "out" / "results.jsonl")
    assert [(row["task_id"], row["sample_id"], row["verdict"], row["rule"]) for row in results] == [
        ("HumanEval/0", 0, "pass", "body"),
        ("HumanEval/0", 1, "wrong_answer", "fenced_body"),
        ("HumanEval/0", "c", "unclosed_thought", "unclosed_thought"),
        ("HumanEval/1", 0, "no_code", "no_code"),
        ("HumanEval/1", 1, "no_code", "method"),
    ]
    assert results[-1]["detail"] == f"{ENTRY} is a method of a class, and the test calls a function"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out) == summary
    (entry,) = summary["entries"]
    assert entry["pass@1"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert (entry["problems"], entry["of"], entry["samples"], entry["passed"]) == (2, 164, 5, 1)
    assert entry["verdicts"] == {"pass": 1, "wrong_answer": 1, "no_code": 2, "unclosed_thought": 1}
    assert entry["unclosed_thoughts"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert entry["unclosed_thoughts"]["low"] < entry["unclosed_thoughts"]["value"] < entry["unclosed_thoughts"]["high"]
    assert (entry["loops"]["value"], entry["decoding"], entry["max_new_tokens"]) == (0, None, [])
    assert entry["data_sha256"] == TASKS["humaneval"].sha256
    assert summary["sandbox"]["kind"] == "rlimits"
    assert "reachable" in summary["sandbox"]["description"]


def test_answers_that_were_drawn_otherwise_are_never_pooled(tmp_path):
    """Greedy and drawn ones in one file: an entry each; and one greedy answer a problem has Wilson's interval."""
    greedy = [{**row, "settings": {"max_new_tokens": 9, "temperature": 0.0, "top_p": 0.5}} for row in solutions(3)]
    greedy[0] |= {"completion": "again and " * 20, "repetitive": True}
    own = {"max_new_tokens": 9, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    drawn = [{**row, "sample_id": n, "settings": own, "completion": "no"} for row in solutions(3) for n in (1, 2)]
    assert score_file(write(tmp_path / "samples.jsonl", [*greedy, *drawn]), tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["entries"]
    told = [(entry["decoding"], entry["passed"], entry["samples"], entry["max_new_tokens"]) for entry in found]
    assert told == [("greedy", 2, 3, [9]), ("temperature 0.6, top-p 0.95, top-k 20", 0, 6, [9])]
    assert found[0]["loops"] == asdict(wilson(1, 3))


def test_the_longest_names_fit_into_eighty_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    problems = [*load_problems(TASKS["mini_validation"]).by_id.values()][:2]
    rows = [
        {
            "task": "mini_validation",
            "mode": "slow_think",
            "task_id": each.task_id,
            "sample_id": 0,
            "completion": "no " * 1500,
        }
        for each in problems
    ]
    arguments = ["--samples", str(write(tmp_path / "samples.jsonl", rows)), "--output", str(tmp_path / "out")]
    assert main([*SCORE[:2], "--tasks", "mini_validation", *SCORE[4:], *arguments]) == 0
    titles, cells = capsys.readouterr().out.splitlines()[:2]
    assert titles.split() == ["benchmark", "mode", "passed", "pass@1,", "%", "95", "%", "length", "cut", "loops", "open"]
    assert cells.split()[:3] == ["mini_validation", "slow_think", "0/2"]
    assert "1500 words" in cells


def test_a_generated_sample_is_cut_by_its_tokens_and_not_by_text(tmp_path):
    """The text [unused17] in an answer is text, where the tokens said where the thought ends."""
    (row,) = solutions(1)
    code = row["completion"]
    rows = [
        {**row, "completion": f"[unused16]hm[unused17]{code}# [unused17]", "answer": f"{code}# [unused17]", "closed": True},
        {**row, "sample_id": 1, "completion": f"[unused16]{code}", "answer": "", "closed": False},
    ]
    assert score_file(write(tmp_path / "samples.jsonl", rows), tmp_path / "out") == 0
    assert [result["verdict"] for result in rows_of(tmp_path / "out" / "results.jsonl")] == ["pass", "unclosed_thought"]


def test_ids_come_back_as_they_were_given(tmp_path):
    problem = load_problems(TASKS["mbpp"]).by_id["MBPP/11"]
    samples = write(tmp_path / "s.jsonl", [{"task_id": 11, "sample_id": 7, "completion": problem.reference}])
    arguments = ["evaluate", "--score-only", "--tasks", "mbpp", "--sandbox", "rlimits", "--samples", str(samples)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    (result,) = rows_of(tmp_path / "out" / "results.jsonl")
    assert (result["task_id"], result["sample_id"], result["verdict"]) == (11, 7, "pass")


def test_a_second_run_judges_nothing_and_a_changed_sample_alone_is_judged_again(tmp_path, monkeypatch):
    from ms_pangu_quant.evaluation import job

    judged = []

    class Watched(job.Sandbox):
        def judge_all(self, programs):
            programs = list(programs)
            judged.append(len(programs))
            return super().judge_all(programs)

    monkeypatch.setattr(job, "Sandbox", Watched)
    rows = solutions(5)
    samples = write(tmp_path / "samples.jsonl", rows)
    for _ in range(2):
        assert score_file(samples, tmp_path / "out") == 0
    first = (tmp_path / "out" / "results.jsonl").read_bytes()
    rows[3]["completion"] = "    return 'something else'\n"
    assert score_file(write(samples, rows), tmp_path / "out") == 0
    assert judged == [5, 1]
    assert [row["verdict"] for row in rows_of(tmp_path / "out" / "results.jsonl")] == ["pass"] * 3 + [
        "wrong_answer",
        "pass",
    ]
    assert score_file(write(samples, solutions(5)), tmp_path / "fresh") == 0
    assert (tmp_path / "fresh" / "results.jsonl").read_bytes() == first


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path):
    samples, output = write(tmp_path / "samples.jsonl", solutions(40)), tmp_path / "killed"
    command = [sys.executable, "-m", "ms_pangu_quant", *SCORE, "--samples", str(samples), "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline:
            results = output / "results.jsonl"
            if results.exists() and results.read_bytes().count(b"\n") >= 5:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    kept = rows_of(output / "results.jsonl") if results.read_bytes().endswith(b"\n") else []
    with open(results, "ab") as file:
        file.write(b'{"task_id": "HumanEval/39", "ver')  # a line that the crash cut short
    assert score_file(samples, output) == 0
    assert score_file(samples, tmp_path / "undisturbed") == 0
    assert results.read_bytes() == (tmp_path / "undisturbed" / "results.jsonl").read_bytes()
    assert all(row in rows_of(results) for row in kept)


def test_two_evaluations_into_one_folder_are_one_too_many(tmp_path, capsys):
    samples, output = write(tmp_path / "samples.jsonl", solutions(1)), tmp_path / "out"
    output.mkdir()
    other = lock(output)  # as another process
    try:
        assert score_file(samples, output) == 2
        assert main(["evaluate", str(tmp_path / "absent"), "--output", str(output)]) == 2  # before a model is looked for
        said = capsys.readouterr().err.splitlines()
        assert [line.startswith(f"pangu-quant: error: {output}: another process is writing here") for line in said] == [
            True
        ] * 2
        assert not [*output.iterdir()]
    finally:
        os.close(other)
    with alone_in(output), alone_in(output):
        assert score_file(samples, output) == 0  # this process's own lock is none of its business
        with pytest.raises(OutputError, match="another process"):
            lock(output)
    os.close(lock(output))


def test_a_refused_evaluation_leaves_no_folder(tmp_path):
    assert score_file(write(tmp_path / "samples.jsonl", [{}]), tmp_path / "new" / "folder") == 2
    assert main(["evaluate", str(tmp_path / "absent"), "--output", str(tmp_path / "new" / "folder")]) == 2
    assert not (tmp_path / "new").exists()


def test_answers_that_lack_a_module_are_counted_and_what_to_do_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    codes = (
        "import numpy as np\n{}",
        "import json.absent\n{}",
        "from numpy.linalg import norm\n{}",
        "{}",
        "raise ValueError('numpy')\n{}",
    )
    good = solutions(1)[0]
    prompt = next(iter(HUMANEVAL["humaneval"].by_id.values())).row["prompt"]
    rows = [
        {**good, "sample_id": number, "completion": code.format(prompt + good["completion"])}
        for number, code in enumerate(codes)
    ]
    assert score_file(write(tmp_path / "samples.jsonl", rows), tmp_path / "out") == 0
    (entry,) = json.loads((tmp_path / "out" / "summary.json").read_text())["entries"]
    assert entry["missing_modules"] == {"numpy": 2, "json": 1}
    assert "3 answers failed for a module that is not there (numpy 2, json 1); answers have" in capsys.readouterr().err
    assert score_file(write(tmp_path / "samples.jsonl", [good]), tmp_path / "out") == 0
    assert "module" not in capsys.readouterr().err


def test_packages_that_answers_may_import_are_part_of_a_verdict(tmp_path, capsys):
    (row,) = solutions(1)
    prompt = next(iter(HUMANEVAL["humaneval"].by_id.values())).row["prompt"]
    samples = write(
        tmp_path / "samples.jsonl", [{**row, "completion": "import numpy as np\n" + prompt + row["completion"]}]
    )
    found = []
    for more in ((), ("--guest-packages", "numpy"), ()):
        assert score_file(samples, tmp_path / "out", *more) == 0
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        found.append((summary["entries"][0]["passed"], [*summary["sandbox"]["packages"]]))
    assert found == [(0, []), (1, ["numpy"]), (0, [])]
    capsys.readouterr()
    assert score_file(samples, tmp_path / "new", "--guest-packages", "numpy,absent") == 2
    assert "absent is not installed beside this program; pip install absent" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_an_infra_error_is_judged_again_and_never_scored(tmp_path):
    samples, output = write(tmp_path / "samples.jsonl", solutions(2)), tmp_path / "out"
    assert score_file(samples, output) == 0
    rows = rows_of(output / "results.jsonl")
    rows[0]["verdict"] = "infra_error"
    tasks = {"humaneval": load_problems(TASKS["humaneval"])}
    records = [sample.record for sample in load_samples(samples, tasks)]
    (entry,) = summarize(rows, records, tasks)
    assert (entry["problems"], entry["pass@1"]["value"], entry["complete"]) == (1, 1.0, False)
    write(output / "results.jsonl", rows)
    assert score_file(samples, output) == 0
    assert [row["verdict"] for row in rows_of(output / "results.jsonl")] == ["pass", "pass"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], "got a JSON list"),
        (["["], r"line 1 is not JSON .*jq -c '\.\[\]' writes an array as lines"),
        (['[{"task_id": "HumanEval/0"}]'], "got a JSON list, wanted an object; jq"),
        (["\xff\xfe{"], "line 1 is UTF-16"),
        (['{"completion": ""}'], 'has no "task_id"; wanted task_id, sample_id and completion, got "completion"'),
        (['{"doc_id": 1, "completion": ""}'], 'has no "task_id".*; rename "doc_id" to "task_id"$'),
        (['{"task_id": "HumanEval/0"}'], 'has no "completion"; wanted .*, got "task_id"$'),
        (['{"task_id": "HumanEval/0", "solution": ""}'], 'has no "completion".*; rename "solution" to "completion"$'),
        (['{"task_id": "HumanEval/0", "Completion": ""}'], 'rename "Completion" to "completion"$'),
        (['{"task_id": "HumanEval/0", "prompt": "", "generation": ""}'], 'rename "generation" to "completion"$'),
        (
            ['{"task_id": "HumanEval/0", "resps": [[""]]}'],
            'rename "resps" to "completion", with a line for each of its texts$',
        ),
        (['{"task_id": "HumanEval/0", "new\\nline": ""}'], r'got "task_id", "new\\nline"$'),
        (['{"task_id": "HumanEval/0", "completion": 5}'], "completion is int, wanted a text$"),
        (['{"task_id": "HumanEval/0", "completion": [""]}'], "completion is list, wanted a text; write a line for each"),
        (
            ['{"task_id": "MBPP/0", "completion": ""}'],
            "line 1: humaneval has no problem 'MBPP/0', only such as HumanEval/0",
        ),
        (['{"task_id": "HumanEval/999", "completion": ""}'], "has no problem 'HumanEval/999', only such as HumanEval/0"),
        (
            ['{"task_id": "HumanEval/0", "sample_id": 1, "completion": ""}'] * 2,
            "line 2: the same task_id and sample_id as line 1",
        ),
        ([], "holds no samples of humaneval"),
    ],
)
def test_a_malformed_samples_file_is_one_clear_line(lines, said, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(DataError, match=said):
        load_samples(path, {"humaneval": load_problems(TASKS["humaneval"])})


VALUES = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["HumanEval/0", "humaneval", [], {}, ["x"], {"a": {}}, True, "\udc80", "a\nb"]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["task", "mode", "task_id", "sample_id", "completion", "solution", "answer", "closed", "a\nb"]),
            VALUES,
        ),
        max_size=4,
    ),
    cut=st.integers(0, 400),
)
def test_any_samples_file_gives_samples_or_one_clear_line(rows, cut, tmp_path):
    path = tmp_path / "samples.jsonl"
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    for content in (whole, whole[:cut], json.dumps(rows, indent=1).encode(), whole.decode().encode("utf-16")):
        path.write_bytes(content)
        said = f"{path}: nothing"
        try:
            for sample in load_samples(path, HUMANEVAL):
                sample.extraction()
        except DataError as error:
            said = str(error)
        assert said.startswith(f"{path}: ")
        assert "\n" not in said


def test_samples_without_an_id_are_numbered_and_several_tasks_need_a_name(tmp_path):
    path = write(tmp_path / "samples.jsonl", [{"task_id": "HumanEval/0", "completion": ""}] * 2)
    tasks = {"humaneval": load_problems(TASKS["humaneval"])}
    assert [sample.record["sample_id"] for sample in load_samples(path, tasks)] == [0, 1]
    with pytest.raises(DataError, match='names no "task"'):
        load_samples(path, {**tasks, "mbpp": load_problems(TASKS["mbpp"])})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tasks", "humanevil"],
        ["--tasks", ""],
        ["--tasks", "humaneval", "--data", "mini=x"],
        ["--tasks", "humaneval", "--data", "mini"],
        ["--score-only", "--samples-only"],
        ["checkpoint", "--score-only"],
        ["--samples", "x"],
        [],
        ["checkpoint", "--modes", "fast_think"],
        ["checkpoint", "--prompt", "nonsense"],
        ["checkpoint", "--n", "3"],
        ["--score-only", "--samples", "absent.jsonl"],
        ["--score-only", "--sandbox", "docker", "--tasks", "mini"],
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation").mkdir()
    write(tmp_path / "evaluation" / "samples.jsonl", [{"task_id": "Mini/0", "completion": ""}])
    assert main(["evaluate", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("pangu-quant: error: ")
    assert printed.err.count("\n") == 1
    assert not printed.out


# --- the file that grows --------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_dropped_and_what_is_whole_is_kept(tmp_path):
    path = tmp_path / "a" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        journal.append({"b": "\udc80 é"})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            journal.append({"c": 3})
        kept = whole[:cut].count(b"\n")
        assert rows_of(path) == [*[{"a": 1}, {"b": "\udc80 é"}][:kept], {"c": 3}]


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), Journal(tmp_path / "file" / "journal.jsonl"):
        pass
