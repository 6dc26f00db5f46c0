"""pangu-quant inspect"""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any

import typer
from rich.table import Table

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.cli.console import AsJson, Directory, figure, out, size
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.formats.consumers import INTEGER, REFUSES, WRONG
from ms_pangu_quant.report.inspection import graphs, inspection, servability


def inspect_command(
    directory: Directory,
    servable: Annotated[
        bool, typer.Option("--servable", help="Show which programs compute its schemes, in each format, and how.")
    ] = False,
    graph: Annotated[
        bool, typer.Option("--graph", help="Show the operators of the served network's prefill and decode graphs.")
    ] = False,
    device: Annotated[str, typer.Option(help="Whose operators --graph shows: ascend or cpu. Neither is run.")] = "ascend",
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint directory holds: scheme, bits and error of each layer, and the totals.

    Example:
        pangu-quant inspect pangu-7b-w8a8 --servable
    """
    if servable and graph:
        raise RequestError("--servable and --graph: two different tables; ask for one at a time")
    found = servability(directory) if servable else graphs(directory, device) if graph else inspection(directory)
    if as_json:
        print(json_text(found, indent=2))
    elif graph:
        print_graphs(found)
    elif servable:
        print_servability(found)
    else:
        print_layers(found)


def print_servability(found: dict[str, Any]) -> None:
    """The directory's own format first; another one is an export away."""
    ordered = sorted(found["rows"], key=lambda row: row["format"] != found["format"])
    for (stored_as, kind, group), rows in groupby(ordered, key=itemgetter("format", "scheme", "group_size")):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for width in (20, 18, None):  # of 80 columns
            table.add_column(width=width)
        for row in rows:
            style = {INTEGER: "green", REFUSES: "dim", WRONG: "red"}.get(row["verdict"])
            table.add_row(f"{row['consumer']} {row['versions']}", row["verdict"], row["note"], style=style)
        mark = " (this directory)" if stored_as == found["format"] else ""
        out.print(f"{stored_as}{mark}: {kind}" + (f", groups of {group}" if group else ""), style="bold")
        out.print(table)
    out.print("The sources of each claim are in docs/formats.md and in --json.")


def print_layers(found: dict[str, Any]) -> None:
    """One row for each block: its scheme, bits per weight, output error on calibration texts and on held-out ones, and the
    weight error of each layer.

    A float checkpoint has only the totals.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    short = [site.short for site in layout.SITES]
    for heading in ("block", "scheme", "bits", "error", "held out", *short):
        table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
    per_block = len(layout.SITES)
    for index in range(len(found["layers"]) // per_block):
        layers = found["layers"][index * per_block : (index + 1) * per_block]
        kinds = sorted({layer["scheme"].removesuffix("_DYNAMIC") for layer in layers})
        bits = sum(layer["bits_per_weight"] for layer in layers) / per_block
        errors = (found[name][index] if found[name] else None for name in ("output_error", "held_out_error"))
        table.add_row(
            str(index),
            "+".join(kinds),
            f"{bits:.2f}",
            *map(_number, errors),
            *(_number(layer["weight_error"]) for layer in layers),
        )
    if found["quantized"]:
        out.print(table)
    if found["trained_rows"]:
        out.print(f"MindFormers' training form, taken as: {found['trained_rows']}", soft_wrap=True)
    cache = found["cache"]
    if cache["dtype"] == "int8":
        out.print(
            f"keys and values cached in int8, {cache['bytes_per_token']:,} bytes a token "
            f"(bfloat16: {cache['bytes_per_token_bfloat16']:,}); up to {cache['scales_per_head']} scales a head"
            + (", with zero points" if cache["zero_points"] else ""),
            soft_wrap=True,
        )
    before = found["bytes_before"]
    sizes = f"{size(before)} -> {size(found['bytes'])}" if before else size(found["bytes"])
    out.print(
        f"{sizes}, {found['bits_per_weight']:.2f} bits per weight in {found['weights']:,} weights"
        + ("; errors are relative to the norm" if found["quantized"] else ", not quantized"),
        soft_wrap=True,
    )


def print_graphs(found: dict[str, Any]) -> None:
    """A line for each operator that multiplies or quantizes, with its types, then how often everything else occurs."""
    schemes = ", ".join(f"{count} {kind}" for kind, count in found["layers"].items())
    out.print(
        f"{found['device']} operators of {found['directory']}; linear layers: {schemes}; ? is a dynamic size",
        soft_wrap=True,
    )
    for phase, operators in found["phases"].items():
        out.print(f"\n{phase}: {sum(each['count'] for each in operators)} operators")
        others: Counter[str] = Counter()
        for each in operators:
            if not any(word in each["kind"].lower() for word in ("matmul", "quant", "custom", "attention")):
                others[each["kind"]] += each["count"]
                continue
            types = f"({', '.join(each['inputs'])}) -> {', '.join(each['outputs'])}"
            where = ", ".join(cell.removeprefix("decoder.layers.*.") for cell in each["cells"])
            out.print(f"{each['count']:4} {each['kind']} {types}  {where}", soft_wrap=True, markup=False)
        out.print("     and " + ", ".join(f"{count} {kind}" for kind, count in others.most_common()), soft_wrap=True)


def _number(value: float | None) -> str:
    """Without the 0 in front of the point, so that a row fits into 80 columns."""
    return figure(value, ".4f").removeprefix("0")
