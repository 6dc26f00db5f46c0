"""Runs -> report.html, one file that needs no network, and report.md, the same without plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ms_pangu_quant.checkpoint.files import size
from ms_pangu_quant.errors import DataError
from ms_pangu_quant.evaluation.extract import Split, split_text
from ms_pangu_quant.evaluation.samples import write_pieces
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP
from ms_pangu_quant.evaluation.statistics import LEVEL, MOST_PROBLEMS, POWER, Interval
from ms_pangu_quant.evaluation.summary import FAULTS, share
from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.evaluation.tasks.task import find_problem, load_problems
from ms_pangu_quant.evaluation.verdict import VERDICTS
from ms_pangu_quant.mixed.sensitivity import Sensitivity
from ms_pangu_quant.report import plots
from ms_pangu_quant.report.budgets import budgets_of, curves
from ms_pangu_quant.report.comparison import Comparison, compare, compare_together
from ms_pangu_quant.report.figures import about, p_value, percent, points, signed
from ms_pangu_quant.report.headlines import FAULT_WORDS, cell_name, fault_lines, headlines
from ms_pangu_quant.report.prediction import BATCHES, CONTEXT, PROMPT, Prediction
from ms_pangu_quant.report.results import Cell, Run, cell_mode, cells
from ms_pangu_quant.report.sensitivity_plot import group_name
from ms_pangu_quant.report.speed import Speed, cases

MOST_RUNS = 7


@dataclass(frozen=True)
class Example:
    """One problem's first answer of each run that has one: (run, verdict, text in two).

    problem is None where the problems were not the shipped ones.
    """

    cell: Cell
    task_id: str
    problem: str | None
    answers: tuple[tuple[Run, str, Split], ...]


@dataclass(frozen=True)
class Report:
    """What a page is about. The first run is the reference; `wanted` is the share of its pass@1 that is tested for, and
    `examples` the number of problems whose answers are shown. Raises DataError for more than a page can tell apart."""

    runs: Sequence[Run]
    speeds: Sequence[Speed] = ()
    sensitivity: Sensitivity | None = None
    prediction: Prediction | None = None
    wanted: float = 0.9
    title: str = ""
    examples: int = 6

    def __post_init__(self) -> None:
        for given, what in ((self.runs, "results"), (self.speeds, "benches")):
            if len(given) > MOST_RUNS:
                raise DataError(f"report: got {len(given)} {what}, wanted at most {MOST_RUNS} on a page")


def write(report: Report, output: Path) -> list[Path]:
    """The two pages."""
    comparisons = compare(report.runs, report.wanted)
    values, drawn = _values(report, comparisons), _drawn(report, comparisons)
    svg = {name: Markup(each) if each else None for name, each in drawn.items()}  # drawn here, from numbers and names
    page = environment(html=True).get_template("page.html.j2").render(**values, plots=svg)
    text = environment(html=False).get_template("page.md.j2").render(**values)
    paths = [output / "report.html", output / "report.md"]
    for path, content in zip(paths, (page, text), strict=True):
        write_pieces(path, [content.encode("utf-8", "backslashreplace")])
    return paths


def _values(report: Report, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What the templates know."""
    runs = report.runs
    together, found = compare_together(runs, report.wanted), curves(runs)
    decodings = {cell.decoding for cell in cells(runs)}
    return {
        "title": report.title or "What quantization costs",
        "runs": runs,
        "cells": [*cells(runs)],
        "comparisons": comparisons,
        "by_place": {(each.cell, each.run.name): each for each in comparisons},
        "speeds": report.speeds,
        "speed_cases": cases(report.speeds),
        "sensitivity": report.sensitivity,
        "group_name": group_name,
        "prediction": report.prediction,
        "predicted": {"batches": BATCHES, "prompt": PROMPT, "context": CONTEXT},
        "wanted": report.wanted,
        "level": LEVEL,
        "headlines": [*headlines(together, comparisons, runs[0], report.wanted)],
        "fault_lines": [*fault_lines(together, comparisons, runs[0])],
        "fault_words": FAULT_WORDS,
        "shares": _shares(runs),
        "curves": found,
        "budgets": budgets_of(found) if found else [],
        "most_problems": MOST_PROBLEMS,
        "times": round(10 * POWER),
        "examples": _examples(runs, comparisons, report.examples),
        "decoding": decodings.pop() if len(decodings) == 1 else None,
        "mode_of": lambda cell: cell_mode(cell, runs),
        "task_title": lambda name: TASKS[name].title if name in TASKS else name,
        "verdicts": VERDICTS,
        "incomplete": [*_incomplete(runs)],
    }


def _drawn(report: Report, comparisons: Sequence[Comparison]) -> dict[str, str | None]:
    """SVG of each plot, None where there is nothing to show."""
    return {
        "scores": plots.scores(report.runs),
        "retention": plots.retention(report.runs, comparisons, report.wanted),
        "lengths": plots.lengths(report.runs),
        "budgets": plots.budgets(report.runs),
        "block_errors": plots.block_errors(report.runs),
        "prefill": plots.prefill(report.runs, report.speeds),
        "sensitivity": plots.sensitivity(report.sensitivity),
        "prediction": plots.prediction(report.prediction),
    }


