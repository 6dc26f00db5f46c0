"""The page of a search for a recipe: what it came to, size against KL, and the path that was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ms_pangu_quant.evaluation.samples import write_pieces
from ms_pangu_quant.report import plots
from ms_pangu_quant.report.page import environment


@dataclass(frozen=True)
class TuningRow:
    """A candidate, in the order of trial. kl, upper: mean and one-sided bound on `texts` texts.

    verdict  "meets", "fails", "undecided" or "dropped", which is not measured.
    """

    name: str
    bits: float
    nbytes: int
    decode_ms: float | None
    block_error: float | None
    predicted: float | None
    kl: float | None
    upper: float | None
    texts: int
    verdict: str
    why: str


@dataclass(frozen=True)
class Tuning:
    """limit: KL that is wanted, None for another target. final: (mean, bound) of the winner on texts that chose nothing."""

    target: str
    limit: float | None
    prefer: str
    device: str
    winner: str | None
    said: Sequence[str]
    rows: Sequence[TuningRow]
    final: tuple[float, float] | None


def write_tuning(about: Tuning, path: Path) -> None:
    """One file that needs no network."""
    drawn = plots.tuning(about.rows, about.limit)
    page = environment(html=True).get_template("tune.html.j2")
    text = page.render(title=f"A recipe for {about.target}", about=about, plot=Markup(drawn) if drawn else None)
    write_pieces(path, [text.encode("utf-8", "backslashreplace")])
