"""The plot of sensitivities: KL of every group of layers alone, block after block."""

from __future__ import annotations

import io

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.sensitivity import Sensitivity

_COLORS = ("#1f77b4", "#d9822b", "#2f8f5b", "#a1459f")


def group_name(group: str) -> str:
    """ "linear_qkv" -> "q/k/v"."""
    return "/".join(site.name.split(".")[1].removesuffix("_proj") for site in layout.SITES if site.fused == group)


def sensitivity_plot(found: Sensitivity) -> str:
    """An SVG document; bars are the standard error over texts."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pangu-quant", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    for color, name in zip(_COLORS, dict.fromkeys(group.group for group in found.groups), strict=False):
        rows = [group for group in found.groups if group.group == name]
        blocks, values = [row.block for row in rows], [max(row.kl, 1e-12) for row in rows]
        above = [row.kl_se or 0.0 for row in rows]
        below = [min(error, 0.99 * value) for error, value in zip(above, values, strict=True)]
        axes.errorbar(
            blocks, values, [below, above], fmt="o-", color=color, markersize=4, linewidth=1.2, label=group_name(name)
        )
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel(f"KL to the float model, nats (alone in {found.schemes[0]})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return text.getvalue()
