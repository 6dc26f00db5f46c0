#!/usr/bin/env python3
"""Train a small openPangu-Embedded checkpoint on generated functions, from a seed.

Text, tokenizer, batches and the schedule follow from the seed and the config alone, so a run that was stopped and resumed
gives the same weights as one that was not; Ctrl-C stops it, --resume goes on. The output is the run's folder: state.npz
(weights and moments, to resume from), curve.jsonl, curve.svg, tokenizer.model and, at the end, checkpoint/ in Hugging
Face's layout. tools/embedded/ship.py puts two runs into the package.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np
import yaml
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.job.arguments import Parser
from tools.embedded.chats import chat

CHUNK = 2048  # chats drawn and sorted by length together
SYMBOLS = ("[unused9]", "[unused10]", "[unused16]", "[unused17]")
COMMON = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
EXAMPLE = """\
python tools/embedded/train.py --config configs/embedded/openpangu-mini-base.yaml --output runs/base
python tools/embedded/train.py --config configs/embedded/openpangu-mini.yaml --start runs/base --output runs/untied"""


@dataclass(frozen=True)
class Batch:
    """ids, targets int32 [B, T]; weights float32 [B, T], 0 for padding."""

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]


def chats(seed: int, chunk: int, split: str, count: int = CHUNK) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed} {split} {chunk}")
    return [chat(rng, split) for _ in range(count)]


def train_tokenizer(path: Path, seed: int, vocab_size: int) -> None:
    """Byte-pair encoding of training chats; ids 0 to 2 are unknown, bos and an unused end, 3 to 6 the chat's symbols."""

    def lines() -> Iterator[str]:
        for row in (each for chunk in range(4) for each in chats(seed, chunk, "train")):
            text = row["text"]
            for symbol in SYMBOLS:
                text = text.replace(symbol, "\n")
            yield from (line for line in text.split("\n") if line)
        yield from ["".join(map(chr, range(32, 127)))] * 20

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, add_dummy_prefix=False,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols=list(SYMBOLS),
        character_coverage=1.0, max_sentence_length=20000, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


