"""pangu-quant export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_pangu_quant.cli.console import AllowUnserved, Format, chosen_format, err, out, progress_bars, size
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.formats.consumers import WRONG, check_served, facts_of, rows_for
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.finished import is_exported
from ms_pangu_quant.formats.reader import QuantizedReader, open_checkpoint


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
    target = chosen_format(stored_as)
    reader = open_checkpoint(directory)
    if not isinstance(reader, QuantizedReader):  # it has a format, and a writer of another can take it over
        raise RequestError(f"{directory}: is a float checkpoint; wanted a quantized one (pangu-quant quantize makes it)")
    facts = facts_of(reader.config, reader.plan)
    if not allow_unserved:
        check_served(target.NAME, facts)
    if resume and is_exported(reader, target, output):
        out.print(f"{output}: already complete", soft_wrap=True, markup=False)
        return
    with progress_bars() as progress:
        task = progress.add_task("blocks", total=reader.config.num_hidden_layers, kind="count")
        after = export(reader, target, output, resume=resume, on_block=lambda index: progress.advance(task))
    out.print(f"{output}: {reader.format.NAME} -> {target.NAME}, {size(after)}", soft_wrap=True)
    for each in facts:
        for row in rows_for(target.NAME, each):
            if row.verdict == WRONG:
                err.print(f"{each.word}: not for {row.consumer}, which {row.verdict}: {row.note}", soft_wrap=True)
