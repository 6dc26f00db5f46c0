"""What the ranks of the jobs in test_two_ranks.py do: python msrun_job.py FOLDER TASK [CHECKPOINT ...]."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from ms_pangu_quant.job import ranks
from ms_pangu_quant.network import runtime

SIZES = {"kv_cache_tokens": 1024}
PROMPTS = [[1, 17, 203, 77, 5, 141, 9, 60, 33], [1, 250, 4, 99], [1, *range(10, 50)]]
NEW_TOKENS, STEPS = 12, 3


def main(folder: Path, task: str, *names: str) -> None:
    if task == "quantize":
        quantize(folder / "two")
    for name in names:
        cut = load_cut(folder / name)
        np.savez(folder / f"{name.replace('/', '-')}.rank{ranks.current().rank}.npz", **answers(cut))


def quantize(output: Path) -> None:
    from ms_pangu_quant.checkpoint.reader import CheckpointReader
    from ms_pangu_quant.pipeline import loop
    from ms_pangu_quant.recipe.parse import load_recipe

    runtime.start()
    reader, recipe = CheckpointReader(output.parent / "float"), load_recipe(output.parent / "one.yaml")
    loop.quantize(reader, recipe, output, data=random_data(reader.config.vocab_size))


def random_data(vocab_size: int, sequences: int = 11):
    """Calibration tokens of uneven lengths."""
    from ms_pangu_quant.calibration.data import TokenData

    draw = np.random.default_rng(0)
    made = [draw.integers(5, vocab_size, draw.integers(20, 60)).astype(np.int32) for _ in range(sequences)]
    return TokenData(tuple(made), "of the test", 0)


def load_cut(directory: Path):
    from ms_pangu_quant.inference.model import load

    return load(directory, tensor_parallel=ranks.job_size(), **SIZES)


def answers(model) -> dict[str, np.ndarray]:
    """The tokens of the answers, and logits of the prompts: after a prefill without their last tokens, and after each of
    these. (Two graphs do for both; Model.logits would be a third to compile.)"""
    said = model.generate(PROMPTS, NEW_TOKENS, temperature=0.0)
    tables = [range(4 * number, 4 * number + 4) for number in range(len(PROMPTS))]
    heads, tails = [prompt[:-STEPS] for prompt in PROMPTS], [prompt[-STEPS:] for prompt in PROMPTS]
    logits = [model.forward(heads, [0] * len(heads), tables, phase="prefill")]
    for step in range(STEPS):
        cached = [len(head) + step for head in heads]
        logits.append(model.forward([tail[step : step + 1] for tail in tails], cached, tables, phase="decode"))
    return {"logits": np.stack(logits), **{f"tokens{number}": np.array(each.token_ids) for number, each in enumerate(said)}}


if __name__ == "__main__":
    if os.environ.get(ranks.ROLE) == "MS_SCHED":
        runtime.schedule()
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
