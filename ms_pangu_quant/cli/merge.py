"""pangu-quant merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_pangu_quant.cli.console import Verbose, out, progress_bars, size


def merge_command(
    trained: Annotated[
        Path,
        typer.Argument(help="What MindFormers' training saved: files, iteration_N, or rank_N folders.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must be empty or absent.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint directory the training started from: config.json and tokenizer are taken from it. "
            "TRAINED's own by default."
        ),
    ] = None,
    strategy: Annotated[
        Path | None, typer.Option(help="Strategy file, or folder of strategy files, of rank_N folders.")
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="End of the name of the file to take from each rank_N folder, such as 10_2.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write what MindFormers' training saved as one Hugging Face checkpoint directory.

    Only rank_N folders need it; what else training saves, quantize reads as it is once config.json is beside it.

    Example:
        pangu-quant merge output/checkpoint --strategy output/strategy \\
            --config openPangu-Embedded-7B --output trained-7b
    """
    from ms_pangu_quant.network import runtime
    from ms_pangu_quant.network.merge import merge

    if strategy is not None:
        runtime.start()
    with progress_bars() as progress:
        task = progress.add_task("files", total=None, kind="count")
        total = merge(
            trained,
            output,
            start=config,
            strategy=strategy,
            suffix=suffix,
            on_file=lambda done, files: progress.update(task, completed=done, total=files),
        )
    out.print(f"{output}: {size(total)} in Hugging Face's form", soft_wrap=True)
