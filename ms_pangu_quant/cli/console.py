"""What the commands share: the two consoles, progress bars, and how sizes, memory and common options are written."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ms_pangu_quant.checkpoint.fast_tokenizer import unserved
from ms_pangu_quant.checkpoint.files import size as size  # for the commands
from ms_pangu_quant.checkpoint.tokenizer import unusable
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.formats.reader import FORMATS
from ms_pangu_quant.inference.endpoint import API_KEY, Endpoint
from ms_pangu_quant.network import runtime

_SILENT_SECONDS = 60
out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

Checkpoint = Annotated[
    Path, typer.Argument(help="Hugging Face checkpoint directory (openPangu-Embedded or Llama).", show_default=False)
]
Directory = Annotated[Path, typer.Argument(help="Checkpoint directory, float or quantized.", show_default=False)]
Verbose = Annotated[  # its callback is all it does: no command looks at the value
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Show what MindSpore and MindFormers print.",
        callback=lambda wanted: runtime.show_output() if wanted else None,
    ),
]
Device = Annotated[str, typer.Option(help="cpu or ascend.")]
Head = Annotated[
    str, typer.Option(help="stored, or int8: round a quantized checkpoint's head when it is loaded, for faster decoding.")
]
Format = Annotated[
    str, typer.Option("--format", help=f"Layout on disk: {', '.join(FORMATS)}. docs/formats.md says who reads which.")
]
AllowUnserved = Annotated[
    bool, typer.Option("--allow-unserved", help="Write a scheme in a format in which no program computes it.")
]
AllowBenchmarkOverlap = Annotated[
    bool,
    typer.Option("--allow-benchmark-overlap", help="Accept calibration data that contains HumanEval or MBPP problems."),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint", help=f"Ask an OpenAI-compatible server, http://host:port/v1; a key is read from {API_KEY}."),
]
ServedName = Annotated[str | None, typer.Option("--model", help="What the server calls the model. Default: its only one.")]
ServerTimeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds that an answer of the server may take; 600 by default.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus of the distribution that is drawn from.")]
TopK = Annotated[int, typer.Option(help="Draw from so many tokens; 0 is all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def endpoint_of(url: str | None, model: str | None, timeout: float | None) -> Endpoint | None:
    """Raises RequestError for an option that goes with --endpoint alone."""
    if url is not None:
        return Endpoint(url, model, *([] if timeout is None else [timeout]))
    if model is not None or timeout is not None:
        raise RequestError(f"--{'timeout' if model is None else 'model'} goes with --endpoint")
    return None


def figure(value: float | None, form: str) -> str:
    """A number for a table, "-" for one that there is not."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def progress_bars(*columns: str) -> Bars:
    """columns  behind the amount, as rich writes them."""
    return Bars(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=24),
        Amount(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


class Amount(MofNCompleteColumn):
    def render(self, task: Task) -> Text:
        return DownloadColumn().render(task) if task.fields.get("kind") == "bytes" else super().render(task)


class Bars(Progress):
    """Bars on a terminal. In a file, a log of a job for one, a line a minute instead of what takes longer; a task that is
    told in lines of its own has the field lines=True."""

    _said = 0.0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if not self.console.is_terminal:
            self._say(task_id)

    def update(self, task_id: TaskID, **changed: Any) -> None:
        super().update(task_id, **changed)
        if not self.console.is_terminal:
            self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task = next(each for each in self.tasks if each.id == task_id)
        now = self.get_time()
        since = max(self._said, now if task.start_time is None else task.start_time)
        if task.fields.get("lines") or task.finished or now - since < _SILENT_SECONDS:
            return
        self._said = now
        done, seconds = Amount().render(task).plain.strip(), task.elapsed or 0.0
        left = (task.total or 0) / task.completed - 1 if task.completed else 0
        self.console.print(f"{task.description}: {done} in {duration(seconds)}, {duration(seconds * left)} left")


def duration(seconds: float) -> str:
    """As "45 s", "12 min" or "3 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory() -> str:
    return size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def tell_unusable_tokenizer(directory: Path) -> None:
    """One line, before anything takes long, for a command that gets by without the tokenizer and hands it on."""
    if (fault := unusable(directory)) is not None:
        err.print(f"the tokenizer cannot be used, and stays as it is: {fault}", soft_wrap=True, markup=False)


def tell_unserved_tokenizer(directory: Path) -> None:
    """One line, of a directory that was written without the tokenizer.json that servers read."""
    if unusable(directory) is None and (fault := unserved(directory)) is not None:
        err.print(f"servers need --trust-remote-code for the tokenizer: {fault}", soft_wrap=True, markup=False)
