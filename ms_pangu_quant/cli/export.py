"""pangu-quant export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_pangu_quant import api
from ms_pangu_quant.cli.console import (
    AllowUnserved,
    Format,
    err,
    out,
    progress_bars,
    size,
    tell_unserved_tokenizer,
    tell_unusable_tokenizer,
)


def export_command(
    directory: Annotated[Path, typer.Argument(help="Quantized checkpoint directory, in any format.", show_default=False)],
    stored_as: Format,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; must be empty or absent, or --resume.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished export in --output.")] = False,
    allow_unserved: AllowUnserved = False,
) -> None:
    """Write a quantized checkpoint in another format; the float checkpoint is not needed.

    Example:
        pangu-quant export pangu-7b-w8a8 --format ascend \\
            --output pangu-7b-w8a8-ascend
    """
    tell_unusable_tokenizer(directory)
    with progress_bars() as bars:
        task = bars.add_task("blocks", total=None, kind="count")
        found = api.export(
            directory,
            output,
            stored_as=stored_as,
            resume=resume,
            allow_unserved=allow_unserved,
            on_block=lambda index: bars.advance(task),
        )
    if found.was_complete:
        out.print(f"{output}: already complete", soft_wrap=True, markup=False)
        return
    out.print(f"{output}: {found.stored_as_before} -> {found.stored_as}, {size(found.bytes)}", soft_wrap=True)
    for each, row in found.wrong:
        err.print(f"{each.word}: not for {row.consumer}, which {row.verdict}: {row.note}", soft_wrap=True)
    tell_unserved_tokenizer(output)
