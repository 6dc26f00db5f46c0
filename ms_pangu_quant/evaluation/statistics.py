"""What a score means and whether two differ: exact, paired where the problems are the same.

Where an answer is one greedy sample, a problem either passes or fails, and two runs are compared with the exact McNemar
test on the problems that flipped. Everything else is resampled over problems, the unit that was drawn: samples of one
problem depend on each other. Below a few hundred problems normal approximations are too narrow (Bowyer et al. 2025,
arXiv:2503.01747), so none is used. Nor is the plain bootstrap for scores: of two runs that agree on all of 40 problems it
makes a certainty. Scores are resampled by the Bayesian bootstrap (Rubin 1981) with one more problem at either end, a lost
one below and a gained one above, as Clopper and Pearson's exact interval does: for a single share, and for two runs of
which one only loses, the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.errors import RequestError

RESAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95
LEVEL = 0.05
POWER = 0.8
_SIMULATED = 1000  # runs of each size that is tried
MOST_PROBLEMS = 100_000
_LOST, _GAINED = (1.0, 0.0), (0.0, 1.0)  # a problem that the reference alone passes, and one that it alone fails


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Flips:
    """The problems, by id, that one of two runs alone passed; p is the exact McNemar test's, two-sided."""

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    p: float


@dataclass(frozen=True)
class Retention:
    """ratio is new / reference. p is one-sided: small where the ratio is shown to be at least `wanted`."""

    ratio: Interval
    wanted: float
    p: float


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k samples drawn without replacement passes: 1 - C(n-c, k) / C(n, k), the unbiased estimate.

    Source  Chen et al. 2021, arXiv:2107.03374, eq. 1.
    Raises  RequestError for k > samples, which cannot be estimated.
    """
    if not 1 <= k <= samples:
        raise RequestError(f"pass@{k}: got {samples} samples of a problem, wanted at least {k}")
    return 1 - comb(samples - passed, k) / comb(samples, k)


def wilson(passed: int, total: int) -> Interval:
    """Share with its Wilson score interval."""
    from scipy import stats  # takes half a second to import

    interval = stats.binomtest(passed, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(passed / total, float(interval.low), float(interval.high))


def mean_interval(scores: Sequence[float]) -> Interval:
    """Mean over problems of scores from 0 to 1, with its interval."""
    array = np.asarray(scores, np.float64)[:, None]
    return _interval(float(array.mean()), _means_with(array, (0.0,))[:, 0], _means_with(array, (1.0,))[:, 0])


def flips(reference: Mapping[str, bool], new: Mapping[str, bool]) -> Flips:
    """Over the problems of both runs: those lost, those gained, and whether that is more than chance."""
    shared = [task for task in reference if task in new]
    lost = tuple(task for task in shared if reference[task] and not new[task])
    gained = tuple(task for task in shared if new[task] and not reference[task])
    return Flips(lost, gained, mcnemar(len(lost), len(gained)))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p: under the null each flip is a fair coin. 1 without flips."""
    from scipy import stats

    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def sign_flip(reference: Sequence[float], new: Sequence[float]) -> float:
    """Two-sided p of "no difference" for scores paired by problem: which run a score is from is exchanged at random.

    For one sample a problem it is the McNemar test.
    """
    from scipy import stats

    pairs = _pairs(reference, new)
    if (pairs[:, 0] == pairs[:, 1]).all():
        return 1.0
    return float(
        stats.permutation_test(
            (pairs[:, 0], pairs[:, 1]),
            lambda a, b, axis: b.mean(axis) - a.mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=1000,
            random_state=np.random.default_rng(SEED),
        ).pvalue
    )


def difference(reference: Sequence[float], new: Sequence[float]) -> Interval:
    """mean(new) - mean(reference) of values paired by problem, such as lengths, with its percentile bootstrap interval."""
    pairs = _pairs(reference, new)
    means = _draws(len(pairs)) @ pairs / len(pairs)
    resampled = means[:, 1] - means[:, 0]
    return _interval(float(pairs[:, 1].mean() - pairs[:, 0].mean()), resampled, resampled)


def score_difference(reference: Sequence[float], new: Sequence[float]) -> Interval:
    """The same of scores from 0 to 1."""
    pairs = _pairs(reference, new)
    low, high = (means[:, 1] - means[:, 0] for means in (_means_with(pairs, _LOST), _means_with(pairs, _GAINED)))
    return _interval(float(pairs[:, 1].mean() - pairs[:, 0].mean()), low, high)


def retention(reference: Sequence[float], new: Sequence[float], wanted: float = 0.9) -> Retention | None:
    """mean(new) / mean(reference) of scores from 0 to 1, paired by problem. None where the reference passes nothing.

    The test asks whether mean(new - wanted * reference) is above 0, which is the same question without a quotient; its p
    is the share of the interval's lower resamples in which it is not, counting the data themselves as one. Where nothing
    is gained it is the exact binomial test's, whether less than 1 - wanted is lost.
    """
    pairs = _pairs(reference, new)
    if pairs[:, 0].sum() == 0:
        return None
    means, above = _means_with(pairs, _LOST), _means_with(pairs, _GAINED)
    value = float(pairs[:, 1].mean() / pairs[:, 0].mean())
    ratio = _interval(value, means[:, 1] / means[:, 0], above[:, 1] / above[:, 0])
    failed = int(np.count_nonzero(means[:, 1] - wanted * means[:, 0] < -1e-12))
    return Retention(ratio, wanted, (failed + 1) / (RESAMPLES + 1))


