"""Predict prefill latency, decode speed and memory of openPangu-Embedded on an Ascend device, as Markdown tables.

A prediction from the device's limits (ms_pangu_quant/report/roofline.py), not a measurement; --device takes a file like
configs/devices/atlas_a2.yaml with other parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.report.prediction import BATCHES, Prediction, predict
from tools.dev.make_checkpoint import make_config


def main() -> int:
    parser = Parser(description=__doc__, example="python tools/ascend/predict.py --prompt-len 1024")
    parser.add_argument("--device", default="atlas_a2", help="name or file (default: atlas_a2)")
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens of each prompt (default: 512)")
    parser.add_argument(
        "--context", type=int, default=2048, help="cached tokens of each sequence in decode (default: 2048)"
    )
    arguments = parser.parse_args()
    if arguments.prompt_len < 1 or arguments.context < 1:
        parser.error("--prompt-len and --context: wanted at least 1")
    for shape in ("1b", "7b"):
        config = ModelConfig.from_dict(make_config(shape), where=shape)
        try:
            found = predict(shape.upper(), config, arguments.device, prompt=arguments.prompt_len, context=arguments.context)
        except PanguQuantError as error:
            print(f"ascend/predict: error: {error}", file=sys.stderr)
            return 2
        _show(found, arguments.prompt_len, arguments.context)
    return 0


def _show(found: Prediction, prompt_len: int, context: int) -> None:
    print(f"\n**{found.model}, prefill of {prompt_len} tokens**: ms (times as fast as float16)\n")
    _rows(found.prefill)
    print(f"\n**{found.model}, decode after {context} tokens**: ms a step (times as fast as float16)\n")
    _rows(found.decode)
    print(f"\nGiB of weights and cache, batch 1: {', '.join(f'{name} {size:.2f}' for name, size in found.memory.items())}")


def _rows(latencies: Mapping[str, Sequence[float]]) -> None:
    print("| batch | " + " | ".join(latencies) + " |")
    print("|---|" + "---|" * len(latencies))
    for batch, *times in zip(BATCHES, *latencies.values(), strict=True):
        print(f"| {batch} | " + " | ".join(f"{time:.1f} ({times[0] / time:.2f})" for time in times) + " |")


if __name__ == "__main__":
    sys.exit(main())
