"""Speed of this project beside PyTorch and llama.cpp on the same weights, in turns: one table.

  python tools/peers/bench.py --float D --w8a8 D --w4a8 D --work DIR [--peers-python P] [--json]

Every engine is a process that waits while another computes, so a disturbance hits all of them alike. Before it is timed,
each engine's logits after the prompt are held against PyTorch's in float32; an engine further away than its precision
allows is an error. PyTorch runs Hugging Face's Llama with attention biases, llama.cpp its architecture "llama" with biases:
the same function as openPangu-Embedded. Its GGUF files are made once, in --work, by llama.cpp's own quantizer.

The peers are pinned in setup.py: pip install ".[peers]", here or in the environment of --peers-python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ms_pangu_quant.job.arguments import Parser

ENGINE = Path(__file__).with_name("engine.py")
# ||logits - reference|| / ||reference|| on a random checkpoint of the 1B shape stays below these; another function is 1 or
# more away. "int8 tensor": PyTorch's dynamic int8 has one scale for all tokens of an activation.
LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.15, "int8 tensor": 0.5, "int4": 0.8}


class Engine:
    """name of a row; precision, a key of LARGEST_ERROR; command, arguments of engine.py."""

    def __init__(self, name: str, precision: str, python: str, command: list[str], threads: int) -> None:
        self.name, self.precision = name, precision
        self.error = 0.0
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, str(ENGINE), command[0], command[1], str(threads), *command[2:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_PEERS_VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answer()

    def run(self, ids: list[int], steps: int, logits: Path | None = None) -> dict[str, Any]:
        assert self._process.stdin
        request = {"ids": ids, "steps": steps, "logits": str(logits) if logits else None}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with exit code {self._process.wait()}; BENCH_PEERS_VERBOSE=1 shows why")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def gguf_files(arguments: argparse.Namespace) -> dict[str, Path]:
    """Files of llama.cpp by kind; those of an earlier run are used again."""

    def made(name: str, *command: str) -> Path:
        file = arguments.work / name
        if not file.exists():
            scratch = file.with_suffix(".part")
            subprocess.run(
                [arguments.peers_python, str(ENGINE), *(str(scratch) if part == "OUT" else part for part in command)],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=None if os.environ.get("BENCH_PEERS_VERBOSE") else subprocess.DEVNULL,
            )
            scratch.rename(file)
        return file

    arguments.work.mkdir(parents=True, exist_ok=True)
    threads = str(arguments.threads)
    source = made("bf16.gguf", "write-gguf", str(arguments.float), threads, "OUT")
    kinds = ("Q8_0", "Q8_0+bf16", "Q4_0", "Q4_0+bf16")
    return {kind: made(f"{kind}.gguf", "quantize-gguf", str(source), threads, "OUT", kind) for kind in kinds}


def start_engines(arguments: argparse.Namespace) -> list[Engine]:
    peers, files = arguments.peers_python, gguf_files(arguments)
    wanted = [
        ("PyTorch float32", "float32", peers, ["torch", str(arguments.float), "float32"])
    ]  # the reference comes first
    wanted += [
        ("PyTorch bfloat16", "bfloat16", peers, ["torch", str(arguments.float), "bfloat16"]),
        ("PyTorch int8 (quantize_dynamic)", "int8 tensor", peers, ["torch", str(arguments.float), "int8"]),
        ("llama.cpp Q8_0", "int8", peers, ["llama.cpp", str(files["Q8_0"])]),
        ("llama.cpp Q8_0, bfloat16 head", "int8", peers, ["llama.cpp", str(files["Q8_0+bf16"])]),
        ("llama.cpp Q4_0", "int4", peers, ["llama.cpp", str(files["Q4_0"])]),
        ("llama.cpp Q4_0, bfloat16 head", "int4", peers, ["llama.cpp", str(files["Q4_0+bf16"])]),
        ("ours W8A8", "int8", sys.executable, ["ours", str(arguments.w8a8), "stored"]),
        ("ours W8A8, int8 head", "int8", sys.executable, ["ours", str(arguments.w8a8), "int8"]),
        ("ours W4A8", "int4", sys.executable, ["ours", str(arguments.w4a8), "stored"]),
        ("ours W4A8, int8 head", "int4", sys.executable, ["ours", str(arguments.w4a8), "int8"]),
    ]
    if arguments.with_ours_float:
        wanted.append(("ours float32", "float32", sys.executable, ["ours", str(arguments.float), "stored"]))
    reference, *others = wanted
    chosen = [reference, *(each for each in others if not any(text in each[0] for text in arguments.without))]
    return [Engine(name, precision, python, command, arguments.threads) for name, precision, python, command in chosen]


def check(engines: list[Engine], ids: list[int], work: Path) -> None:
    """The first engine is the reference. Exits where an engine does not compute the same function."""
    reference = None
    for engine in engines:
        file = work / "logits.npy"
        engine.run(ids, 2, file)
        logits = np.load(file)
        reference = logits if reference is None else reference
        engine.error = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
        if not engine.error <= LARGEST_ERROR[engine.precision]:
            raise SystemExit(
                f"{engine.name}: logits are {engine.error:.3f} away from {engines[0].name}'s, wanted at most "
                f"{LARGEST_ERROR[engine.precision]} for {engine.precision}: it does not compute the same"
            )


def measure(engines: list[Engine], ids: list[int], steps: int, repeats: int) -> list[dict[str, Any]]:
    prefill: dict[str, list[float]] = {engine.name: [] for engine in engines}
    decode: dict[str, list[float]] = {engine.name: [] for engine in engines}
    rss: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for engine in engines:
            times = engine.run(ids, steps)
            if repeat:  # the first warms up
                prefill[engine.name].append(times["prefill"])
                decode[engine.name].extend(times["decode"])
            rss[engine.name] = times["rss_gib"]
    rows = []
    for engine in engines:
        for phase, seconds, tokens in (("prefill", prefill, len(ids)), ("decode", decode, 1)):
            low, median, high = np.percentile(seconds[engine.name], [25, 50, 75])
            rows.append(
                {
                    "engine": engine.name,
                    "phase": phase,
                    "prompt_len": len(ids),
                    "latency_ms": 1e3 * float(median),
                    "tokens_per_s": float(tokens / median),
                    "spread": float((high - low) / median),
                    "peak_rss_gib": rss[engine.name],
                    "logits_error": engine.error,
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| engine | prefill tokens/s | +- | decode tokens/s | +- | peak memory GiB | logits from float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for prefill, decode in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {prefill['engine']} | {prefill['tokens_per_s']:.1f} | {prefill['spread']:.0%} "
            f"| {decode['tokens_per_s']:.1f} | {decode['spread']:.0%} "
            f"| {decode['peak_rss_gib']:.2f} | {prefill['logits_error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(
        description=__doc__,
        example="python tools/peers/bench.py --float ckpt --w8a8 ckpt-w8a8 --w4a8 ckpt-w4a8 --work peers",
    )
    for name in ("float", "w8a8", "w4a8", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--with-ours-float", action="store_true", help="our float graph too: 5 GB more for the 1B")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TEXT", help="leave out engines whose names have one of these in them"
    )
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a repetition")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only-files", action="store_true", help="make the GGUF files and end")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.only_files:
        gguf_files(arguments)
        return
    vocab = json.loads((arguments.float / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab, arguments.prompt_len).tolist()
    engines = start_engines(arguments)
    try:
        check(engines, ids, arguments.work)
        rows = measure(engines, ids, arguments.steps, arguments.repeats)
    finally:
        for engine in engines:
            engine.close()
    print(json.dumps(rows) if arguments.json else markdown(rows))


if __name__ == "__main__":
    main()
