"""A report's first lines, in plain words: what was lost, what so many problems can show of it and how many would show more,
and whether it is quantization that makes answers loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ms_pangu_quant.evaluation.statistics import LEVEL, MOST_PROBLEMS, POWER
from ms_pangu_quant.report.comparison import Comparison, Paired
from ms_pangu_quant.report.figures import about, p_value, percent, points
from ms_pangu_quant.report.results import Run

FAULT_WORDS = {"loops": "Answers that loop", "unclosed_thoughts": "Thoughts that do not end"}


def headlines(together: Sequence[Comparison], reference: Run, wanted: float) -> Iterator[tuple[Run, str]]:
    """A few sentences for each run but the reference, and for each way of drawing answers."""
    several = len({each.cell.decoding for each in together}) > 1
    for each in together:
        drawn = f"({each.cell.decoding or 'decoding not known'}) " if several else ""
        said = [drawn + _lost(each, reference), _shown(each), _kept(each, reference.name, wanted)]
        yield each.run, " ".join(sentence for sentence in said if sentence)


def _lost(each: Comparison, reference: Run) -> str:
    (before, asked), (now, answered) = each.passed.reference, each.passed.new
    change, fewer = each.difference, now - before
    modes = {cell.mode for cell in reference.entries if cell in each.run.entries and cell.decoding == each.cell.decoding}
    asked_of = f"{each.problems} problem{'s' * (each.problems != 1)}" + (
        f" in {len(modes)} modes" if len(modes) > 1 else ""
    )
    if asked == answered:
        text = f"solves {now} of {answered} ({asked_of}), {reference.name} {before}: "
        text += "as many" if not fewer else f"{abs(fewer)} {'fewer' if fewer < 0 else 'more'}"
    else:
        text = f"solves {percent(now / answered)} % ({asked_of}), {reference.name} {percent(before / asked)} %"
    return f"{text} ({points(change.value)} points; 95 % interval {points(change.low)} to {points(change.high)})."


def _shown(each: Comparison) -> str:
    low = each.difference.low
    if each.p_holm < LEVEL:
        what = "loss" if each.difference.value < 0 else "gain"
        return f"The {what} is more than chance gives (p {p_value(each.p_holm)})."
    if low >= 0:
        return "So many problems rule out a loss."
    return (
        f"So many problems rule out a loss of more than {percent(-low)} points; a smaller one they cannot tell from none."
    )


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
    return f"They are too few to show that at least {share} is kept (p {p}): {enough}."


def fault_lines(together: Sequence[Comparison], reference: Run) -> Iterator[tuple[str, str]]:
    """(what, sentences) for each fault and way of drawing answers, over the answers of all modes."""
    for decoding in dict.fromkeys(each.cell.decoding for each in together):
        mine = [each for each in together if each.cell.decoding == decoding]
        several = len({each.cell.decoding for each in together}) > 1
        for name, words in FAULT_WORDS.items():
            found = [(each.run.name, pair) for each in mine if (pair := each.faults[name]) is not None]
            drawn = f" ({decoding or 'decoding not known'})" if several else ""
            yield words + drawn, _fault(reference.name, found) if found else "not known."


def _fault(reference: str, found: Sequence[tuple[str, Paired]]) -> str:
    first = found[0][1].reference
    counts = [f"{reference} {first[0]} of {first[1]}", *(f"{name} {pair.new[0]} of {pair.new[1]}" for name, pair in found)]
    more = [
        f"{name} (p {p_value(pair.p_holm)})" for name, pair in found if pair.p_holm < LEVEL and pair.difference.value > 0
    ]
    less = [
        f"{name} (p {p_value(pair.p_holm)})" for name, pair in found if pair.p_holm < LEVEL and pair.difference.value < 0
    ]
    text = ", ".join(counts) + "."
    if more:
        text += f" More often than {reference}, and more than chance gives: {', '.join(more)}."
    if less:
        text += f" Less often than {reference}, and more than chance gives: {', '.join(less)}."
    if more or less:
        return text
    if not any(pair.new[0] + pair.reference[0] for _, pair in found):
        return f"none ({', '.join(counts)})."
    return f"{text} No difference is more than chance gives{'; ' + reference + ' does it too' if first[0] else ''}."
