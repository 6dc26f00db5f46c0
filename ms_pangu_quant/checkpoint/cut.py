"""Whether a model can be cut over ranks: MindFormers gives each whole heads, and equal parts of MLP and vocabulary.

q, k, v, gate and up are cut along their outputs, what writes the stream along its inputs. Each output channel keeps its
scales; an input cut must fall between int4 groups, and between the bytes that hold two inputs.
"""

from __future__ import annotations

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.recipe.plan import Plan


def check_cut(config: ModelConfig, ranks: int, plan: Plan) -> None:
    """Raises BackendError naming what `ranks` ranks cannot share."""
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        count = getattr(config, name)
        if count % ranks:
            raise BackendError(f"tensor_parallel {ranks}: {name} is {count}, wanted a multiple of it; use fewer ranks")
    heads = config.num_key_value_heads
    if heads % ranks and ranks % heads:  # more ranks than key heads have copies of them
        raise BackendError(f"tensor_parallel {ranks}: num_key_value_heads is {heads}, wanted a multiple or a divisor of it")
    for _, site, scheme in plan:
        if not site.writes_stream or scheme is None or scheme.weight.bits != 4:
            continue
        inputs = layout.site_shape(config, site)[1] // ranks
        if inputs % (scheme.group_size or 2):
            unit = f"groups of {scheme.group_size}" if scheme.group_size else "two to a byte"
            raise BackendError(
                f"tensor_parallel {ranks}: {site.name} has {inputs} inputs on each rank and int4 weights in {unit} along "
                "them, which a cut would split; use fewer ranks, or a recipe with smaller groups"
            )


def cache_heads(config: ModelConfig, ranks: int) -> int:
    """Key and value heads whose cache one rank holds."""
    return max(1, config.num_key_value_heads // ranks)
