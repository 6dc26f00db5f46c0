"""pangu-quant evaluate"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES
from ms_pangu_quant.cli.console import AsJson, Device, Head, Verbose, err, out
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation import run
from ms_pangu_quant.evaluation.prompts import PROMPTS, Prompt
from ms_pangu_quant.evaluation.provenance import environment, of_checkpoint
from ms_pangu_quant.evaluation.samples import write_json
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP, RLIMITS, VERSION, Sandbox, find_isolation
from ms_pangu_quant.evaluation.score import load_samples, score
from ms_pangu_quant.evaluation.summary import summarize
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.evaluation.tasks.task import Problems
from ms_pangu_quant.evaluation.verdict import Isolation, Limits
from ms_pangu_quant.formats.reader import open_checkpoint
from ms_pangu_quant.inference.sampling import GenerationSettings
from ms_pangu_quant.network import ranks, runtime
from ms_pangu_quant.suggestion import did_you_mean

RESULTS_FILE, SUMMARY_FILE = "results.jsonl", "summary.json"


def evaluate_command(
    directory: Annotated[
        Path | None, typer.Argument(help="Checkpoint directory, float or quantized; not with --score-only.")
    ] = None,
    tasks: Annotated[str, typer.Option(help=f"Benchmarks, separated by commas: {', '.join(TASKS)}.")] = "humaneval,mbpp",
    modes: Annotated[str, typer.Option(help="Thinking modes, separated by commas.")] = ",".join(THINKING_MODES),
    output: Annotated[Path, typer.Option(help="Directory of the results; a run begun there goes on.")] = Path("evaluation"),
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first N problems of each benchmark.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each problem; more than 1 needs --temperature.")] = 1,
    prompt: Annotated[
        str, typer.Option(help=f"Prompt, or benchmark=prompt with commas between: {', '.join(PROMPTS)}.")
    ] = "zero_shot_instruct",
    data: Annotated[
        list[str] | None, typer.Option(help="benchmark=FILE: your own problems in that benchmark's form.")
    ] = None,
    samples_only: Annotated[bool, typer.Option("--samples-only", help="Generate and do not score.")] = False,
    score_only: Annotated[bool, typer.Option("--score-only", help="Score a samples file; needs no model.")] = False,
    samples: Annotated[
        Path | None, typer.Option(help="With --score-only: lines of task_id, sample_id, completion. Default: OUTPUT's.")
    ] = None,
    sandbox: Annotated[
        str, typer.Option(help=f"{BUBBLEWRAP}, or {RLIMITS} where it is missing: answers can then reach files and network.")
    ] = BUBBLEWRAP,
    cpu_seconds: Annotated[int, typer.Option(min=1, help="CPU time a program may take (four times for the + sets).")] = 15,
    workers: Annotated[int | None, typer.Option(min=1, help="Programs judged at a time; all cores by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have, thought included.")] = 4096,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the distribution that is drawn from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(help="Makes draws repeatable.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers under way at a time; does not change them.")] = 16,
    as_json: AsJson = False,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Under msrun, ranks that hold one model together; by default each holds its own.")
    ] = 1,
    device: Device = "cpu",
    head: Head = "stored",
    verbose: Verbose = False,
) -> None:
    """HumanEval and MBPP in the three thinking modes: generate answers, run them in a sandbox, count what passes.

    With --score-only, answers that another program generated.

    Example:
        pangu-quant evaluate pangu-7b-w8a8 --tasks humaneval,mbpp \\
            --modes slow_think,no_think --output results/w8a8
        pangu-quant evaluate --score-only --tasks humaneval \\
            --samples samples.jsonl --output results/mine
    """
    chosen = _tasks(tasks, data or [])
    if score_only and samples_only:
        raise RequestError("evaluate: give one of --samples-only and --score-only")
    if samples is not None and not score_only:
        raise RequestError("evaluate: --samples goes with --score-only; a run's own samples are in its --output")
    if score_only and ranks.in_job():
        raise RequestError("evaluate: --score-only is the work of one process; start it without msrun")
    if score_only and directory is not None:
        raise RequestError(f"evaluate: --score-only needs no model; leave out {directory}")
    if not score_only:
        if directory is None:
            raise RequestError("evaluate: give a checkpoint directory, or --score-only and --samples")
        settings = run.Settings(GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed), n, head)
        wanted = _modes(modes)
        prompts = _prompts(prompt, chosen)
        _generate(directory, chosen, wanted, prompts, settings, limit, output, batch_size, tensor_parallel, device, verbose)
    if not ranks.current().is_first:
        return  # rank 0 scores and reports for all
    if not samples_only:
        limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=3.0 * cpu_seconds)
        _score(chosen, samples or output / run.SAMPLES_FILE, output, sandbox, limits, workers, as_json)
    elif not as_json:
        out.print(f"samples in {output / run.SAMPLES_FILE}")


def _tasks(names: str, data: list[str]) -> dict[str, Problems]:
    own: dict[str, Path] = {}
    for text in data:
        name, equals, file = text.partition("=")
        if not equals:
            raise RequestError(f"--data: got {text!r}, wanted benchmark=FILE")
        own[name] = Path(file)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in [*wanted, *own]:
        if name not in TASKS:
            raise RequestError(f"unknown benchmark {name!r}{did_you_mean(name, TASKS)}, wanted some of {', '.join(TASKS)}")
    if not wanted or set(own) - set(wanted):
        raise RequestError(f"--tasks: got {names!r}, wanted some of {', '.join(TASKS)}, and those that --data is for")
    return {name: load_problems(TASKS[name], own.get(name)) for name in wanted}


def _modes(names: str) -> list[str]:
    modes = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in modes if name not in THINKING_MODES]
    if not modes or unknown:
        close = did_you_mean(unknown[0], THINKING_MODES) if unknown else ""
        raise RequestError(f"--modes: got {names!r}{close}, wanted some of {', '.join(THINKING_MODES)}")
    return modes


def _prompts(text: str, tasks: dict[str, Problems]) -> dict[str, Prompt]:
    named = dict.fromkeys(tasks, "zero_shot_instruct")
    for part in text.split(","):
        task, equals, name = part.strip().rpartition("=")
        if (name not in PROMPTS) or (equals and task not in tasks):
            close = did_you_mean(name, PROMPTS) if name not in PROMPTS else did_you_mean(task, tasks)
            raise RequestError(f"--prompt: got {part!r}{close}, wanted one of {', '.join(PROMPTS)}, or benchmark=prompt")
        named.update({task: name} if equals else dict.fromkeys(tasks, name))
    return {task: PROMPTS[name] for task, name in named.items()}


# --- generation -----------------------------------------------------------------------------------------------------


def _generate(
    directory: Path,
    tasks: dict[str, Problems],
    modes: list[str],
    prompts: dict[str, Prompt],
    settings: run.Settings,
    limit: int | None,
    output: Path,
    batch_size: int,
    tensor_parallel: int,
    device: str,
    verbose: bool,
) -> None:
    from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
    from ms_pangu_quant.inference.model import BLOCK_SIZE, check_head, load

    reader = open_checkpoint(directory)
    check_head(settings.head, reader, device)
    config = reader.config
    tokenizer = Tokenizer.from_directory(directory)
    asked = [
        *run.questions(tasks, modes, prompts, lambda chat, mode: tokenizer.encode_chat(chat, mode=mode), settings, limit)
    ]
    runtime.start(device, "graph", verbose=verbose, tensor_parallel=tensor_parallel)
    job = ranks.current()
    provenance = of_checkpoint(directory, device, settings.head)
    job.agree("checkpoint", provenance["checkpoint_sha256"])
    answer_tokens = min(
        max(len(each.token_ids) for each in asked) + settings.generation.max_new_tokens, config.max_position_embeddings
    )
    cache_tokens = _cache_tokens(config, answer_tokens + 2 * BLOCK_SIZE, min(batch_size, len(asked)))
    model = load(
        directory,
        device,
        kv_cache_tokens=min(job.gather(cache_tokens)),  # ranks that hold one model batch alike
        head=settings.head,
        tensor_parallel=tensor_parallel,
        verbose=verbose,
    )
    with _generation_progress(len(asked)) as (on_tokens, on_answer):
        run.answer(
            model,
            asked,
            run.Target(output, provenance["checkpoint_sha256"], settings, provenance),
            share=run.Share(job, tensor_parallel),
            max_batch=batch_size,
            on_tokens=on_tokens,
            on_answer=on_answer,
        )


def _cache_tokens(config: ModelConfig, answer_tokens: int, batch_size: int) -> int:
    """Room for a batch of the longest answers, in at most a quarter of the memory that is free; at least for one."""
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    affordable = psutil.virtual_memory().available // 4 // token_bytes
    return max(answer_tokens, min(batch_size * answer_tokens, affordable))


@contextmanager
def _generation_progress(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """(called with each pass's tokens, called with each answer) of a bar with answers, tokens/s and the time left."""
    columns = "{task.description:8}", BarColumn(bar_width=24), MofNCompleteColumn(), "{task.fields[speed]}"
    with _bar(*columns) as progress:
        bar = progress.add_task("answers", total=total, speed="")
        tokens, started = 0, time.monotonic()

        def on_tokens(count: int) -> None:
            nonlocal tokens
            tokens += count
            progress.update(bar, speed=f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s")

        yield on_tokens, lambda: progress.advance(bar)
    err.print(f"[dim]{tokens} tokens in {time.monotonic() - started:.0f} s[/dim]")


def _bar(*columns: str | ProgressColumn) -> Progress:
    times = TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, *times, console=err, transient=True, disable=not err.is_terminal)


# --- scoring --------------------------------------------------------------------------------------------------------


def _score(
    tasks: dict[str, Problems],
    samples_file: Path,
    output: Path,
    kind: str,
    limits: Limits,
    workers: int | None,
    as_json: bool,
) -> None:
    samples = load_samples(samples_file, tasks)
    isolation = find_isolation(kind)
    with _bar("{task.description:8}", BarColumn(bar_width=24), MofNCompleteColumn()) as progress:
        bar = progress.add_task("verdicts", total=len(samples))
        results = score(
            samples,
            output / RESULTS_FILE,
            lambda: Sandbox(isolation, limits, min(workers or os.cpu_count() or 1, len(samples))),
            isolation,
            limits,
            on_result=lambda verdict: progress.advance(bar),
        )
    entries = summarize(results, [sample.record for sample in samples], tasks)
    value = {
        "entries": entries,
        "sandbox": {**vars(isolation), "rules_version": VERSION, "limits": vars(limits)},
        **environment(),
    }
    write_json(output / SUMMARY_FILE, value)
    if as_json:
        print(json.dumps(value))
        return
    out.print(_table(entries))
    for line in _remarks(entries, isolation):
        err.print(line, style="yellow", markup=False)


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))  # the longest names fit into 80 columns
    for title in ("benchmark", "mode", "passed", "pass@1, %", "95 %", "length", "cut", "repeats"):
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
        )
    return table


def _remarks(entries: list[dict[str, Any]], isolation: Isolation) -> Iterator[str]:
    if isolation.kind != BUBBLEWRAP:
        yield f"isolation: {isolation.description}"
    for entry in entries:
        name = f"{entry['task']} {entry['mode'] or ''}".strip()
        if entry["problems"] < entry["of"]:
            yield f"{name}: {entry['problems']} of {entry['of']} problems"
        if not entry["complete"]:
            yield f"{name}: {entry['verdicts']['infra_error']} samples could not be judged (infra_error); run it again"
        if entry["prompt_too_long"]:
            yield f"{name}: {entry['prompt_too_long']} prompts are longer than the model's context and count as failed"
