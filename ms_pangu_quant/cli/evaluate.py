"""pangu-quant evaluate"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ms_pangu_quant.api import EvaluationRequest, GenerationSettings, Judging, answer, score
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES
from ms_pangu_quant.cli.console import (
    AsJson,
    Device,
    EndpointUrl,
    Head,
    ServedName,
    ServerTimeout,
    Temperature,
    TopK,
    TopP,
    Verbose,
    endpoint_of,
    err,
    out,
    progress_bars,
)
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.job import PROMPT, alone_in
from ms_pangu_quant.evaluation.prompts import PROMPTS
from ms_pangu_quant.evaluation.run import GENERATION, SAMPLES_FILE
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP, RLIMITS
from ms_pangu_quant.evaluation.tasks import TASKS, check_tasks
from ms_pangu_quant.evaluation.verdict import UNCLOSED
from ms_pangu_quant.inference.endpoint import Endpoint
from ms_pangu_quant.inference.sampling import GREEDY
from ms_pangu_quant.job import ranks

Directory = Annotated[
    Path | None,
    typer.Argument(help="Checkpoint directory; with --endpoint its tokenizer is enough. Not with --score-only."),
]
PromptName = Annotated[str, typer.Option(help=f"Prompt, or benchmark=prompt with commas between: {', '.join(PROMPTS)}.")]
OwnProblems = Annotated[list[str] | None, typer.Option(help="benchmark=FILE: your own problems in that benchmark's form.")]
SamplesFile = Annotated[
    Path | None, typer.Option(help="With --score-only: lines of task_id, sample_id, completion. Default: OUTPUT's.")
]
SandboxName = Annotated[
    str, typer.Option(help=f"{BUBBLEWRAP}, or {RLIMITS} where it is missing: answers can then reach files and network.")
]
GuestPackages = Annotated[
    str | None,
    typer.Option(help="What answers may import beside the standard library: installed packages, separated by commas."),
]


def evaluate_command(
    directory: Directory = None,
    tasks: Annotated[str, typer.Option(help=f"Benchmarks, separated by commas: {', '.join(TASKS)}.")] = "humaneval,mbpp",
    modes: Annotated[
        str | None,
        typer.Option(help=f"Thinking modes, separated by commas: {', '.join(THINKING_MODES)}. Default: all it has."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory of the results; a run begun there goes on.")] = Path("evaluation"),
    endpoint: EndpointUrl = None,
    model: ServedName = None,
    timeout: ServerTimeout = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first N problems of each benchmark.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each problem; more than 1 must be drawn.")] = 1,
    sampled: Annotated[
        bool,
        typer.Option(
            "--sampled", help="Draw at the checkpoint's own temperature, top-p and top-k (generation_config.json)."
        ),
    ] = False,
    prompt: PromptName = PROMPT,
    data: OwnProblems = None,
    samples_only: Annotated[bool, typer.Option("--samples-only", help="Generate and do not score.")] = False,
    score_only: Annotated[bool, typer.Option("--score-only", help="Score a samples file; needs no model.")] = False,
    samples: SamplesFile = None,
    sandbox: SandboxName = BUBBLEWRAP,
    cpu_seconds: Annotated[int, typer.Option(min=1, help="CPU time a program may take (four times for the + sets).")] = 15,
    guest_packages: GuestPackages = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Programs judged at a time; all cores by default.")] = None,
    max_new_tokens: Annotated[
        str, typer.Option(help="Tokens an answer may have, thought included; or mode=number with commas between.")
    ] = f"{GENERATION.max_new_tokens}",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Annotated[int, typer.Option(help="Makes draws repeatable.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers under way at a time; does not change greedy ones.")] = 16,
    as_json: AsJson = False,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Under msrun, ranks that hold one model together; by default each holds its own.")
    ] = 1,
    device: Device = "cpu",
    head: Head = "stored",
    verbose: Verbose = False,
) -> None:
    """HumanEval and MBPP in the three thinking modes: generate answers, run them in a sandbox, count what passes.

    With --endpoint, answers of a server, which is asked with prompts that the checkpoint's tokenizer has encoded; with
    --score-only, answers that another program generated.

    Example:
        pangu-quant evaluate pangu-7b-w8a8 --tasks humaneval,mbpp \\
            --modes slow_think,no_think --output results/w8a8
        pangu-quant evaluate pangu-7b-w8a8 --endpoint http://localhost:8000/v1 \\
            --output results/served
        pangu-quant evaluate --score-only --tasks humaneval \\
            --samples samples.jsonl --output results/mine
    """
    names, own = words(tasks), own_problems(data or [])
    check_tasks(names, own)
    served = endpoint_of(endpoint, model, timeout)
    _check(directory, samples, samples_only, score_only, served)
    with alone_in(output):
        if directory is not None:
            most, limits = _limits(max_new_tokens)
            request = EvaluationRequest(
                directory, output, names, None if modes is None else words(modes), _prompts(prompt, names), own, limit,
                GenerationSettings(most, temperature, top_p, top_k, seed), n, batch_size,
                device=device, head=head, tensor_parallel=tensor_parallel, endpoint=served,
                sampled=sampled, max_new_tokens=limits,
            )  # fmt: skip
            _answer(request)
        if not ranks.current().is_first:
            return  # rank 0 scores and reports for all
        if not samples_only:
            judging = Judging(sandbox, cpu_seconds, workers, words(guest_packages or ""))
            _score(samples or output / SAMPLES_FILE, output, names, own, judging, as_json)
        elif not as_json:
            out.print(f"samples in {output / SAMPLES_FILE}")


def _check(
    directory: Path | None, samples: Path | None, samples_only: bool, score_only: bool, served: Endpoint | None
) -> None:
    if score_only and samples_only:
        raise RequestError("evaluate: give one of --samples-only and --score-only")
    if samples is not None and not score_only:
        raise RequestError("evaluate: --samples goes with --score-only; a run's own samples are in its --output")
    if score_only and ranks.in_job():
        raise RequestError("evaluate: --score-only is the work of one process; start it without msrun")
    if score_only and (directory is not None or served is not None):
        raise RequestError(f"evaluate: --score-only needs no model; leave out {directory or '--endpoint'}")
    if served is not None and directory is None:
        raise RequestError(
            "evaluate: --endpoint needs a checkpoint directory too: prompts are encoded with its tokenizer (of which the "
            "files are enough)"
        )
    if not score_only and directory is None:
        raise RequestError("evaluate: give a checkpoint directory, or --score-only and --samples")


def own_problems(data: list[str]) -> dict[str, Path]:
    own: dict[str, Path] = {}
    for text in data:
        name, equals, file = text.partition("=")
        if not equals:
            raise RequestError(f"--data: got {text!r}, wanted benchmark=FILE")
        own[name] = Path(file)
    return own


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _prompts(text: str, tasks: list[str]) -> dict[str, str]:
    """benchmark -> prompt; one without a benchmark is for all of them."""
    named: dict[str, str] = {}
    for part in text.split(","):
        task, equals, name = part.strip().rpartition("=")
        named.update({task: name} if equals else dict.fromkeys(tasks, name))
    return named


def _limits(text: str) -> tuple[int, dict[str, int]]:
    """(for modes that are not named, mode -> tokens)."""
    most, limits = GENERATION.max_new_tokens, {}
    for part in text.split(","):
        mode, equals, number = (word.strip() for word in part.rpartition("="))
        if not number.isdecimal() or int(number) < 1:
            raise RequestError(
                f"--max-new-tokens: got {part.strip()!r}, wanted a number of at least 1, or slow_think=2048,no_think=512"
            )
        if equals:
            limits[mode] = int(number)
        else:
            most = int(number)
    return most, limits


# --- what is shown --------------------------------------------------------------------------------------------------


class _Bar(ExitStack):
    """A bar that appears when it is known how much there is to do; with the speed of what count() is told, if any."""

    def __init__(self, what: str, *columns: str) -> None:
        super().__init__()
        self._progress, self._what = progress_bars(*columns), what
        self.tokens, self._started = 0, 0.0

    def begin(self, total: int) -> None:
        self.enter_context(self._progress)
        self._task = self._progress.add_task(self._what, total=total, kind="count", speed="")
        self._started = time.monotonic()

    def count(self, tokens: int) -> None:
        self.tokens += tokens
        self._progress.update(self._task, speed=f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s")

    def advance(self, *_: object) -> None:
        self._progress.advance(self._task)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started


def _answer(request: EvaluationRequest) -> None:
    with _Bar("answers", "{task.fields[speed]}") as bar:
        answer(request, on_begin=bar.begin, on_tokens=bar.count, on_answer=bar.advance)
    err.print(f"[dim]{bar.tokens} tokens in {bar.seconds:.0f} s[/dim]")


def _score(samples: Path, output: Path, tasks: list[str], own: dict[str, Path], judging: Judging, as_json: bool) -> None:
    with _Bar("verdicts") as bar:
        summary = score(samples, output, tasks, own, judging, on_begin=bar.begin, on_verdict=bar.advance)
    if as_json:
        print(json_text(summary))
        return
    out.print(_table(summary["entries"]))
    for line in _remarks(summary["entries"], summary["sandbox"]):
        err.print(line, style="yellow", markup=False)


def _table(entries: list[dict[str, Any]]) -> Table:
    """cut: by the limit of tokens; loops: the end repeats; open: a thought without an end."""
    table = Table(box=None, padding=(0, 1, 0, 0))  # the longest names fit into 80 columns
    for title in ("benchmark", "mode", "passed", "pass@1, %", "95 %", "length", "cut", "loops", "open"):
        table.add_column(title, justify="left" if title in ("benchmark", "mode") else "right", no_wrap=True)
    for entry in entries:
        score, lengths = entry["pass@1"], entry["lengths"]
        length, unit = (lengths["tokens"], "tokens") if lengths["tokens"] else (lengths["words"], "words")
        table.add_row(
            entry["task"],
            entry["mode"] or "",
            f"{entry['passed']}/{entry['samples']}",
            f"{100 * score['value']:.2f}" if score else "",
            f"{100 * score['low']:.1f}-{100 * score['high']:.1f}" if score else "",
            f"{length['mean']:.0f} {unit}" if length else "",
            f"{entry['truncated']}",
            f"{entry['repetitive']}",
            f"{entry['verdicts'].get(UNCLOSED, 0)}",
        )
    return table


def _remarks(entries: list[dict[str, Any]], sandbox: dict[str, Any]) -> Iterator[str]:
    for decoding in dict.fromkeys(entry["decoding"] for entry in entries):
        if decoding not in (None, GREEDY):
            yield f"answers drawn at {decoding}"
    if sandbox["kind"] != BUBBLEWRAP:
        yield f"isolation: {sandbox['description']}"
    for entry in entries:
        name = f"{entry['task']} {entry['mode'] or ''}".strip()
        if entry["problems"] < entry["of"]:
            yield f"{name}: {entry['problems']} of {entry['of']} problems"
        if entry["missing_modules"]:
            modules = ", ".join(f"{module} {count}" for module, count in entry["missing_modules"].items())
            count = sum(entry["missing_modules"].values())
            yield (
                f"{name}: {count} answer{'s' * (count > 1)} failed for a module that is not there ({modules}); answers "
                "have Python's standard library, and what --guest-packages names"
            )
        if not entry["complete"]:
            yield f"{name}: {entry['verdicts']['infra_error']} samples could not be judged (infra_error); run it again"
        if entry["prompt_too_long"]:
            yield f"{name}: {entry['prompt_too_long']} prompts are longer than the model's context and count as failed"
