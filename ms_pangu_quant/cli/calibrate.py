"""pangu-quant calibrate"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ms_pangu_quant.api import CalibrationRequest, calibrate
from ms_pangu_quant.chats.facts import told
from ms_pangu_quant.chats.job import MAX_NEW_TOKENS, SAMPLES
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES
from ms_pangu_quant.cli.console import AsJson, Checkpoint, Device, Verbose, err, out, progress_bars
from ms_pangu_quant.inference.sampling import OWN

_OWN = "Default: generation_config.json's, else {}."


def calibrate_command(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="New .jsonl of the rows; what made them in a .json beside it.", show_default=False
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Lines of prompt (a text) or messages (a chat), kind, language. Default: the checkpoint's own "
            "prompts.jsonl, else those of the package."
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(help=f"Thinking modes, separated by commas: {', '.join(THINKING_MODES)}. Default: all it has."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows to write.")] = SAMPLES,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens an answer may have, thought included.")
    ] = MAX_NEW_TOKENS,
    temperature: Annotated[float | None, typer.Option(help=_OWN.format(OWN["temperature"]))] = None,
    top_p: Annotated[float | None, typer.Option(help=_OWN.format(OWN["top_p"]))] = None,
    top_k: Annotated[int | None, typer.Option(help=_OWN.format("0, which is all"))] = None,
    seed: Annotated[int, typer.Option(help="Of the draws, and of who is asked what.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers under way at a time.")] = 16,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    as_json: AsJson = False,
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Calibration text by the model itself: its own answers, thoughts included, to prompts in each of its thinking modes.

    Answers that loop, whose thought does not end, that are empty or hold a benchmark's problem are dropped and replaced.
    The model is loaded whole, as for generate; one process answers. `quantize --calibration auto` does this by itself.

    Example:
        pangu-quant calibrate openPangu-Embedded-7B --output chats.jsonl
    """
    chosen = None if modes is None else [mode.strip() for mode in modes.split(",") if mode.strip()]
    request = CalibrationRequest(
        checkpoint, prompts, chosen, samples, max_new_tokens, temperature, top_p, top_k, seed, batch_size, device
    )
    with progress_bars("{task.fields[speed]}") as bars:
        shown = _Shown(bars)
        made = calibrate(request, output, resume=resume, on_begin=shown.begin, on_tokens=shown.count, on_row=shown.advance)
    if as_json:
        print(json_text({"output": str(output), **made.facts}))
        return
    out.print(f"{output}: {'already complete; ' * made.was_complete}{told(made.facts)}", soft_wrap=True, markup=False)
    if not made.was_complete:
        err.print(f"[dim]{shown.tokens} tokens in {shown.seconds:.0f} s[/dim]")


class _Shown:
    """A bar of the rows, once the model is loaded, with the speed."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self.tokens, self._started = bars, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def begin(self, total: int) -> None:
        self._started = time.monotonic()
        self._task = self._bars.add_task("rows", total=total, kind="count", speed="")

    def count(self, tokens: int) -> None:
        self.tokens += tokens
        self._bars.update(self._task, speed=f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s")

    def advance(self) -> None:
        self._bars.advance(self._task)
