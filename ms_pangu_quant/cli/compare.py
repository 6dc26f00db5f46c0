"""pangu-quant compare"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ms_pangu_quant import api
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.cli.console import (
    AsJson,
    Checkpoint,
    EndpointUrl,
    ServedName,
    ServerTimeout,
    Verbose,
    endpoint_of,
    figure,
    out,
    progress_bars,
)
from ms_pangu_quant.errors import RequestError

if TYPE_CHECKING:
    from ms_pangu_quant.inference.compare import Comparison, ServedComparison

Compared = Annotated[
    Path | None, typer.Argument(help="Checkpoint directory, float or quantized; not with --endpoint.", show_default=False)
]


def compare_command(
    checkpoint: Checkpoint,
    directory: Compared = None,
    *,
    data: Annotated[
        Path, typer.Option(help="Text to compare on: rows of text, messages or token_ids.", show_default=False)
    ],
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="Cut each row to so many tokens.", min=2)] = 2048,
    endpoint: EndpointUrl = None,
    model: ServedName = None,
    timeout: ServerTimeout = None,
    top: Annotated[int, typer.Option(help="Tokens of each distribution that the server is asked for.", min=1)] = 20,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """How far a quantized checkpoint is from the float one: KL of next-token distributions, agreement, perplexity.

    With --endpoint, how far what a server computes is from a checkpoint, on the log-probabilities that it gives.

    Example:
        pangu-quant compare openPangu-Embedded-7B pangu-7b-w8a8 \\
            --data heldout.jsonl --limit 100
        pangu-quant compare openPangu-Embedded-7B \\
            --endpoint http://localhost:8000/v1 --data heldout.jsonl
    """
    served = endpoint_of(endpoint, model, timeout)
    if (served is None) == (directory is None):
        raise RequestError("compare: give a second directory, or --endpoint and no second directory")
    result: Comparison | ServedComparison
    with progress_bars() as bars:
        task = bars.add_task("blocks", total=None, kind="count")
        advance = lambda: bars.advance(task)  # noqa: E731
        if served is None:
            assert directory is not None
            result = api.compare(checkpoint, directory, data, limit=limit, max_length=max_length, on_block=advance)
        else:
            texts = bars.add_task("texts", total=limit, kind="count")
            result = api.compare_served(
                checkpoint, served, data, top=top, limit=limit, max_length=max_length,
                on_text=lambda: bars.advance(texts), on_block=advance,
            )  # fmt: skip
    if as_json:
        print(json_text(asdict(result)))
    else:
        out.print(_table(result))


def _table(result: Comparison | ServedComparison) -> Table:
    from ms_pangu_quant.inference.compare import ServedComparison

    error = ": one text has none" if result.kl_se is None else f" {figure(result.kl_se, '.1g')}"
    spread = f"standard error{error}; 99th percentile {figure(result.kl_p99, '.3g')}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("tokens", f"{result.tokens}", f"in {result.texts} texts")
    reference = f"reference {figure(result.ppl_reference, '.4f')}"
    if isinstance(result, ServedComparison):
        table.add_row("mean KL, at least", f"{figure(result.kl_mean, '.3g')} nats", spread)
        given = f"the server gives {result.given:.1f} tokens of each distribution, the others are one event"
        table.add_row("probability in them", figure(result.covered, ".2%"), given)
        perplexity = result.ppl_served
    else:
        table.add_row("mean KL", f"{figure(result.kl_mean, '.3g')} nats", spread)
        perplexity = result.ppl_quantized
    table.add_row("top-1 agreement", figure(result.top1_agreement, ".2%"), "")
    table.add_row("perplexity", figure(perplexity, ".4f"), reference)
    return table