def problems_needed(
    reference: Sequence[float], new: Sequence[float], wanted: float = 0.9, *, level: float = LEVEL, power: float = POWER
) -> int | None:
    """How many problems retention()'s test takes to be below `level` in a share `power` of runs, if problems go on being
    passed, lost and gained as in these.

    Runs of each size are drawn from the pairs that were seen. None where no number does: less than `wanted` is kept.
    MOST_PROBLEMS stands for as many or more.
    """
    pairs = _pairs(reference, new)
    values, counts = np.unique((pairs[:, 1] - wanted * pairs[:, 0]).round(12), return_counts=True)
    if pairs[:, 0].sum() == 0 or values @ counts <= 1e-9:
        return None

    def reached(problems: int) -> bool:
        drawn = np.random.default_rng(SEED).multinomial(problems, counts / counts.sum(), size=_SIMULATED)
        return bool((_retention_p(values, drawn, wanted) < level).mean() >= power)

    few, enough = 0, 8
    while not reached(enough):
        few, enough = enough, 2 * enough
        if few >= MOST_PROBLEMS:
            return MOST_PROBLEMS
    while enough - few > max(1, few // 20):
        middle = (few + enough) // 2
        few, enough = (few, middle) if reached(middle) else (middle, enough)
    return min(enough, MOST_PROBLEMS)


def _retention_p(values: NDArray[np.float64], counts: NDArray[np.int64], wanted: float) -> NDArray[np.float64]:
    """p of retention()'s test without its resamples [runs]: counts [runs, kinds] of problems whose new - wanted * reference
    is values [kinds].

    The test's share is the chance that a sum of exponential variates, each times a problem's value, is below 0, with one
    more lost problem. Source  Lugannani and Rice 1980, eq. 9: the saddle-point form of such a chance.
    """
    from scipy.special import ndtr

    kinds = np.append(values, -wanted)
    many = np.hstack([counts, np.ones((len(counts), 1), np.int64)]).astype(np.float64)
    kinds = np.where(many > 0, kinds, 0)
    most = kinds.max(1)
    low, high = np.full(len(many), -1 / wanted), 1 / np.where(most > 0, most, 1)
    for _ in range(40):  # the saddle point, where the slope of the cumulant function is 0
        middle = (low + high) / 2
        above = (many * kinds / (1 - middle[:, None] * kinds)).sum(1) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    point = (low + high) / 2
    shrunk = 1 - point[:, None] * kinds
    with np.errstate(divide="ignore", invalid="ignore"):  # at 0, where the chance is a half
        root = np.sign(point) * np.sqrt(np.maximum(0, 2 * (many * np.log(shrunk)).sum(1)))
        scaled = point * np.sqrt((many * (kinds / shrunk) ** 2).sum(1))
        p = ndtr(root) + np.exp(-(root**2) / 2) / np.sqrt(2 * np.pi) * (1 / root - 1 / scaled)
    return np.where(most <= 0, 1.0, np.where(np.abs(root) < 1e-4, 0.5, p))


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for so many tests, in the order given (Holm 1979): the family-wise error stays below the level."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _pairs(reference: Sequence[float], new: Sequence[float]) -> NDArray[np.float64]:
    if len(reference) != len(new) or not reference:
        raise RequestError(f"paired values: got {len(reference)} and {len(new)}, wanted the same number, at least 1")
    return np.stack([np.asarray(reference, np.float64), np.asarray(new, np.float64)], axis=1)


def _means_with(values: NDArray[np.float64], extra: tuple[float, ...]) -> NDArray[np.float64]:
    """Means [RESAMPLES, columns] of values [problems, columns] and one more row, under the Bayesian bootstrap."""
    means: NDArray[np.float64] = _weights(len(values) + 1) @ np.vstack([values, extra])
    return means


@lru_cache(maxsize=2)
def _weights(size: int) -> NDArray[np.float64]:
    """[RESAMPLES, size], each row drawn evenly from all that are positive and sum to one; the same in every run."""
    return np.random.default_rng(SEED).dirichlet(np.ones(size), size=RESAMPLES)


@lru_cache(maxsize=2)
def _draws(size: int) -> NDArray[np.float64]:
    """How often each of `size` rows is in each resample, [RESAMPLES, size]; the same in every run."""
    draws = np.random.default_rng(SEED).multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    return draws.astype(np.float64)


def _interval(value: float, below: NDArray[np.float64], above: NDArray[np.float64]) -> Interval:
    """From what was resampled for the lower and for the upper end."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return Interval(value, float(np.percentile(below, tail)), float(np.percentile(above, 100 - tail)))