class Data:
    def __init__(self, tokenizer: Path, seed: int, tokens: int, prompt_weight: float, lengths: list[int]):
        self.processor = SentencePieceProcessor(model_file=str(tokenizer))
        self.seed, self.tokens, self.prompt_weight, self.lengths = seed, tokens, prompt_weight, sorted(lengths)

    def encode(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """Ids with bos, and how many of them are the prompt's."""
        prompt = [1, *self.processor.encode(row["prompt"])]
        return prompt + self.processor.encode(row["text"][len(row["prompt"]) :]), len(prompt)

    def chunk(
        self, index: int, split: str = "train", count: int = CHUNK, prompt_weight: float | None = None
    ) -> list[Batch]:
        """Batches of chats of like length, in a drawn order."""
        rows = sorted(map(self.encode, chats(self.seed, index, split, count)), key=lambda row: len(row[0]))
        batches: list[Batch] = []
        waiting: dict[int, list[tuple[list[int], int]]] = {}
        for row in rows:
            length = next((each for each in self.lengths if each >= len(row[0]) - 1), None)
            if length is None:
                continue
            waiting.setdefault(length, []).append(row)
            if len(waiting[length]) == self.tokens // length:
                batches.append(self.batch(waiting.pop(length), length, prompt_weight))
        batches += [self.batch(rest, length, prompt_weight) for length, rest in waiting.items()]
        random.Random(f"{self.seed} order {index}").shuffle(batches)
        return batches

    def batch(self, rows: list[tuple[list[int], int]], length: int, prompt_weight: float | None) -> Batch:
        shape = (self.tokens // length, length)
        ids, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        for at, (row, prompt) in enumerate(rows):
            count = len(row) - 1
            ids[at, :count], targets[at, :count] = row[:-1], row[1:]
            weights[at, : prompt - 1] = self.prompt_weight if prompt_weight is None else prompt_weight
            weights[at, prompt - 1 : count] = 1.0
        return Batch(ids, targets, weights)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """A rise, then a cosine down to a fiftieth of the peak."""
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * fall


class Run:
    """A training run and its folder."""

    def __init__(self, config: dict[str, Any], folder: Path, seed: int, start: Path | None):
        from tools.embedded.decoder import Decoder, TrainStep, initial_weights

        self.folder, self.plan, self.seed = folder, config["training"], seed
        self.raw_config, self.outliers = {**COMMON, **config["model"]}, config.get("outliers", {})
        self.model_config = ModelConfig.from_dict(self.raw_config, where="config")
        tokenizer = folder / "tokenizer.model"
        if not tokenizer.exists():
            if start is None:
                train_tokenizer(tokenizer, seed, self.model_config.vocab_size)
            else:
                tokenizer.write_bytes((start / tokenizer.name).read_bytes())
        self.data = Data(tokenizer, seed, self.plan["tokens"], self.plan["prompt_weight"], self.plan["lengths"])
        weights = initial_weights(self.model_config, seed)
        if start is not None:
            begun = np.load(start / "state.npz")
            head = "lm_head.weight"
            weights = {n: begun[n if n in begun or n != head else "model.embed_tokens.weight"] for n in weights}
        self.decoder = Decoder(self.model_config, weights)
        self.step = TrainStep(self.decoder, betas=(0.9, 0.95), decay=self.plan["weight_decay"], clip=1.0)
        self.done, self.chunk = 0, 0 if start is None else 1_000_000  # a run that goes on sees new text
        self.place = 0  # batches done in this chunk
        self.tables: dict[int, Any] = {}

    def arguments(self, batch: Batch) -> tuple[Any, ...]:
        from mindspore import Tensor

        length = batch.ids.shape[1]
        if length not in self.tables:
            self.tables[length] = self.decoder.tables(length)
        return Tensor(batch.ids), Tensor(batch.targets), Tensor(batch.weights), *self.tables[length]

    def train(self, every: int) -> None:
        """Raises FloatingPointError when the loss is no number."""
        from mindspore import Tensor

        steps, began, first = self.plan["steps"], time.monotonic(), self.done
        tokens, losses = 0, []
        while self.done < steps:
            for batch in self.data.chunk(self.chunk)[self.place :]:
                rate = learning_rate(self.done, steps, self.plan["learning_rate"], self.plan["warmup"])
                loss = float(self.step(Tensor(np.float32(rate)), *self.arguments(batch)).asnumpy())
                if not math.isfinite(loss):
                    raise FloatingPointError(f"step {self.done}: the loss is {loss}; take a lower learning_rate")
                self.done, self.place = self.done + 1, self.place + 1
                tokens += int(np.count_nonzero(batch.weights))
                losses.append(loss)
                if self.done % every == 0 or self.done == steps:
                    self.record(float(np.mean(losses)), rate)
                    losses = []
                    elapsed = time.monotonic() - began
                    left = elapsed / (self.done - first) * (steps - self.done)
                    print(f"  {tokens / elapsed:.0f} tokens/s, {left / 60:.0f} min to go", flush=True)
                if self.done == steps:
                    return
            self.chunk, self.place = self.chunk + 1, 0

    def validation_loss(self) -> float:
        """Nats per token of answers to validation's combinations."""
        total = weight = 0.0
        for batch in self.data.chunk(0, "validation", 256, prompt_weight=0.0):
            count = float(batch.weights.sum())
            total += count * float(self.step.loss(*self.arguments(batch)).asnumpy())
            weight += count
        return total / weight

    def record(self, loss: float, rate: float) -> None:
        row = {"step": self.done, "loss": loss, "validation": self.validation_loss(), "learning_rate": rate}
        print(f"step {self.done}/{self.plan['steps']}: loss {loss:.4f}, validation {row['validation']:.4f}", flush=True)
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.save()

    def save(self) -> None:
        place = np.array([self.done, self.chunk, self.place])
        temporary = self.folder / "state.tmp.npz"
        np.savez(temporary, place=place, **self.step.state())
        os.replace(temporary, self.folder / "state.npz")

    def decoder_weights(self) -> dict[str, NDArray[np.float32]]:
        return {each.name: each.asnumpy() for each in self.step.parameters}

    def write_checkpoint(self) -> None:
        from tools.embedded.checkpoint import write_checkpoint

        weights = self.decoder_weights()
        tokenizer = self.folder / "tokenizer.model"
        output = self.folder / "checkpoint"
        write_checkpoint(output, self.raw_config, weights, tokenizer, outliers=self.outliers, seed=self.seed)

    def resume(self) -> None:
        state = np.load(self.folder / "state.npz")
        self.step.load_state({name: state[name] for name in state.files if name != "place"})
        self.done, self.chunk, self.place = map(int, state["place"])
        curve = self.folder / "curve.jsonl"
        rows = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= self.done]
        curve.write_text("".join(f"{line}\n" for line in rows))


def plot_curve(folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("loss", "training, prompts included"), ("validation", "answers to held-out combinations")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    axes.set(xlabel="step", ylabel="nats per token", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curve.svg", metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example=EXAMPLE)
    parser.add_argument("--config", type=Path, required=True, help="sizes, schedule and outliers, as in configs/embedded/")
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--start", type=Path, help="folder of a finished run to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--device", default="cpu", help="cpu, ascend or gpu")
    parser.add_argument("--threads", type=int, help="of MindSpore's operators (all cores)")
    parser.add_argument("--every", type=int, default=100, help="steps between validations, each of which is saved")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.output
    if (folder / "state.npz").exists() != chosen.resume:
        state = "holds no state.npz to resume from" if chosen.resume else "holds a run; give --resume or another folder"
        print(f"embedded/train: {folder}: {state}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device({"cpu": "CPU", "ascend": "Ascend", "gpu": "GPU"}[chosen.device])
    if chosen.threads is not None:
        ms.device_context.cpu.op_tuning.threads_num(chosen.threads)
    run = Run(yaml.safe_load(chosen.config.read_text(encoding="utf-8")), folder, chosen.seed, chosen.start)
    if chosen.resume:
        run.resume()
    try:
        run.train(chosen.every)
    except KeyboardInterrupt:
        print(f"\nstopped at step {run.done}; --resume goes on from the last validation", file=sys.stderr)
        return 130
    run.write_checkpoint()
    plot_curve(folder)
    print(f"{folder / 'checkpoint'}: written; curve in {folder / 'curve.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
