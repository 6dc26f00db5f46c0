"""The command line: pangu-quant quantize | inspect | compare | generate.

Results go to the standard output, progress and errors to the standard error. Exit codes: 0 done, 2 something the user can
mend (one line says what), 130 interrupted.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ms_pangu_quant.calibration.data import TokenData, load_token_data
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, Tokenizer
from ms_pangu_quant.errors import PanguQuantError, RequestError
from ms_pangu_quant.estimate import Estimate, estimate
from ms_pangu_quant.formats.mindformers import QuantizedReader, open_checkpoint
from ms_pangu_quant.pipeline import REPORT_FILE, BlockReport, check_data, quantize
from ms_pangu_quant.recipe import Recipe, find_recipe, load_recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-training quantization (W8A8, W4A8) of openPangu-Embedded checkpoints in MindSpore.",
)
out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

Checkpoint = Annotated[
    Path, typer.Argument(help="Hugging Face checkpoint directory (openPangu-Embedded or Llama).", show_default=False)
]
Directory = Annotated[Path, typer.Argument(help="Checkpoint directory, float or quantized.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what MindSpore and MindFormers print.")]
Device = Annotated[str, typer.Option(help="cpu or ascend.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command("quantize")
def quantize_command(
    checkpoint: Checkpoint,
    recipe: Annotated[
        str, typer.Option(help="Recipe file, or the name of a shipped one: w8a8, w4a8_g128, ...", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Directory to write; must be empty or absent, or --resume.", show_default=False)],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Calibration data: .jsonl, .parquet or a dataset directory whose rows have text, messages or token_ids."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in --output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: schemes, size, memory, time. Writes nothing.")
    ] = False,
    allow_benchmark_overlap: Annotated[
        bool, typer.Option("--allow-benchmark-overlap", help="Accept calibration data that contains HumanEval or MBPP problems.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a float checkpoint, one block in memory at a time.

    Example: pangu-quant quantize openPangu-7B --recipe w8a8 --calibration chats.jsonl --output openPangu-7B-w8a8
    """
    reader = CheckpointReader(checkpoint)
    chosen = load_recipe(find_recipe(recipe))
    data = None
    if calibration is not None:
        settings = chosen.calibration
        data = _token_data(
            calibration, checkpoint, reader.config, settings.samples, settings.max_length, settings.seed, allow_benchmark_overlap
        )
    if dry_run:
        check_data(reader.config, chosen, data)
        _print_plan(estimate(reader, chosen, data), chosen, data)
        return
    if data is not None:
        from ms_pangu_quant.network import runtime

        runtime.start("cpu", "graph", verbose=verbose)
    started = time.monotonic()
    with _progress() as progress:
        hashing = progress.add_task("hashing", total=sum(path.stat().st_size for path in reader.files.files), kind="bytes")
        blocks = progress.add_task("blocks", total=reader.config.num_hidden_layers, kind="count", start=False)
        on_block = _block_printer(progress, blocks, reader.config.num_hidden_layers)
        result = quantize(
            reader,
            chosen,
            output,
            data=data,
            resume=resume,
            on_block=on_block,
            on_bytes=lambda count: progress.advance(hashing, count),
        )
    ratio = result.bytes_after / result.bytes_before
    out.print(
        f"{result.output}: {_size(result.bytes_before)} -> {_size(result.bytes_after)} ({ratio:.0%}), "
        f"{time.monotonic() - started:.0f} s, peak memory {_peak_memory()}"
    )
    _print_layers(_inspection(output))


@app.command("inspect")
def inspect_command(directory: Directory, as_json: AsJson = False) -> None:
    """Show what a checkpoint directory holds: scheme, bits and error of each layer, and the totals."""
    inspection = _inspection(directory)
    if as_json:
        print(json.dumps(inspection, indent=2))
    else:
        _print_layers(inspection)


