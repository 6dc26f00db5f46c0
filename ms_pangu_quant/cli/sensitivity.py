"""pangu-quant sensitivity, and how quantize spends a budget"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.files import write_atomically
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli.console import AsJson, Checkpoint, Verbose, calibration_data, err, out, progress_bars, size
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.formats.reader import Format
from ms_pangu_quant.mixed.sensitivity import DEFAULT_TOKENS, Sensitivity, assigned, split
from ms_pangu_quant.pipeline.estimate import sensitivity_seconds
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.recipe.recipe import KEEP_FLOAT, Recipe
from ms_pangu_quant.report.sensitivity_plot import group_name, sensitivity_plot

_DEARER = "w8a8"


def sensitivity_command(
    checkpoint: Checkpoint,
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe whose transforms and rounding are used: with a budget, or with a scheme to compare to w8a8.",
            show_default=False,
        ),
    ],
    calibration: Annotated[Path, typer.Option(help="Calibration data, as for quantize.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file to write; a plot (.svg) beside it.", show_default=False)
    ],
    tokens: Annotated[
        int | None, typer.Option(help="Measure KL on so many tokens of the calibration data (default: 4096).", min=2)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it takes: time and disk. Writes nothing.")] = False,
    allow_benchmark_overlap: Annotated[
        bool,
        typer.Option("--allow-benchmark-overlap", help="Accept calibration data that contains HumanEval or MBPP problems."),
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Rank groups of layers by the output error and the KL that each causes when it alone is quantized.

    A copy of the measured texts' hidden states goes through the model for each of the 4 groups of each block, so time grows
    with the square of the number of blocks: seconds for the embedded checkpoint, hours for a 7B on two cores (--dry-run
    tells; --tokens makes it proportionally cheaper). Statistics are taken from the other texts of the calibration data.
    A killed run goes on with --resume.

    Example:
        pangu-quant sensitivity openPangu-Embedded-7B --recipe w4a8_mixed \\
            --calibration chats.jsonl --output sensitivity.json
    """
    reader, chosen = CheckpointReader(checkpoint), load_recipe(find_recipe(recipe))
    schemes = _schemes(chosen)
    data = calibration_data(calibration, checkpoint, reader.config, chosen, allow_benchmark_overlap)
    if dry_run:
        _print_cost(reader, chosen, data, tokens)
        return
    if output.is_dir() or not output.parent.is_dir():
        raise RequestError(f"--output: {output} is not a file in a directory that exists")
    found = measured(reader, chosen, schemes, output, data=data, tokens=tokens, resume=resume, verbose=verbose)
    if as_json:
        print(output.read_text(encoding="utf-8"))
        return
    print_ranking(found)
    out.print(f"{output}, {output.with_suffix('.svg')}", soft_wrap=True)


def _schemes(recipe: Recipe) -> tuple[str, str]:
    if recipe.budget is not None:
        cheap, dear = recipe.budget.schemes
        return cheap, dear
    if recipe.scheme in (_DEARER, KEEP_FLOAT):
        raise RequestError(
            f"{recipe.where}: scheme is {recipe.scheme}; wanted a budget, or a scheme to compare with {_DEARER}"
        )
    return recipe.scheme, _DEARER


def measured(
    reader: CheckpointReader,
    recipe: Recipe,
    schemes: tuple[str, str],
    output: Path,
    *,
    data: TokenData,
    tokens: int | None,
    resume: bool,
    verbose: bool,
) -> Sensitivity:
    """Measure under a progress bar and write `output` and its plot."""
    from ms_pangu_quant.network import runtime

    runtime.start("cpu", "graph", verbose=verbose)
    from ms_pangu_quant.mixed.measure import measure, total_steps

    with progress_bars() as progress:
        task = progress.add_task("measuring", total=total_steps(reader.config.num_hidden_layers), kind="count")
        found = measure(
            reader,
            recipe,
            schemes,
            output.with_name(f"{output.name}.partial"),
            data=data,
            tokens=tokens or DEFAULT_TOKENS,
            resume=resume,
            on_step=lambda streams: progress.advance(task, streams),
        )
    write_atomically(output.with_suffix(".svg"), [sensitivity_plot(found).encode()])
    found.save(output)
    return found