def _examples(runs: Sequence[Run], comparisons: Sequence[Comparison], most: int) -> list[Example]:
    """Problems that flipped first, taken in turns from the comparisons; then problems that all answered."""
    texts = [run.completions() for run in runs]
    queues = [
        [*(each.flips.lost if each.flips else ()), *(each.flips.gained if each.flips else ())] for each in comparisons
    ]
    wanted: list[tuple[Cell, str]] = []
    for turn in range(most):
        wanted += [(each.cell, queue[turn]) for each, queue in zip(comparisons, queues, strict=True) if turn < len(queue)]
    for cell, results in runs[0].results.items():
        wanted += [(cell, str(result["task_id"])) for result in results[:1]]
    found: list[Example] = []
    for cell, task_id in dict.fromkeys(wanted):
        answers = tuple(_answers(runs, texts, cell, task_id))
        if answers and len(found) < most:
            found.append(Example(cell, task_id, _statement(runs[0], cell, task_id), answers))
    return found


def _statement(run: Run, cell: Cell, task_id: str) -> str | None:
    task = TASKS.get(cell[0])
    if task is None or run.entries[cell]["data_sha256"] != task.sha256:
        return None
    problem = find_problem(load_problems(task), task_id)
    return "\n".join([problem.statement.text.strip(), *problem.statement.tests]) if problem else None


def _answers(
    runs: Sequence[Run], texts: Sequence[Mapping[Any, Any]], cell: Cell, task_id: str
) -> Iterator[tuple[Run, str, Split]]:
    for run, samples in zip(runs, texts, strict=True):
        for result in run.results.get(cell, ()):
            sample = samples.get((cell, task_id, str(result["sample_id"])))
            if str(result["task_id"]) == task_id and sample is not None:
                yield run, result["verdict"], split_text(sample["completion"])
                break


def _shares(runs: Sequence[Run]) -> dict[tuple[str, Cell], dict[str, Interval | None]]:
    """(run, cell) -> share of its answers that loop, and so on, with its interval; None where it is not known."""
    return {
        (run.name, cell): {name: share(results, told) for name, told in FAULTS.items()}
        for run in runs
        for cell, results in run.results.items()
    }


def _incomplete(runs: Sequence[Run]) -> Iterator[str]:
    """What a reader must know before believing the numbers; said once where it holds for every run and mode."""
    entries = [(run, entry) for run in runs for entry in run.entries.values()]
    for title, problems, of in dict.fromkeys((entry["title"], entry["problems"], entry["of"]) for _, entry in entries):
        if problems < of:
            yield f"{title}: {problems} of its {of} problems, not the whole benchmark"
    for run, entry in entries:
        name = f"{run.name}, {entry['title']} {entry['mode'] or ''}".strip()
        if not entry["complete"]:
            yield f"{name}: {entry['verdicts']['infra_error']} samples could not be judged (infra_error) and are left out"
        if entry["prompt_too_long"]:
            yield f"{name}: {entry['prompt_too_long']} prompts were longer than the context and count as failed"
    yield from _uncompared(runs)
    for description in dict.fromkeys(str(run.summary["sandbox"]["description"]) for run in runs):
        if any(
            run.summary["sandbox"]["kind"] != BUBBLEWRAP
            for run in runs
            if run.summary["sandbox"]["description"] == description
        ):
            yield f"Answers were run with {description}"


def _uncompared(runs: Sequence[Run]) -> Iterator[str]:
    """Where how answers were made differs between runs, or is not known."""
    reference = runs[0]
    for run in runs:
        for cell in run.assumed:
            yield f"{run.name}, {cell_name(cell)}: it is not known how its answers were drawn; taken to be {cell.decoding}"
    for run in runs[1:]:
        for cell, entry in run.entries.items():
            of_reference = [each.decoding or "not known" for each in reference.entries if each[:2] == cell[:2]]
            if cell not in reference.entries and of_reference:
                yield (
                    f"{run.name}, {cell_name(cell)}: drawn otherwise ({cell.decoding or 'not known'}) than "
                    f"{reference.name} ({' and '.join(of_reference)}), and compared with nothing"
                )
            limits = [each["max_new_tokens"] for each in (reference.entries.get(cell, {"max_new_tokens": []}), entry)]
            if all(limits) and limits[0] != limits[1]:
                told = [" and ".join(map(str, each)) for each in limits]
                yield f"{cell_name(cell)}: {run.name}'s answers end at {told[1]} tokens, {reference.name}'s at {told[0]}"


def environment(*, html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("ms_pangu_quant.report", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "p": p_value, "signed": signed, "points": points, "about": about}
    environment.filters |= {"size": size, "cut": _cut}
    return environment


def _cut(text: str, most: int = 3000) -> str:
    text = "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    return (
        text if len(text) <= most else f"{text[: most // 2]}\n[... {len(text) - most} characters ...]\n{text[-most // 2 :]}"
    )