@app.command("compare")
def compare_command(
    checkpoint: Checkpoint,
    directory: Directory,
    data: Annotated[Path, typer.Option(help="Text to compare on: rows of text, messages or token_ids.", show_default=False)],
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Cut each row to so many tokens.", min=2)] = 2048,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """How far a quantized checkpoint is from the float one: KL of next-token distributions, agreement, perplexity."""
    from ms_pangu_quant.inference.compare import compare
    from ms_pangu_quant.network import runtime

    config = open_checkpoint(checkpoint).config
    rows = _token_data(data, checkpoint, config, limit, min(max_length, config.max_position_embeddings), None, True)
    runtime.start("cpu", "graph", verbose=verbose)
    with _progress() as progress:
        task = progress.add_task("blocks", total=2 * config.num_hidden_layers, kind="count")
        result = compare(checkpoint, directory, rows.sequences, on_block=lambda: progress.advance(task))
    if as_json:
        print(json.dumps(asdict(result)))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("tokens", f"{result.tokens}", f"in {len(rows.sequences)} texts")
    table.add_row(
        "mean KL", f"{result.kl_mean:.3g} nats", f"standard error {result.kl_se:.1g}; 99th percentile {result.kl_p99:.3g}"
    )
    table.add_row("top-1 agreement", f"{result.top1_agreement:.2%}", "")
    table.add_row("perplexity", f"{result.ppl_quantized:.4f}", f"reference {result.ppl_reference:.4f}")
    out.print(table)


@app.command("generate")
def generate_command(
    directory: Directory,
    prompt: Annotated[
        list[str] | None, typer.Option(help="User message; may be given several times; - reads standard input.")
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(help="Prompt as comma-separated ids, for a checkpoint without a tokenizer.")
    ] = None,
    mode: Annotated[str, typer.Option(help=f"Thinking mode: {', '.join(THINKING_MODES)}.")] = "slow_think",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the distribution that is drawn from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(help="Makes a draw repeatable.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")] = None,
    as_json: AsJson = False,
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Generate text from a float or quantized checkpoint in MindSpore graph mode."""
    from ms_pangu_quant.inference.model import load

    if bool(prompt) == bool(token_ids):
        raise RequestError("generate: give --prompt, or --token-ids for a checkpoint without a tokenizer")
    prompts: list[Any] = [sys.stdin.read() if text == "-" else text for text in prompt or []]
    if token_ids:
        try:
            prompts = [[int(part) for part in token_ids.split(",")]]
        except ValueError:
            raise RequestError(f"--token-ids: got {token_ids!r}, wanted numbers separated by commas") from None
    needed = max_new_tokens + max(map(len, prompts))  # a character is at least one byte, a token at least one too
    model = load(directory, device, kv_cache_tokens=max(8192, 2 * needed), verbose=verbose)
    started = time.monotonic()
    answers = model.generate(
        prompts, max_new_tokens, mode=mode, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or ()
    )
    seconds = time.monotonic() - started
    for number, answer in enumerate(answers):
        if as_json:
            print(json.dumps(asdict(answer), ensure_ascii=False))
            continue
        if number:
            print()
        if answer.thought is not None:
            print(f"[thought]\n{answer.thought}\n[answer]")
        print(answer.answer if answer.text else " ".join(map(str, answer.token_ids)))
    count = sum(len(answer.token_ids) for answer in answers)
    err.print(f"[dim]{count} tokens in {seconds:.1f} s; ended by {', '.join(answer.finish_reason for answer in answers)}[/dim]")


def _token_data(
    path: Path,
    checkpoint: Path,
    config: ModelConfig,
    samples: int | None,
    max_length: int,
    seed: int | None,
    allow_benchmark_overlap: bool,
) -> TokenData:
    tokenizer = Tokenizer.from_directory(checkpoint) if (checkpoint / "tokenizer.model").exists() else None
    return load_token_data(
        path,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        max_length=max_length,
        samples=samples,
        seed=seed,
        allow_benchmark_overlap=allow_benchmark_overlap,
    )


def _progress() -> Progress:
    class Amount(MofNCompleteColumn):
        def render(self, task):
            return DownloadColumn().render(task) if task.fields["kind"] == "bytes" else super().render(task)

    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=24),
        Amount(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _block_printer(progress: Progress, task: Any, total: int) -> Callable[[BlockReport], None]:
    """Prints one line for each finished block and moves the bar."""
    previous = time.monotonic()

    def on_block(report: BlockReport) -> None:
        nonlocal previous
        progress.start_task(task)
        seconds, previous = time.monotonic() - previous, time.monotonic()
        parts = [f"block {report.index + 1:>{len(str(total))}}/{total}"]
        if report.output_error is not None:
            parts.append(f"output error {report.output_error:.4f}")
        if report.weight_error:
            parts.append(f"weight error {max(report.weight_error.values()):.4f}")
        progress.console.print("  ".join([*parts, f"{seconds:.1f} s", _peak_memory()]))
        progress.advance(task)

    return on_block


def _inspection(directory: Path) -> dict[str, Any]:
    """What `inspect --json` prints."""
    reader = open_checkpoint(directory)
    quantized = isinstance(reader, QuantizedReader)
    report_path = directory / REPORT_FILE
    report = json.loads(report_path.read_text(encoding="utf-8")) if quantized and report_path.exists() else {}
    blocks = report.get("blocks", [])
    layers, bits, weights = [], 0.0, 0
    for index in range(reader.config.num_hidden_layers):
        for site in layout.SITES:
            name = f"{layout.block_prefix(index)}{site.name}"
            outputs, inputs = layout.site_shape(reader.config, site)
            stored = 8 * sum(
                entry.nbytes
                for key, entry in reader.files.entries.items()
                if key.startswith(f"{name}.") and not key.endswith(".bias")
            )
            error = blocks[index]["weight_error"].get(site.name) if index < len(blocks) else None
            layers.append(
                {
                    "name": name,
                    "scheme": reader.kinds[f"{name}.weight"] if quantized else "FLOAT",
                    "bits_per_weight": stored / (outputs * inputs),
                    "weight_error": error,
                }
            )
            bits, weights = bits + stored, weights + outputs * inputs
    return {
        "directory": str(directory),
        "quantized": quantized,
        "layers": layers,
        "output_error": [block["output_error"] for block in blocks],
        "bytes": reader.files.nbytes,
        "bytes_before": report.get("bytes_before"),
        "bits_per_weight": bits / weights,
        "weights": weights,
    }


def _print_layers(inspection: dict[str, Any]) -> None:
    """One row for each block: its scheme, bits per weight, output error and the weight error of each layer.

    A float checkpoint has only the totals.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    short = [site.name.split(".")[1].removesuffix("_proj") for site in layout.SITES]
    for heading in ("block", "scheme", "bits", "output", *short):
        table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
    per_block = len(layout.SITES)
    for index in range(len(inspection["layers"]) // per_block):
        layers = inspection["layers"][index * per_block : (index + 1) * per_block]
        kinds = sorted({layer["scheme"].removesuffix("_DYNAMIC") for layer in layers})
        bits = sum(layer["bits_per_weight"] for layer in layers) / per_block
        output = inspection["output_error"][index] if inspection["output_error"] else None
        table.add_row(
            str(index), "+".join(kinds), f"{bits:.2f}", _number(output), *(_number(layer["weight_error"]) for layer in layers)
        )
    if inspection["quantized"]:
        out.print(table)
    before = inspection["bytes_before"]
    size = f"{_size(before)} -> {_size(inspection['bytes'])}" if before else _size(inspection["bytes"])
    out.print(
        f"{size}, {inspection['bits_per_weight']:.2f} bits per weight in {inspection['weights']:,} weights"
        + ("; errors are relative to the norm" if inspection["quantized"] else ", not quantized"),
        soft_wrap=True,
    )


def _print_plan(plan: Estimate, recipe: Recipe, data: TokenData | None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("layers", "blocks", "scheme", "bits per weight"):
        table.add_column(heading)
    for names, blocks, kind, bits in plan.groups:
        table.add_row(names, blocks, kind, f"{bits:.2f}")
    out.print(table)
    if data is not None:
        out.print(
            f"calibration: {len(data.sequences)} texts, {data.tokens} tokens ({data.truncated} cut to "
            f"{recipe.calibration.max_length})",
            soft_wrap=True,
        )
    out.print(
        f"size: {_size(plan.bytes_before)} -> {_size(plan.bytes_after)}; peak memory about {_size(plan.peak_bytes)}; "
        f"about {plan.seconds / 60:.1f} minutes on this machine",
        soft_wrap=True,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _peak_memory() -> str:
    return _size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; arguments default to the process's. Returns the exit code (and exits with it as a console script)."""
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except PanguQuantError as error:
        err.print(f"pangu-quant: error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        err.print("pangu-quant: interrupted", style="red")
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own: a wrong option
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
