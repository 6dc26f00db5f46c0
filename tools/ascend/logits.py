#!/usr/bin/env python3
"""Logits of one checkpoint on one device, kept in a file, and how far two such files are apart.

A process keeps its first device, so that a comparison of devices takes two runs of `save` and one of `compare`.

    tools/ascend/logits.py save openPangu-7B-w8a8 --device ascend --data texts.jsonl --output ascend.npz
    tools/ascend/logits.py save openPangu-7B-w8a8 --device cpu --data texts.jsonl --output cpu.npz
    tools/ascend/logits.py compare cpu.npz ascend.npz --kl 0.01 --agreement 0.97
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.job.arguments import Parser


def save(directory: Path, device: str, data: Path, rows: int, length: int, output: Path) -> None:
    """float32 logits [tokens, vocabulary] of the first `length` tokens of each of the first `rows` texts."""
    from ms_pangu_quant.api import read_data
    from ms_pangu_quant.inference.model import load

    model = load(directory, device=device, kv_cache_tokens=2 * length)
    texts = read_data(data, directory, model.config, rows, length, None, allow_benchmark_overlap=True).sequences
    arrays = {f"tokens{index}": text for index, text in enumerate(texts)}
    arrays.update({f"logits{index}": model.logits(text.tolist()) for index, text in enumerate(texts)})
    np.savez(output, **arrays)


def difference(reference: Path, other: Path) -> dict[str, float]:
    """Of next-token distributions over all tokens of two files: mean and greatest KL in nats, share with the same most
    likely token, and the greatest difference of a logit. Raises ValueError if the files are not of the same tokens."""
    kl, same, largest = [], [], 0.0
    with np.load(reference) as one, np.load(other) as two:
        if sorted(one.files) != sorted(two.files):
            raise ValueError(f"{other} does not hold the texts that {reference} holds")
        for index in range(len(one.files) // 2):
            if not np.array_equal(one[f"tokens{index}"], two[f"tokens{index}"]):
                raise ValueError(f"{other}: text {index} has other tokens than in {reference}")
            a, b = log_softmax(one[f"logits{index}"]), log_softmax(two[f"logits{index}"])
            kl.append((np.exp(a) * (a - b)).sum(1))
            same.append(a.argmax(1) == b.argmax(1))
            largest = max(largest, float(np.abs(one[f"logits{index}"] - two[f"logits{index}"]).max()))
    every = np.concatenate(kl)
    return {
        "tokens": len(every),
        "kl_mean": float(every.mean()),
        "kl_max": float(every.max()),
        "top1_agreement": float(np.concatenate(same).mean()),
        "largest_logit_difference": largest,
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def main() -> int:
    parser = Parser(
        description=__doc__,
        example="python tools/ascend/logits.py save pangu-7b-w8a8 --device cpu --data texts.jsonl --output cpu.npz",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    saving = verbs.add_parser("save")
    saving.add_argument("directory", type=Path)
    saving.add_argument("--device", choices=("cpu", "ascend"), required=True)
    saving.add_argument("--data", type=Path, required=True)
    saving.add_argument("--rows", type=int, default=8)
    saving.add_argument("--length", type=int, default=256)
    saving.add_argument("--output", type=Path, required=True)
    comparing = verbs.add_parser("compare")
    comparing.add_argument("reference", type=Path)
    comparing.add_argument("other", type=Path)
    comparing.add_argument("--kl", type=float, required=True, help="mean KL that is tolerated, nats")
    comparing.add_argument("--agreement", type=float, required=True, help="top-1 agreement that is wanted at least")
    chosen = parser.parse_args()
    if chosen.verb == "save":
        try:
            save(chosen.directory, chosen.device, chosen.data, chosen.rows, chosen.length, chosen.output)
        except PanguQuantError as error:
            print(f"logits: error: {error}", file=sys.stderr)
            return error.exit_code
        return 0
    found = difference(chosen.reference, chosen.other)
    good = found["kl_mean"] <= chosen.kl and found["top1_agreement"] >= chosen.agreement
    print(json.dumps({**found, "tolerated_kl_mean": chosen.kl, "wanted_agreement": chosen.agreement, "passed": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
