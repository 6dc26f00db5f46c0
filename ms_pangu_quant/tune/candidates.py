"""What is tried: recipes whose every decision is written out, what each takes on disk and on the device that serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.formats import mindformers
from ms_pangu_quant.formats.consumers import INTEGER, facts_of, rows_for
from ms_pangu_quant.formats.reader import layer_bytes
from ms_pangu_quant.mixed.budget import Budget
from ms_pangu_quant.mixed.sensitivity import Sensitivity, assigned
from ms_pangu_quant.pipeline.estimate import stored_bytes
from ms_pangu_quant.quantizers.kv_cache import Int8Cache
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe, parse_recipe, text_of
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.recipe import Recipe
from ms_pangu_quant.report.prediction import CONTEXT
from ms_pangu_quant.report.roofline import Device, decode_seconds, load_device
from ms_pangu_quant.tune.search import Option

DEARER = "w8a8"
SHIPPED = (DEARER, "w4a8", "w4a8_g256", "w4a8_g128", "w4a8_g64")
CPU = "cpu"
BATCH = 1  # sequences of a decode step


@dataclass(frozen=True)
class Served:
    """What the result is for. limits: of the device, for its roofline; None of a CPU."""

    device: str
    consumer: str
    limits: Device | None

    def computes(self, config: ModelConfig, plan: Plan) -> bool:
        """Whether all quantized layers are multiplied as integers there."""
        rows = [row for facts in facts_of(config, plan) if facts.arithmetic for row in rows_for(mindformers.NAME, facts)]
        return all(row.verdict == INTEGER for row in rows if row.consumer == self.consumer)


def served_on(device: str) -> Served:
    """A device of configs/devices, by name or file, or "cpu". Raises RequestError."""
    if device == CPU:
        return Served(device, "ms_pangu_quant (CPU)", None)
    return Served(device, "ms_pangu_quant (Ascend)", load_device(device))


def shipped(config: ModelConfig, served: Served, *, kv_cache: bool) -> tuple[dict[str, Recipe], dict[str, str]]:
    """(shipped recipes by their schemes, the most accurate first; why others are passed over)."""
    fit, passed_over = {}, {}
    for name in SHIPPED:
        recipe = load_recipe(find_recipe(name))
        recipe = dataclasses.replace(recipe, kv_cache=Int8Cache()) if kv_cache else recipe
        try:
            plan = recipe.plan(config)
        except RecipeError as error:
            passed_over[name] = f"not tried: {str(error).removeprefix(f'{recipe.where}: ')}"
            continue
        if served.computes(config, plan):
            fit[name] = recipe
        else:
            passed_over[name] = f"not tried: {served.device} does not multiply it in integers"
    return fit, passed_over


def plain(recipe: Recipe, name: str, wanted: str, layers: Mapping[str, str] | None = None) -> Recipe:
    """The recipe read back from a file that leaves nothing to be decided; layers: full name -> another scheme."""
    why = f"Found by pangu-quant tune for {wanted}: {name}."
    made = dataclasses.replace(
        recipe, why=why, layers=tuple((layers or {}).items()), budget=None, assignment=None, choices=(), decision=""
    )
    return parse_recipe(text_of(dataclasses.replace(made, text="")), name)


def mixture(recipe: Recipe, config: ModelConfig, found: Sensitivity, **limit: float) -> tuple[dict[str, str], float] | None:
    """(layers that are raised to the dearer scheme, predicted KL): what a budget of bits_per_weight or max_kl buys.

    None where it is outside of what the two schemes give.
    """
    budget = Budget(schemes=found.schemes, **limit)
    try:
        spent = assigned(dataclasses.replace(recipe, budget=budget), config, found, mindformers)
    except RecipeError as error:
        if "budget." in str(error):
            return None
        raise
    assert spent.assignment is not None
    raised = {name: scheme for name, scheme in spent.assignment.schemes.items() if scheme != recipe.scheme}
    return raised, spent.assignment.predicted_kl


def option_of(
    name: str,
    recipe: Recipe,
    reader: CheckpointReader,
    served: Served,
    block_error: float | None = None,
    predicted: float | None = None,
) -> Option:
    """Bits and bytes are those of the tensors that a run writes."""
    rewritten = recipe.rewritten(reader)
    config = rewritten.config
    plan = recipe.plan(config)
    stored = sum(layer_bytes(mindformers, config, site, scheme) for _, site, scheme in plan if scheme is not None)
    weights = layout.weight_count(config) * config.num_hidden_layers
    seconds = None
    if served.limits is not None:
        precisions = [
            {
                site.fused: "float16" if scheme is None else f"w{scheme.weight.bits}a8"
                for site, scheme in zip(layout.SITES, block.schemes, strict=True)
            }
            for block in plan.blocks
        ]
        seconds = decode_seconds(served.limits, config, precisions, BATCH, CONTEXT)
    return Option(name, 8 * stored / weights, stored_bytes(rewritten, recipe, plan), seconds, block_error, predicted)
