"""Predict prefill latency, decode speed and memory of openPangu-Embedded on an Ascend device, as Markdown tables.

A prediction from the device's limits (ms_pangu_quant/roofline.py), not a measurement; --device takes a file like
configs/devices/atlas_a2.yaml with other parameters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from make_checkpoint import make_config

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.roofline import PRECISIONS, Device, decode_seconds, load_device, memory_bytes, prefill_seconds

BATCHES = (1, 2, 4, 8, 16, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="atlas_a2", help="name or file (default: atlas_a2)")
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens of each prompt (default: 512)")
    parser.add_argument(
        "--context", type=int, default=2048, help="cached tokens of each sequence in decode (default: 2048)"
    )
    arguments = parser.parse_args()
    if arguments.prompt_len < 1 or arguments.context < 1:
        parser.error("--prompt-len and --context: wanted at least 1")
    try:
        device = load_device(arguments.device)
    except PanguQuantError as error:
        print(f"predict_ascend: error: {error}", file=sys.stderr)
        return 2
    for shape in ("1b", "7b"):
        _predict(device, shape, arguments.prompt_len, arguments.context)
    return 0


def _predict(device: Device, shape: str, prompt_len: int, context: int) -> None:
    config = ModelConfig.from_dict(make_config(shape), where=shape)
    print(f"\n**{shape.upper()}, prefill of {prompt_len} tokens**: ms (times as fast as float16)\n")
    _rows(lambda batch, precision: prefill_seconds(device, config, precision, batch, prompt_len))
    print(f"\n**{shape.upper()}, decode after {context} tokens**: ms a step (times as fast as float16)\n")
    _rows(lambda batch, precision: decode_seconds(device, config, precision, batch, context))
    sizes = [f"{precision} {memory_bytes(config, precision, context) / 2**30:.2f}" for precision in PRECISIONS]
    print(f"\nGiB of weights and cache, batch 1: {', '.join(sizes)}")


def _rows(seconds: Callable[[int, str], float]) -> None:
    print("| batch | " + " | ".join(PRECISIONS) + " |")
    print("|---|" + "---|" * len(PRECISIONS))
    for batch in BATCHES:
        base = seconds(batch, PRECISIONS[0])
        cells = [f"{1e3 * (time := seconds(batch, precision)):.1f} ({base / time:.2f})" for precision in PRECISIONS]
        print(f"| {batch} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
