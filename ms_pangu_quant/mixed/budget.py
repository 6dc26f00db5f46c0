"""Which layers of a mixed recipe get the dearer scheme: the best assignment that a budget allows, exactly.

How it works. A choice is a group of layers that are computed as one: cheap or dear, so many bits and so much KL each. KL is
taken to add up over groups (it is quadratic in small errors, and errors of different groups are nearly uncorrelated).
Groups of equal shape cost the same, so of those the best n to raise are the n that gain the most KL; a model has four
shapes, and all (blocks + 1)^4 combinations of counts are looked at. That is the optimum of the knapsack and not a greedy
one's neighbour of it, so a larger budget can never be predicted to have a larger KL.

What it does not do: mix within a group, or know what the KL of the whole assignment is when it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.recipe.scheme import PRESETS
from ms_pangu_quant.recipe.settings import check_types

DEFAULT_SCHEMES = ("w4a8_g128", "w8a8")


@dataclass(frozen=True)
class Budget:
    """`scheme: {budget: ...}` of a recipe: one of the two limits.

    bits_per_weight  stored bits of all linear layers over their weights, scales and zero points counted as they are stored.
    max_kl           nats a token, of the prediction.
    schemes          (the one to start from, the one that costs more and loses less), by their names in PRESETS.
    """

    bits_per_weight: float | None = None
    max_kl: float | None = None
    schemes: Sequence[str] = DEFAULT_SCHEMES

    def __post_init__(self) -> None:
        check_types(self, "budget")
        limits = {"bits_per_weight": self.bits_per_weight, "max_kl": self.max_kl}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(given) != 1:
            raise RecipeError(f"budget: got {' and '.join(given) or 'no limit'}, wanted bits_per_weight or max_kl")
        for name, limit in given.items():
            if limit <= 0:
                raise RecipeError(f"budget.{name}: got {limit}, wanted a number above 0")
        if len(self.schemes) != 2 or len({*PRESETS} & {*self.schemes}) != 2:
            raise RecipeError(
                f"budget.schemes: got {self.schemes!r}, wanted two of {', '.join(PRESETS)}, the cheaper first"
            )


@dataclass(frozen=True)
class Choice:
    """A group of layers to decide on. bits (cheap, dear) of all its tensors; kl (cheap, dear) predicted, cheap >= dear."""

    bits: tuple[int, int]
    kl: tuple[float, float]


@dataclass(frozen=True)
class Assignment:
    """What a budget came to. schemes: full layer name -> scheme name; the rest is for the report.

    checkpoint  hash of the checkpoint it was made for.  sensitivity  sha256 of the sensitivities it was made from.
    """

    schemes: Mapping[str, str]
    bits_per_weight: float
    predicted_kl: float
    stored_as: str
    sensitivity: str
    checkpoint: str

    def summary(self) -> dict[str, Any]:
        """For the report; the schemes themselves are in it already."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "predicted_kl": self.predicted_kl,
            "format": self.stored_as,
            "sensitivity": self.sensitivity,
        }


def choose(choices: Sequence[Choice], budget: Budget, *, weights: int, bits: int = 0, kl: float = 0.0) -> list[bool]:
    """Whether each choice is dear: the least KL within the bits, or the fewest bits within the KL.

    weights  number of weights of all linear layers;  bits, kl  of the layers that are not a choice.
    Raises   RecipeError with the range that can be reached, if the budget is outside it.
    """
    kinds: dict[int, list[int]] = {}  # bits that raising costs -> choices that cost them, the largest gain first
    for place in sorted(range(len(choices)), key=lambda place: -_gain(choices[place])):
        kinds.setdefault(choices[place].bits[1] - choices[place].bits[0], []).append(place)
    all_bits, all_kl = np.array(bits + sum(each.bits[0] for each in choices), np.int64), np.array(float(kl))
    all_kl = all_kl + sum(each.kl[0] for each in choices)
    for cost, places in kinds.items():  # one axis for each kind: how many of it are raised
        gains = np.cumsum([0.0, *(_gain(choices[place]) for place in places)])
        all_bits = all_bits[..., None] + cost * np.arange(len(places) + 1)
        all_kl = all_kl[..., None] - gains
    counts = _best(all_bits / weights, np.maximum(all_kl, 0.0), budget)
    raised = {place for count, places in zip(counts, kinds.values(), strict=True) for place in places[:count]}
    return [place in raised for place in range(len(choices))]


def _gain(choice: Choice) -> float:
    return choice.kl[0] - choice.kl[1]


def _best(bits: NDArray[np.float64], kl: NDArray[np.float64], budget: Budget) -> tuple[int, ...]:
    """Place of the best combination. bits (per weight) and kl have the same shape."""
    if budget.bits_per_weight is not None:
        allowed, first, second = bits <= budget.bits_per_weight, kl, bits
        name, limit, reached = "bits_per_weight", budget.bits_per_weight, bits
    else:
        assert budget.max_kl is not None
        allowed, first, second = kl <= budget.max_kl, bits, kl
        name, limit, reached = "max_kl", budget.max_kl, kl
    if not allowed.any():
        raise RecipeError(
            f"budget.{name}: got {limit:g}, but {' and '.join(budget.schemes)} give {reached.min():.4g} to "
            f"{reached.max():.4g} here; raise it, or take other schemes"
        )
    best = np.where(allowed, first, np.inf).min()
    tied = allowed & (first == best)
    return tuple(int(place) for place in np.unravel_index(np.argmin(np.where(tied, second, np.inf)), bits.shape))
