"""The report's plots as SVG whose colours are the page's, so that they follow its light and dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ms_pangu_quant.evaluation.statistics import Interval
from ms_pangu_quant.mixed.sensitivity import Sensitivity
from ms_pangu_quant.report.budgets import curves
from ms_pangu_quant.report.comparison import Comparison
from ms_pangu_quant.report.prediction import BATCHES, PROMPT, Prediction
from ms_pangu_quant.report.results import Cell, Run, cells
from ms_pangu_quant.report.sensitivity_plot import draw, label
from ms_pangu_quant.report.speed import Speed, cases

if TYPE_CHECKING:
    from ms_pangu_quant.report.tuning import TuningRow

_TEXT, _GRID = "#010101", "#020202"
_SERIES = tuple(f"#0{number}0303" for number in range(1, 8))  # stand-ins, replaced by the page's variables
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))
_HATCH_ALPHA = 0.45


def scores(runs: Sequence[Run]) -> str:
    """pass@1 with its interval, a group of points for each task and mode."""
    groups = [*cells(runs)]
    figure, axes = _figure(groups)
    for number, run in enumerate(runs):
        for place, cell in enumerate(groups):
            score = run.entries.get(cell, {}).get("pass@1")
            if score:
                _point(axes, place, number, len(runs), Interval(score["value"], score["low"], score["high"]))
    axes.set_ylim(0, 105)
    return _svg(figure, axes, _names(groups), "pass@1, %", [run.name for run in runs])


def retention(runs: Sequence[Run], comparisons: Sequence[Comparison], wanted: float) -> str | None:
    """Retention with its interval; a line at the share that is tested for. None where there is none to show."""
    shown = [each for each in comparisons if each.retention is not None]
    groups = [*dict.fromkeys(each.cell for each in shown)]
    if not groups:
        return None
    figure, axes = _figure(groups)
    names = [run.name for run in runs]
    for each in shown:
        ratio = each.retention.ratio if each.retention else None
        if ratio:
            number = names.index(each.run.name)
            _point(axes, groups.index(each.cell), number, len(runs), ratio)
    axes.axhline(100, color=_GRID, linewidth=1)
    axes.axhline(100 * wanted, color=_TEXT, linewidth=1, linestyle=(0, (4, 3)))
    return _svg(figure, axes, _names(groups), "retention, %", names[1:], range(1, len(names)))


def lengths(runs: Sequence[Run]) -> str | None:
    """Mean thought and answer length in tokens, stacked. None where no run has token counts."""
    groups = [cell for cell in cells(runs) if any(_means(run, cell) for run in runs)]
    if not groups:
        return None
    figure, axes = _figure(groups)
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        for place, cell in enumerate(groups):
            found = _means(run, cell)
            if found:
                left = place - 0.4 + width * (number + 0.5)
                axes.bar(left, found[0], width * 0.85, color=_SERIES[number], alpha=_HATCH_ALPHA)
                axes.bar(left, found[1], width * 0.85, bottom=found[0], color=_SERIES[number])
    return _svg(figure, axes, _names(groups), "tokens (pale: thought)", [run.name for run in runs])


def budgets(runs: Sequence[Run]) -> str | None:
    """pass@1 against the tokens spent, by budget: a panel for each task and way of drawing, a line for each run and mode,
    which ends in a dot where the run itself is. None where no run has token counts."""
    found = curves(runs)
    panels = [*dict.fromkeys((cell.task, cell.decoding) for cell in found)]
    if not panels:
        return None
    modes = [*dict.fromkeys(cell.mode for cell in found)]
    figure, all_axes = _figure([], len(panels))
    for (task, decoding), axes in zip(panels, all_axes, strict=True):
        for cell, of in ((cell, of) for cell, of in found.items() if (cell.task, cell.decoding) == (task, decoding)):
            for name, each in of.items():
                number = [run.name for run in runs].index(name)
                spent, passed = zip(*each.points(), strict=True)
                style = {"color": _SERIES[number], "linestyle": _STYLES[modes.index(cell.mode) % len(_STYLES)]}
                axes.step(spent, [100 * share for share in passed], where="post", linewidth=1.4, **style)
                axes.plot(spent[-1:], [100 * passed[-1]], "o", color=_SERIES[number], markersize=4)
        axes.set_ylim(0, 105)
        axes.set_xlim(left=0)
        axes.set_xlabel(_plain("mean tokens spent" + (f", {task}" if len(panels) > 1 else "")))
        if len({each for _, each in panels}) > 1:
            axes.set_title(_plain(decoding or "decoding not known"), fontsize=10)
    styles = dict(zip(modes, _STYLES * len(modes), strict=False)) if len(modes) > 1 else {}
    return _svg(figure, all_axes[0], None, "pass@1, %", [run.name for run in runs], styles=styles)


def block_errors(runs: Sequence[Run]) -> str | None:
    """Relative error of each block's output, from the quantization reports. None where no run has one."""
    series = []
    for number, run in enumerate(runs):
        blocks = (run.provenance.get("recipe") or {}).get("blocks") or []
        errors = [block.get("output_error") for block in blocks]
        if errors and all(error is not None for error in errors):
            series.append((number, run.name, errors))
    if not series:
        return None
    figure, axes = _figure([])
    for number, _, errors in series:
        axes.plot(range(len(errors)), errors, "o-", color=_SERIES[number], markersize=4, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(
        figure, axes, None, "relative output error", [name for _, name, _ in series], [number for number, _, _ in series]
    )


def prefill(runs: Sequence[Run], speeds: Sequence[Speed]) -> str | None:
    """Prefill latency against batch size for the longest prompt; dashed: the float model measured in turns with it.

    A bench that is called like a run has its colour. None where nothing was measured at two batch sizes.
    """
    lengths = [length for phase, length, _ in cases(speeds) if phase == "prefill"]
    shown = [case for case in cases(speeds) if case[:2] == ("prefill", max(lengths, default=0))]
    if len(shown) < 2:
        return None
    figure, axes = _figure([])
    names = [run.name for run in runs]
    names += [speed.name for speed in speeds if speed.name not in names]
    colors = [names.index(speed.name) % len(_SERIES) for speed in speeds]
    for number, speed in zip(colors, speeds, strict=True):
        for table, style in ((speed.quantized, "o-"), (speed.floating, "o--")):
            found = [case for case in shown if case in table]
            latencies = [table[case]["latency_ms"] for case in found]
            axes.plot([case[2] for case in found], latencies, style, color=_SERIES[number], markersize=4, linewidth=1.5)
    _by_batch(axes, [case[2] for case in shown], f"batch size, prompts of {shown[0][1]} tokens (dashed: float)")
    return _svg(figure, axes, None, "prefill latency, ms", [speed.name for speed in speeds], colors)


def prediction(found: Prediction | None) -> str | None:
    """Predicted prefill latency against batch size, a line for each precision."""
    if found is None:
        return None
    figure, axes = _figure([])
    for number, latencies in enumerate(found.prefill.values()):
        axes.plot(BATCHES, latencies, "o:", color=_SERIES[number], markersize=4, linewidth=1.5)
    _by_batch(axes, BATCHES, f"batch size, prompts of {PROMPT} tokens")
    return _svg(figure, axes, None, "predicted prefill latency, ms", [*found.prefill], [*range(len(found.prefill))])


def _by_batch(axes: Any, batches: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel(label)


def sensitivity(found: Sensitivity | None) -> str | None:
    """KL of every group of layers alone."""
    if found is None:
        return None
    figure, axes = _figure([])
    names = draw(axes, found, _SERIES[1:])
    return _svg(figure, axes, None, label(found), names, [*range(1, 1 + len(names))])


def tuning(rows: Sequence[TuningRow], limit: float | None) -> str | None:
    """KL against bits per weight of the candidates of a search, numbered; dashed: the limit. None where there is none."""
    if not any(row.kl for row in rows):
        return None
    figure, axes = _figure([])
    kinds = {"meets": 3, "undecided": 2, "fails": 5}
    for number, row in enumerate(rows, 1):
        if row.kl is not None and row.upper is not None:
            above = max(0.0, row.upper - row.kl)
            axes.errorbar(
                [row.bits],
                [row.kl],
                [[0.0], [above]],
                fmt="o",
                color=_SERIES[kinds[row.verdict]],
                markersize=5,
                capsize=2.5,
            )
            axes.annotate(str(number), (row.bits, row.kl), (6, -3), textcoords="offset points", fontsize=8)
    if limit is not None:
        axes.axhline(limit, color=_TEXT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    return _svg(
        figure, axes, None, "KL to the float model, nats", ["meets the target", "undecided", "fails"], [*kinds.values()]
    )


def _means(run: Run, cell: Cell) -> tuple[float, float] | None:
    entry = run.entries.get(cell)
    answer = entry and entry["lengths"]["answer_tokens"]
    if not entry or not answer:
        return None
    thought = entry["lengths"]["thought_tokens"]
    return (thought["mean"] * thought["count"] / answer["count"] if thought else 0.0), answer["mean"]


def _figure(groups: Sequence[Cell], panels: int = 0) -> tuple[Any, Any]:
    """(figure, its axes, or a list of so many that share theirs)."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "pangu-quant"}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT)
    settings |= {"axes.edgecolor": _GRID, "grid.color": _GRID}
    pyplot.rcParams.update(settings)
    columns = min(panels, 3) or 1
    rows = -(-panels // columns) or 1
    width = 7.0 if panels == 1 else 3.2 * columns + 0.6 if panels else max(5.2, min(9.6, 1.25 * len(groups) + 1))
    figure, grid = pyplot.subplots(rows, columns, figsize=(width, 3.1 * rows), sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for unused in grid.flat[max(panels, 1) :]:
        unused.remove()
    return figure, ([*grid.flat][:panels] if panels else grid[0, 0])


def _names(groups: Sequence[Cell]) -> list[str]:
    """For an axis; with the decoding where there are several."""
    several = len({cell.decoding for cell in groups}) > 1
    drawn = [cell.decoding.replace(", ", "\n") or "not known" if several else "" for cell in groups]
    return [_plain(f"{cell.task}\n{cell.mode}\n{each}".strip()) for cell, each in zip(groups, drawn, strict=True)]


def _point(axes: Any, place: int, number: int, count: int, share: Interval) -> None:
    """Of run `number` of `count`, in percent."""
    x = place + (number - (count - 1) / 2) * min(0.22, 0.7 / count)
    bars = [[100 * max(0.0, share.value - share.low)], [100 * max(0.0, share.high - share.value)]]
    axes.errorbar([x], [100 * share.value], bars, fmt="o", color=_SERIES[number], markersize=5, linewidth=1.6, capsize=2.5)


def _svg(
    figure: Any,
    axes: Any,
    groups: Sequence[str] | None,
    label: str,
    names: Sequence[str],
    colors: Sequence[int] | None = None,
    styles: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """A legend of names, in the colours of these places or of their own, and of styles of lines."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    if groups is not None:
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel(label)
    shown = [_plain(name) for name in names]
    numbers = range(len(names)) if colors is None else colors
    handles = [Line2D([], [], marker="o", linestyle="", color=_SERIES[number]) for number in numbers]
    look: dict[str, Any] = {"loc": "upper left", "frameon": False, "borderaxespad": 0.2}
    figure.legend(handles, shown, ncols=len(shown) if sum(map(len, shown)) < 48 else 4, **look)
    top = 1 - 0.25 / figure.get_figheight()  # below one line
    if styles:
        lines = [Line2D([], [], color=_TEXT, linewidth=1.4, linestyle=style) for style in styles.values()]
        figure.legend(lines, [*map(_plain, styles)], ncols=len(lines), bbox_to_anchor=(0, top), **look)
        top -= 0.25 / figure.get_figheight()
    figure.tight_layout(rect=(0, 0, 1, top))
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return _themed(text.getvalue()[text.getvalue().index("<svg") :])


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _themed(svg: str) -> str:
    svg = svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--line)")
    for number, color in enumerate(_SERIES, 1):
        svg = svg.replace(color, f"var(--series-{number})")
    width, height = (float(size) for size in re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    sizes = f"min-width: {0.8 * width:.0f}px; max-width: {1.6 * width:.0f}px; aspect-ratio: {width / height:.4f}"
    return f'{head} role="img" style="{sizes}">{rest}'
