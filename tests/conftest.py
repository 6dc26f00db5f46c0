"""Fixtures that need the frameworks: small checkpoints, and the embedded one quantized once for the whole session."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

os.environ.pop("COLUMNS", None)  # pytest's workers have it: rich's consoles would have that width for good

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "ms_pangu_quant" / "assets"
MINI, TIED = ASSETS / "openpangu-mini", ASSETS / "openpangu-mini-tied"


@pytest.fixture(scope="session", autouse=True)
def kernels_built() -> None:
    """Build the CPU kernels before the first test, so that no test sees a line about it or waits for it."""
    from ms_pangu_quant.kernels.library import library

    library()


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., None]:
    from tools.dev.make_checkpoint import write_checkpoint

    return write_checkpoint


@pytest.fixture(scope="session")
def quantized(tmp_path_factory) -> Callable[[str], Path]:
    """recipe name -> the embedded checkpoint quantized with it on its 128 calibration chats."""
    made: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            from ms_pangu_quant.recipe.parse import find_recipe

            made[recipe] = rounded_mini(find_recipe(recipe), tmp_path_factory.mktemp("quantized") / recipe, 128)
        return made[recipe]

    return make


def rounded_mini(recipe: Path, output: Path, chats: int) -> Path:
    """The embedded checkpoint quantized with a recipe's file, calibrated on so many chats."""
    from ms_pangu_quant.checkpoint.reader import CheckpointReader
    from ms_pangu_quant.network import runtime
    from ms_pangu_quant.pipeline.loop import quantize
    from ms_pangu_quant.recipe.parse import load_recipe

    runtime.start("cpu", "graph")
    quantize(CheckpointReader(MINI), load_recipe(recipe), output, data=calibration(chats))
    return output


def rounded_as_told(folder: Path, recipes: Callable[[str], str], chats: int) -> Callable[[str], Path]:
    """name -> the embedded checkpoint quantized once with the recipe whose text is recipes(name)."""

    @cache
    def make(name: str) -> Path:
        (folder / f"{name}.yaml").write_text(recipes(name))
        return rounded_mini(folder / f"{name}.yaml", folder / name, chats)

    return make


def calibration(samples: int):
    """The first so many chats of the embedded calibration data, as the shipped recipes draw them, and held-out ones."""
    from ms_pangu_quant.recipe.recipe import CalibrationSettings

    amount = CalibrationSettings(samples=samples)
    data = token_data("calibration", amount.texts, seed=0)
    return dataclasses.replace(data, held_out=amount.held_out_of(len(data.sequences)))


def token_data(name: str, samples: int, seed: int | None = None):
    from ms_pangu_quant.calibration.data import load_token_data
    from ms_pangu_quant.checkpoint.tokenizer import Tokenizer

    return load_token_data(
        ASSETS / f"{name}.jsonl",
        tokenizer=Tokenizer(MINI),
        vocab_size=1024,
        max_length=512,
        samples=samples,
        seed=seed,
        allow_benchmark_overlap=True,
    )


def streamed_bar() -> float:
    """How far the streamed comparison's KL may be from the served models', relatively: no bar that luck decides about.

    With the kernels streamed blocks have the served bits (tests/network/test_served_block.py), and only norm and head are
    summed in another order: 1e-4 on any text seen. Plain operators sum in another order before activations are rounded, and
    codes that move are up to a third of a text's KL.
    """
    from ms_pangu_quant.kernels.library import library

    return 2e-3 if library() is not None else 0.5


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as archive:
        return dict(archive)


def golden_checkpoint(name: str, folder: Path, write: Callable[..., None]) -> Path:
    """The checkpoint a golden's logits were computed from."""
    if name == "mini":
        return MINI
    values = golden(name)
    write(folder / name, json.loads(str(values["config"])), seed=int(values["seed"]), dtype="float32")
    return folder / name
