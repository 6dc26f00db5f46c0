"""The plot of sensitivities: KL of every group of layers alone, block after block."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.mixed.sensitivity import Sensitivity

_COLORS = ("#1f77b4", "#d9822b", "#2f8f5b", "#a1459f")


def group_name(group: str) -> str:
    """ "linear_qkv" -> "q/k/v"."""
    return "/".join(site.short for site in layout.fused(group))


def label(found: Sensitivity) -> str:
    return f"KL to the float model, nats (alone in {found.schemes[0]})"


def draw(axes: Any, found: Sensitivity, colors: Sequence[str]) -> list[str]:
    """A line for each kind of group, block after block; returns what they are called. Bars are the standard error."""
    names = list(dict.fromkeys(group.group for group in found.groups))
    for color, name in zip(colors, names, strict=False):
        rows = [group for group in found.groups if group.group == name]
        values = [max(row.kl, 1e-12) for row in rows]
        above = [row.kl_se or 0.0 for row in rows]
        below = [min(error, 0.99 * value) for error, value in zip(above, values, strict=True)]
        axes.errorbar(
            [row.block for row in rows], values, [below, above], fmt="o-", color=color, markersize=4, linewidth=1.2
        )
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return [group_name(name) for name in names]


def sensitivity_plot(found: Sensitivity) -> str:
    """An SVG document; bars are the standard error over texts."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pangu-quant", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    names = draw(axes, found, _COLORS)
    axes.set_ylabel(label(found))
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(names, frameon=False, ncols=4)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return text.getvalue()
