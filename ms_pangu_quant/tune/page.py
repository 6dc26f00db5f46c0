"""The search's result as the page shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ms_pangu_quant.report.tuning import Tuning, TuningRow
from ms_pangu_quant.tune.search import Trial

if TYPE_CHECKING:
    from ms_pangu_quant.tune.job import TuneResult


def page_of(result: TuneResult, device: str) -> Tuning:
    return Tuning(
        target=str(result.target),
        limit=result.target.limit if result.target.metric == "kl" else None,
        prefer=result.prefer,
        device=device,
        winner=result.winner and result.winner.name,
        said=result.said,
        rows=tuple(row_of(trial) for trial in result.outcome.trials),
        final=None if result.final is None else (result.final.mean, result.final.upper),
    )


def row_of(trial: Trial) -> TuningRow:
    option, found = trial.option, trial.divergence
    return TuningRow(
        name=option.name,
        bits=option.bits,
        nbytes=option.nbytes,
        decode_ms=None if option.decode_seconds is None else 1e3 * option.decode_seconds,
        block_error=option.block_error,
        predicted=option.predicted,
        kl=None if found is None else found.mean,
        upper=None if found is None else found.upper,
        texts=0 if found is None else len(found.sums),
        verdict=trial.verdict,
        why=trial.why,
    )
