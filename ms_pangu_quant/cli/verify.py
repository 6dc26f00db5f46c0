"""pangu-quant verify"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli.console import AsJson, err, out, progress_bars
from ms_pangu_quant.formats.verify import verify


def verify_command(
    directory: Annotated[Path, typer.Argument(help="Quantized checkpoint directory, in any format.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(help="The float checkpoint it was made from: its weights are compared too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a quantized checkpoint: hashes, description, shapes, values, fused groups; a line for each fault, exit code 2.

    Example:
        pangu-quant verify pangu-7b-w8a8 --against openPangu-Embedded-7B
    """
    reference = CheckpointReader(against) if against else None
    with progress_bars() as progress:
        task = progress.add_task("blocks", total=None, kind="count")
        found = verify(directory, reference, on_block=lambda index: progress.advance(task))
    if as_json:
        print(json_text(asdict(found)))
    else:
        for note in found.notes:
            err.print(f"note: {note}", style="dim", markup=False, soft_wrap=True)
        for fault in found.faults:
            out.print(fault, markup=False, soft_wrap=True)
        if not found.faults:
            out.print(f"{directory}: sound, {found.layers} quantized layers", markup=False, soft_wrap=True)
    if found.faults:
        raise typer.Exit(2)
