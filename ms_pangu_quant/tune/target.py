"""What is wanted, and what of it has been shown: targets, durations, and KL over texts with its one-sided bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.statistics import CONFIDENCE
from ms_pangu_quant.inference.compare import ratio_error

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Target:
    """kl: mean KL of at most `limit` nats a token. retention: at least `limit` of the float model's pass@1."""

    metric: Literal["kl", "retention"]
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.metric == 'kl' else '>='}{self.limit:g}"


def parse_target(text: str) -> Target:
    """ "kl<=0.01" or "retention>=0.99". Raises RequestError."""
    found = re.fullmatch(r"\s*(kl|retention)\s*(<=|>=)\s*([0-9.eE+-]+)\s*", text)
    try:
        limit = float(found[3]) if found else 0.0
    except ValueError:
        limit = 0.0
    if found and (found[1], found[2]) == ("kl", "<=") and 0 < limit < float("inf"):
        return Target("kl", limit)
    if found and (found[1], found[2]) == ("retention", ">=") and 0 < limit < 1:
        return Target("retention", limit)
    raise RequestError(
        f'--target: got {text!r}, wanted "kl<=0.01" (nats a token, above 0) or "retention>=0.99" (a share of the float '
        "model's pass@1, between 0 and 1)"
    )


def parse_duration(text: str) -> float:
    """Seconds of "4h", "90m", "30s" or "1h30m". Raises RequestError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text.strip())
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text.strip() or seconds <= 0:
        raise RequestError(f"--budget: got {text!r}, wanted a time such as 4h, 90m, 30s or 1h30m")
    return seconds


@dataclass(frozen=True)
class Divergence:
    """KL of a candidate over texts: sums in nats and tokens of each. Tokens of one text are not independent."""

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.sums) / sum(self.tokens)

    @cached_property
    def error(self) -> float:
        """Half the one-sided interval: Student's t over texts; infinite for one text."""
        from scipy import stats  # takes half a second to import

        count = len(self.sums)
        if count < 2:
            return float("inf")
        return float(stats.t.ppf(CONFIDENCE, count - 1)) * ratio_error(self.sums, self.tokens)

    @property
    def upper(self) -> float:
        return self.mean + self.error

    @property
    def lower(self) -> float:
        return max(0.0, self.mean - self.error)

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(self.sums + other.sums, self.tokens + other.tokens)
