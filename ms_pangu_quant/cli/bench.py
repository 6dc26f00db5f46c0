"""pangu-quant bench"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ms_pangu_quant.checkpoint.config import check_same_model
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.cli.console import AsJson, Device, Directory, Head, Verbose, err, out, progress_bars, size
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats.reader import open_checkpoint

if TYPE_CHECKING:
    from ms_pangu_quant.inference.bench import MachineLimits


def bench_command(
    directory: Directory,
    against: Annotated[
        Path | None, typer.Option(help="Float checkpoint of the same model, measured in turns with it.")
    ] = None,
    prompt_lens: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "256",
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, separated by commas.")] = "1,2,4,8,16,32",
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps of each repetition.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions after one that warms up.")] = 5,
    device: Device = "cpu",
    head: Head = "stored",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure prefill and decode speed and memory, on the CPU beside the limits of the machine.

    Example:
        pangu-quant bench pangu-7b-w8a8 --against openPangu-Embedded-7B \\
            --prompt-lens 256,1024 --batch-sizes 1,8
    """
    from ms_pangu_quant.inference.bench import Subject, bench, blocks_needed, work_of
    from ms_pangu_quant.inference.model import BLOCK_SIZE, load

    lengths, batches = _numbers("--prompt-lens", prompt_lens), _numbers("--batch-sizes", batch_sizes)
    paths = [directory] if against is None else [against, directory]
    readers = [open_checkpoint(path) for path in paths]
    if against is not None and readers[0].format is not None:
        raise CheckpointError(f"--against: {against} is quantized; wanted the float checkpoint")
    if against is not None:  # before minutes of loading
        check_same_model(directory, readers[1].config, against, readers[0].config)
    longest = readers[0].config.max_position_embeddings
    if max(lengths) + new_tokens > longest:
        raise RequestError(f"--prompt-lens: {max(lengths)} + {new_tokens} new tokens, but the model ends at {longest}")
    cache = BLOCK_SIZE * blocks_needed(max(lengths), max(batches), new_tokens)
    subjects = []
    for path, reader in zip(paths, readers, strict=True):
        own_head = "stored" if path == against else head
        model = load(path, device, kv_cache_tokens=cache, head=own_head)
        subjects.append(Subject("float" if reader.format is None else "quantized", model, work_of(model, reader.plan)))
    with progress_bars() as progress:
        task = progress.add_task("measure", total=len(lengths) * len(batches) * len(subjects), kind="count")
        rows, limits = bench(
            subjects,
            lengths,
            batches,
            new_tokens=new_tokens,
            repeats=repeats,
            with_limits=device == "cpu",
            on_measured=lambda: progress.advance(task),
        )
    if as_json:
        print(json_text(rows))
    else:
        out.print(_table(rows))
    if limits is not None:
        _print_machine(rows, limits, err if as_json else out)


def _print_machine(rows: list[dict[str, Any]], limits: MachineLimits, console: Console) -> None:
    console.print(
        f"this machine: int8 {limits.int8 / 1e9:.0f} and float32 {limits.fp32 / 1e9:.0f} billion operations a second, "
        f"memory {limits.bandwidth / 1e9:.1f} GB/s; peak memory {size(2**30 * max(row['peak_rss_gib'] for row in rows))}; "
        + ", ".join(
            f"{name} cache {size(2**20 * mib)}" for name, mib in {r["model"]: r["cache_mib"] for r in rows}.items()
        ),
        soft_wrap=True,
    )


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise RequestError(f"{option}: got {text!r}, wanted positive numbers separated by commas")
    return numbers


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("model", "phase", "batch", "prompt", "latency ms", "+-", "tokens/s", "of limit", "vs float"):
        table.add_column(heading, justify="left" if heading in ("model", "phase") else "right")
    float_rows = {_key(row): row for row in rows if row["model"] == "float"}
    for row in rows:
        base = float_rows.get(_key(row))
        table.add_row(
            row["model"],
            row["phase"],
            str(row["batch_size"]),
            str(row["prompt_len"]),
            f"{row['latency_ms']:.1f}",
            f"{row['spread']:.0%}",
            f"{row['tokens_per_s']:.1f}",
            "-" if row["limit_fraction"] is None else f"{row['limit_fraction']:.0%}",
            "-" if base is None or base is row else f"{base['latency_ms'] / row['latency_ms']:.2f}x",
        )
    return table


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["phase"], row["batch_size"], row["prompt_len"]
