"""pangu-quant compare"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ms_pangu_quant import api
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.cli.console import AsJson, Checkpoint, Directory, Verbose, figure, out, progress_bars


def compare_command(
    checkpoint: Checkpoint,
    directory: Directory,
    data: Annotated[
        Path, typer.Option(help="Text to compare on: rows of text, messages or token_ids.", show_default=False)
    ],
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Cut each row to so many tokens.", min=2)] = 2048,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """How far a quantized checkpoint is from the float one: KL of next-token distributions, agreement, perplexity.

    Example:
        pangu-quant compare openPangu-Embedded-7B pangu-7b-w8a8 \\
            --data heldout.jsonl --limit 100
    """
    with progress_bars() as bars:
        task = bars.add_task("blocks", total=None, kind="count")
        result = api.compare(
            checkpoint, directory, data, limit=limit, max_length=max_length, on_block=lambda: bars.advance(task)
        )
    if as_json:
        print(json_text(asdict(result)))
        return
    error = ": one text has none" if result.kl_se is None else f" {figure(result.kl_se, '.1g')}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("tokens", f"{result.tokens}", f"in {result.texts} texts")
    table.add_row(
        "mean KL",
        f"{figure(result.kl_mean, '.3g')} nats",
        f"standard error{error}; 99th percentile {figure(result.kl_p99, '.3g')}",
    )
    table.add_row("top-1 agreement", figure(result.top1_agreement, ".2%"), "")
    table.add_row("perplexity", figure(result.ppl_quantized, ".4f"), f"reference {figure(result.ppl_reference, '.4f')}")
    out.print(table)
