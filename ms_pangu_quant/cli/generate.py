"""pangu-quant generate"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ms_pangu_quant.api import GenerationSettings
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, find_tokenizer
from ms_pangu_quant.cli.console import AsJson, Device, Directory, Head, Temperature, TopK, TopP, Verbose, err
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.job import ranks

if TYPE_CHECKING:
    from ms_pangu_quant.inference.model import Generation, Prompt


def generate_command(
    directory: Directory,
    prompt: Annotated[
        list[str] | None, typer.Option(help="User message; may be given several times; - reads standard input.")
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(help="Prompt as comma-separated ids, for a checkpoint without a tokenizer.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help=f"Thinking mode: {', '.join(THINKING_MODES)}. Default: what the message says.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Annotated[int, typer.Option(help="Makes a draw repeatable.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")] = None,
    as_json: AsJson = False,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Under msrun, ranks that hold the model together; all by default.")
    ] = None,
    device: Device = "cpu",
    head: Head = "stored",
    verbose: Verbose = False,
) -> None:
    """Generate text from a float or quantized checkpoint in MindSpore graph mode.

    Example:
        pangu-quant generate pangu-7b-w8a8 --mode no_think \\
            --prompt "Write a function that reverses a list."
    """
    from ms_pangu_quant.inference.model import in_order, load

    prompts = _prompts(prompt, token_ids)
    if mode is None and (tokenizer := find_tokenizer(directory)) is not None:
        tokenizer.tell_only_mode()
    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    needed = max_new_tokens + max(map(len, prompts))  # a character is at least one byte, a token at least one too
    model = load(
        directory,
        device,
        kv_cache_tokens=max(8192, 2 * needed),
        head=head,
        tensor_parallel=tensor_parallel or ranks.job_size(),
    )
    started = time.monotonic()
    answers = in_order(model.stream(prompts, settings, mode=mode))
    if ranks.current().is_first:
        _print(answers, time.monotonic() - started, as_json)


def _prompts(messages: list[str] | None, token_ids: str | None) -> list[Prompt]:
    if bool(messages) == bool(token_ids):
        raise RequestError("generate: give --prompt, or --token-ids for a checkpoint without a tokenizer")
    if not token_ids:
        return [sys.stdin.read() if text == "-" else text for text in messages or []]
    try:
        return [[int(part) for part in token_ids.split(",")]]
    except ValueError:
        raise RequestError(f"--token-ids: got {token_ids!r}, wanted numbers separated by commas") from None


def _print(answers: list[Generation], seconds: float, as_json: bool) -> None:
    for number, answer in enumerate(answers):
        if as_json:
            print(json_text(asdict(answer), ascii=False))
            continue
        if number:
            print()
        if answer.thought is not None:
            print(f"[thought]\n{answer.thought}\n[answer]")
        print(answer.answer if answer.text else " ".join(map(str, answer.token_ids)))
    count = sum(len(answer.token_ids) for answer in answers)
    err.print(
        f"[dim]{count} tokens in {seconds:.1f} s; ended by {', '.join(answer.finish_reason for answer in answers)}[/dim]"
    )