def with_budget_spent(
    reader: CheckpointReader,
    recipe: Recipe,
    stored_as: Format,
    output: Path,
    *,
    given: Path | None,
    data: TokenData | None,
    resume: bool,
    dry_run: bool,
    verbose: bool,
) -> Recipe:
    """The recipe with the schemes that its budget buys, from the sensitivities in `given`, or in OUTPUT.sensitivity.json,
    which is measured and written first if it is not there."""
    if recipe.budget is None:
        if given is not None:
            raise RequestError(f"--sensitivity: {recipe.where} has no budget to spend on it")
        return recipe
    path = given or output.with_name(f"{output.name}.sensitivity.json")
    if path.exists() or given:
        found = Sensitivity.load(path)
    elif dry_run:
        raise RequestError(
            f"--dry-run: {recipe.where} has a budget, and what it buys follows from sensitivities: pass --sensitivity FILE "
            "(pangu-quant sensitivity makes one, and its --dry-run tells what that takes)"
        )
    else:
        if data is None:
            raise RequestError(f"{recipe.where}: a budget needs --calibration FILE, or --sensitivity FILE besides")
        err.print(f"measuring sensitivities for the budget -> {path}", soft_wrap=True)
        cheap, dear = recipe.budget.schemes
        found = measured(reader, recipe, (cheap, dear), path, data=data, tokens=None, resume=resume, verbose=verbose)
    spent = assigned(recipe, reader.config, found, stored_as)
    assert spent.assignment is not None
    counts = {name: sum(each == name for each in spent.assignment.schemes.values()) for name in recipe.budget.schemes}
    err.print(
        f"budget: {spent.assignment.bits_per_weight:.3f} bits per weight, predicted KL {spent.assignment.predicted_kl:.3g} "
        f"({', '.join(f'{count} layers {name}' for name, count in counts.items())})",
        soft_wrap=True,
    )
    return spent


def print_ranking(found: Sensitivity, shown: int = 12) -> None:
    cheap, dear = found.schemes
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "block", "layers", "KL alone", "+-", f"output error {cheap}", dear):
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    ranked = sorted(found.groups, key=lambda group: -group.kl)
    for place, group in enumerate(ranked[:shown], 1):
        errors = (f"{group.output_error[name]:.5f}" for name in found.schemes)
        table.add_row(
            str(place),
            str(group.block),
            group_name(group.group),
            f"{group.kl:.3g}",
            "-" if group.kl_se is None else f"{group.kl_se:.1g}",
            *errors,
        )
    out.print(table)
    rest = f"; {len(ranked) - shown} more in the file" if len(ranked) > shown else ""
    total = sum(group.kl for group in found.groups)
    out.print(
        f"all layers: KL {found.together[cheap]:.3g} in {cheap} (the sum of each alone is {total:.3g}), "
        f"{found.together[dear]:.3g} in {dear}{rest}",
        soft_wrap=True,
    )


def _print_cost(reader: CheckpointReader, recipe: Recipe, data: TokenData, tokens: int | None) -> None:
    known, kept = (sum(map(len, texts)) for texts in split(data, tokens or DEFAULT_TOKENS))
    seconds = sensitivity_seconds(reader.config, recipe, known, kept)
    disk = 2 * (4 * reader.config.num_hidden_layers + 3) * kept * reader.config.hidden_size * 4
    out.print(
        f"statistics of {known} tokens, KL on {kept} others: about {seconds / 60:.1f} minutes on this machine, up to "
        f"{size(disk)} of disk beside the output",
        soft_wrap=True,
    )
