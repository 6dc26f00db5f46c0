"""Verdicts of a file of samples: extraction, judging, and a results file that grows as they come.

A verdict is kept under a hash of all that it depends on: the program, the limits, the isolation and the rules' version. So
a run that was stopped goes on, a second run judges nothing, and a changed sample or task is judged anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_pangu_quant.errors import DataError
from ms_pangu_quant.evaluation import sandbox
from ms_pangu_quant.evaluation.extract import METHOD, Extraction, extract, split_text
from ms_pangu_quant.evaluation.lengths import lengths_of
from ms_pangu_quant.evaluation.samples import Journal, Record, read_records, write_records
from ms_pangu_quant.evaluation.sandbox import Sandbox
from ms_pangu_quant.evaluation.tasks.task import Problem, Problems, find_problem
from ms_pangu_quant.evaluation.verdict import Outcome
from ms_pangu_quant.inference.sampling import decoding_of

COPIED = ("task", "mode", "task_id", "sample_id")
_ELSEWHERE = {  # what other programs call it, the likeliest first
    "completion": (
        *("solution", "completions", "generation", "generations", "generated_text", "resps", "filtered_resps", "response"),
        *("responses", "model_output", "output", "outputs", "raw_output", "answer", "prediction", "predictions", "code"),
        *("generated_code", "content", "text"),
    ),
    "task_id": ("taskid", "problem_id", "question_id", "doc_id", "id", "name"),
}


@dataclass(frozen=True)
class Sample:
    """A line of a samples file, with the problem it answers."""

    record: Record
    problem: Problem

    @property
    def key(self) -> tuple[str, str, str, str]:
        record = self.record
        return self.problem.task.name, str(record.get("mode", "")), self.problem.task_id, str(record["sample_id"])

    def extraction(self) -> Extraction:
        if isinstance(self.record.get("answer"), str):  # cut at the think-end token's id when it was generated
            text, closed = self.record["answer"], bool(self.record.get("closed", True))
        else:
            split = split_text(self.record["completion"])
            text, closed = split.answer, split.closed
        return extract(text, self.problem.entry_point, self.problem.statement.stub, closed=closed)


def load_samples(path: Path, tasks: Mapping[str, Problems]) -> list[Sample]:
    """The lines of a samples file that belong to `tasks`; a line without a task belongs to the only one.

    Raises DataError for a line that lacks a field, names an unknown problem, or repeats another's names.
    """
    samples: list[Sample] = []
    seen: dict[tuple[str, str, str, str], int] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for number, record in read_records(path):
        where = f"{path}: line {number}"
        if "task" not in record and len(tasks) > 1:
            raise DataError(f'{where}: names no "task", and {len(tasks)} are asked for; score one task at a time')
        for field in ("task", "mode"):
            if not isinstance(record.get(field), str | None):
                raise DataError(f"{where}: {field} is {type(record[field]).__name__}, wanted a text")
        name = record.get("task") or next(iter(tasks))
        if name not in tasks:
            continue
        for field in ("task_id", "completion"):
            if field not in record:
                raise DataError(
                    f'{where}: has no "{field}"; wanted task_id, sample_id and completion{_rename(record, field)}'
                )
        if not isinstance(record["completion"], str):
            many = "; write a line for each" if isinstance(record["completion"], list) else ""
            raise DataError(f"{where}: completion is {type(record['completion']).__name__}, wanted a text{many}")
        if not isinstance(record["task_id"], str | int):
            raise DataError(f"{where}: task_id is {type(record['task_id']).__name__}, wanted a text")
        problem = find_problem(tasks[name], record["task_id"])
        if problem is None:
            first = next(iter(tasks[name].by_id))
            raise DataError(f"{where}: {name} has no problem {record['task_id']!r}, only such as {first}")
        if "sample_id" not in record:
            place = (name, record.get("mode"), problem.task_id)
            record["sample_id"] = counts[place] = counts.get(place, -1) + 1
        sample = Sample(record, problem)
        if sample.key in seen:
            raise DataError(f"{where}: the same task_id and sample_id as line {seen[sample.key]}")
        seen[sample.key] = number
        samples.append(sample)
    if not samples:
        raise DataError(f"{path}: holds no samples of {', '.join(tasks)}")
    return samples


def _rename(record: Record, field: str) -> str:
    """What the line has instead, and what to do with it."""
    keys = {key.lower(): key for key in record}
    found = next((keys[name] for name in (field, *_ELSEWHERE[field]) if name in keys), None)
    if found is None:
        there = ", ".join(json.dumps(key[:40]) for key in [*record][:12]) or "nothing"
        return f", got {there}"
    lists = ", with a line for each of its texts" if isinstance(record[found], list) else ""
    return f'; rename "{found}" to "{field}"{lists}'


def score(
    samples: Sequence[Sample],
    results: Path,
    judges: Sandbox,
    on_result: Callable[[str], None] = lambda verdict: None,
) -> list[Record]:
    """The results of samples, in their order; also in the file `results`, in which earlier ones are found again.

    judges     is opened only if there is something to judge.
    on_result  called with each verdict.
    """
    known = {} if not results.exists() else {record["key"]: record for record in _results(results)}
    done: dict[int, Record] = {}
    waiting: list[tuple[int, Extraction, str]] = []
    for index, sample in enumerate(samples):
        extraction = sample.extraction()
        key = _hash(sample, extraction, judges)
        earlier = known.get(key)
        if earlier is not None and earlier["verdict"] != "infra_error":
            kept = Outcome(earlier["verdict"], earlier["detail"], earlier["oracle"])
            done[index] = _record(sample, extraction, kept, key)
            on_result(earlier["verdict"])
        elif extraction.code is None:
            done[index] = _record(sample, extraction, _nothing_to_run(sample, extraction), key)
            on_result(done[index]["verdict"])
        else:
            waiting.append((index, extraction, key))
    if waiting:
        with Journal(results) as journal, judges:
            programs = ((number, samples[number].problem.program(found.code or "")) for number, found, _ in waiting)
            rest = {index: (extraction, key) for index, extraction, key in waiting}
            for index, outcome in judges.judge_all(programs):
                extraction, key = rest[index]
                done[index] = _record(samples[index], extraction, outcome, key)
                journal.append(done[index])
                on_result(outcome.verdict)
    records = [done[index] for index in range(len(samples))]
    write_records(results, records)
    return records


def _nothing_to_run(sample: Sample, extraction: Extraction) -> Outcome:
    if extraction.rule == METHOD:
        return Outcome("no_code", f"{sample.problem.entry_point} is a method of a class, and the test calls a function")
    return Outcome(extraction.rule)


def _results(path: Path) -> Iterable[Record]:
    """What an earlier run has written; its last line may be torn."""
    with Journal(path):
        pass
    for number, record in read_records(path):
        if not {"key", "verdict", "detail", "oracle"} <= record.keys():
            raise DataError(f"{path}: line {number} is not a result; write to another directory")
        yield record


def _record(sample: Sample, extraction: Extraction, outcome: Outcome, key: str) -> Record:
    return {
        **{name: sample.record[name] for name in COPIED if name in sample.record},
        "verdict": outcome.verdict,
        "rule": extraction.rule,
        "detail": outcome.detail,
        "oracle": outcome.oracle,
        **lengths_of(sample.record),
        "decoding": decoding_of(sample.record.get("settings")),
        "key": key,
    }


def _hash(sample: Sample, extraction: Extraction, judges: Sandbox) -> str:
    program = vars(sample.problem.program(extraction.code or ""))
    depends = [sample.key, extraction.rule, program, judges.isolation.kind, vars(judges.limits), sandbox.VERSION]
    if judges.packages.versions:
        depends.append(judges.packages.versions)
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
