"""A report's first lines, in plain words: what was lost, what so many problems can show of it and how many would show more,
and whether it is quantization that makes answers loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ms_pangu_quant.evaluation.statistics import LEVEL, MOST_PROBLEMS, POWER
from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.report.comparison import Comparison, Paired
from ms_pangu_quant.report.figures import about, p_value, percent, points
from ms_pangu_quant.report.results import Cell, Run

FAULT_WORDS = {"loops": "Answers that loop", "unclosed_thoughts": "Thoughts that do not end"}


def headlines(
    together: Sequence[Comparison], apart: Sequence[Comparison], reference: Run, wanted: float
) -> Iterator[tuple[Run, str]]:
    """A few sentences for each run but the reference, and for each way of drawing answers. apart: cell by cell."""
    for each in together:
        drawn = f"({each.cell.decoding or 'decoding not known'}) " if _are_several(together) else ""
        said = [_lost(each, reference), _shown(each, _of_decoding(apart, each)), _kept(each, reference.name, wanted)]
        yield each.run, drawn + " ".join(said)


def _are_several(together: Sequence[Comparison]) -> bool:
    """Ways of drawing answers."""
    return len({each.cell.decoding for each in together}) > 1


def _of_decoding(apart: Sequence[Comparison], one: Comparison) -> list[Comparison]:
    """Of the same run and way of drawing."""
    return [each for each in apart if each.run.name == one.run.name and each.cell.decoding == one.cell.decoding]


def cell_name(cell: Cell) -> str:
    return f"{TASKS[cell.task].title if cell.task in TASKS else cell.task} {cell.mode}".strip()


def _lost(each: Comparison, reference: Run) -> str:
    (before, asked), (now, answered) = each.passed.reference, each.passed.new
    change, fewer = each.difference, now - before
    modes = {cell.mode for cell in reference.entries if cell in each.run.entries and cell.decoding == each.cell.decoding}
    problems = f"{each.problems} problem{'s' * (each.problems != 1)}"
    of = f"{problems} in {len(modes)} modes" if len(modes) > 1 else problems
    if asked == answered:
        text = f"solves {now} of {problems if answered == each.problems else f'{answered} ({of})'}, "
        text += f"{reference.name} {before}: "
        text += "as many" if not fewer else f"{abs(fewer)} {'fewer' if fewer < 0 else 'more'}"
    else:
        text = f"solves {percent(now / answered)} % ({of}), {reference.name} {percent(before / asked)} %"
    return f"{text} ({points(change.value)} points; 95 % interval {points(change.low)} to {points(change.high)})."


def _shown(each: Comparison, apart: Sequence[Comparison]) -> str:
    low = each.difference.low
    if each.p_holm < LEVEL:
        what = "loss" if each.difference.value < 0 else "gain"
        return f"The {what} is more than chance gives (p {p_value(each.p_holm)})."
    limits = (
        "a loss" if low >= 0 else f"a loss of more than {percent(-low)} points; a smaller one they cannot tell from none"
    )
    alone = "".join(
        f" By itself, {cell_name(one.cell)} differs by {_by_itself(one.passed)}." for one in apart if one.p_holm < LEVEL
    )
    return f"So many problems rule out {limits}.{alone}"


def _by_itself(pair: Paired) -> str:
    return f"{points(pair.difference.value)} points, more than chance gives (p {p_value(pair.p_holm)})"


def _kept(each: Comparison, reference: str, wanted: float) -> str:
    found, share = each.retention, f"{percent(wanted, 0)} % of what {reference} solves"
    if found is None or each.retention_holm is None:
        return f"{reference} solves nothing, so there is nothing to keep."
    p, chance = p_value(each.retention_holm), f"{round(10 * POWER)} times in 10"
    if each.retention_holm < LEVEL:
        return f"At least {share} is kept (p {p})."
    if each.needed is None:
        return (
            f"{percent(found.ratio.value)} % of what {reference} solves is kept, and {percent(wanted, 0)} % was asked for."
        )
    if each.needed >= MOST_PROBLEMS:
        return f"To show that at least {share} is kept would take more than {MOST_PROBLEMS:,} problems (p {p})."
    if each.needed <= each.problems:
        return f"It is not shown that at least {share} is kept (p {p}), though so many problems show it {chance}."
    enough = f"about {about(each.needed)} would show it {chance}, if problems are lost and gained as here"
    return f"These problems are too few to show that at least {share} is kept (p {p}): {enough}."


def fault_lines(together: Sequence[Comparison], apart: Sequence[Comparison], reference: Run) -> Iterator[tuple[str, str]]:
    """(what, sentences) for each fault and way of drawing answers, over the answers of all modes. apart: cell by cell."""
    for decoding in dict.fromkeys(each.cell.decoding for each in together):
        for name, words in FAULT_WORDS.items():
            drawn = f" ({decoding or 'decoding not known'})" if _are_several(together) else ""
            mine, alone = ([each for each in some if each.cell.decoding == decoding] for some in (together, apart))
            yield words + drawn, _fault(reference.name, name, mine, alone)


def _fault(reference: str, name: str, together: Sequence[Comparison], apart: Sequence[Comparison]) -> str:
    found = [(each.run.name, pair) for each in together if (pair := each.faults[name]) is not None]
    if not found:
        return "not known."
    first = found[0][1].reference
    counts = [f"{reference} {first[0]} of {first[1]}"]
    for run, pair in found:
        there = f" (there {reference} {pair.reference[0]} of {pair.reference[1]})" if pair.reference != first else ""
        counts.append(f"{run} {pair.new[0]} of {pair.new[1]}{there}")
    if not any(pair.new[0] + pair.reference[0] for _, pair in found):
        return f"none ({', '.join(counts)})."
    text = f"{', '.join(counts)}."
    differ = {
        word: [
            f"{run} (p {p_value(pair.p_holm)})"
            for run, pair in found
            if _differs(pair) and (pair.difference.value > 0) == more
        ]
        for word, more in (("More", True), ("Less", False))
    }
    for word, runs in differ.items():
        text += f" {word} often than {reference}, and more than chance gives: {', '.join(runs)}." if runs else ""
    if not any(differ.values()):
        text += f" No difference is more than chance gives{f'; {reference} does it too' if first[0] else ''}."
    for each in apart:
        pair = each.faults[name]
        if pair is not None and _differs(pair) and not any(each.run.name == run and _differs(all_) for run, all_ in found):
            text += f" By itself, {each.run.name} in {cell_name(each.cell)} differs by {_by_itself(pair)}."
    return text


def _differs(pair: Paired) -> bool:
    return pair.p_holm < LEVEL
