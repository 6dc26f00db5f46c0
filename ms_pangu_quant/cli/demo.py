"""pangu-quant demo: the other commands, one after another, on the checkpoint that is included.

All are run in this process, so that the frameworks are imported once; what is printed before each does the same in a
shell. A step is done when its file is there, since every command gives it its name when it is complete. So a demo that was
stopped goes on where it stopped, and one that is done only shows its results again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.table import Table

from ms_pangu_quant.checkpoint.files import json_bytes, write_atomically
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES
from ms_pangu_quant.cli.console import figure, out, size
from ms_pangu_quant.cli.doctor import sandbox_fault
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.evaluation.job import SUMMARY_FILE
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP, RLIMITS
from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.evaluation.tasks.task import load_problems
from ms_pangu_quant.report.inspection import inspection

_MARK = "demo.json"  # makes a folder a demo's, and says which demo's
_RECIPES = ("w8a8", "w4a8_g128", "w4a8_g128_rtn")
_EVALUATED = ("float", "w8a8", "w4a8_g128")
_SPEAKING = "w4a8_g128"
_TASK = "mini"
_WIDTH = 78
_NEXT = """\
Next, your own checkpoint; --dry-run says what it will take:
  pangu-quant quantize openPangu-Embedded-7B --recipe w8a8 \\
      --calibration chats.jsonl --output pangu-7b-w8a8 --dry-run
"""


@dataclass(frozen=True)
class Step:
    """A command, done once `done` is there. Of one that `prints`, it is what the command prints; it reads `stdin`."""

    words: tuple[str, ...]
    done: Path
    prints: bool = False
    stdin: Path | None = None

    @property
    def shell(self) -> str:
        """The command as a shell takes it, an option and its value on one line of at most 78 columns if they fit."""
        redirected = [f"< {_quoted(self.stdin)}"] if self.stdin else []
        redirected += [f"> {_quoted(self.done)}"] if self.prints else []
        pieces = ["pangu-quant", *_with_values(self.words), *redirected]
        lines = [f"$ {pieces[0]}"]
        for piece in pieces[1:]:
            fits = len(lines[-1]) + len(piece) + 3 <= _WIDTH
            lines[-1:] = [f"{lines[-1]} {piece}"] if fits else [f"{lines[-1]} \\", f"      {piece}"]
        return "\n".join(lines)


def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a demo begun there goes on.")] = Path(
        "demo_output"
    ),
) -> None:
    """Quantize, compare, generate, evaluate and report on the small checkpoint that is included.

    Prints each command before it is run. Takes minutes; one that was stopped goes on where it stopped.

    Example:
        pangu-quant demo --output demo_output
    """
    started = time.monotonic()
    assets = _assets()
    with _opened(output, assets):
        planned = steps(output, assets, RLIMITS if sandbox_fault() else BUBBLEWRAP)
        left = [(number, step) for number, step in enumerate(planned, 1) if not step.done.exists()]
        for number, step in left:
            print(f"\n# {number} of {len(planned)}\n{step.shell}", flush=True)
            _run(step)
            sys.stdout.flush()  # or it would stand behind what the next step says on the standard error
    _show_answers(output)
    _show_table(output, assets)
    if not left:
        out.print(f"Nothing was left to do: {output} was done before. Remove it to do it again.", soft_wrap=True)
    else:
        out.print(f"Done in {time.monotonic() - started:.0f} s.")
    out.print(f"The page with the scores: {_report(output)}\n", soft_wrap=True)
    out.print(_NEXT, markup=False, soft_wrap=True, end="")


def steps(output: Path, assets: Path, sandbox: str) -> list[Step]:
    """What the demo does, in order."""
    model, answers = str(assets / "openpangu-mini"), output / "answers"
    planned = []
    for recipe in _RECIPES:
        directory = output / recipe
        words = ["quantize", model, "--recipe", recipe, "--output", str(directory)]
        words += [] if recipe.endswith("_rtn") else ["--calibration", str(assets / "calibration.jsonl")]
        words += ["--resume"] if directory.exists() else []
        planned.append(Step(tuple(words), directory / "config.json"))  # which is written last
        words = ["compare", model, str(directory), "--data", str(assets / "validation.jsonl"), "--limit", "60", "--json"]
        planned.append(Step(tuple(words), _comparison(output, recipe), prints=True))
    for mode in THINKING_MODES:
        words = ["generate", str(output / _SPEAKING), "--mode", mode, "--prompt", "-", "--json"]
        planned.append(Step(tuple(words), _answer(output, mode), prints=True, stdin=answers / "problem.txt"))
    for name in _EVALUATED:
        evaluated, results = model if name == "float" else str(output / name), output / "evaluation" / name
        # Not all problems, to be done in minutes; the page says so.
        words = ["evaluate", evaluated, "--tasks", _TASK, "--limit", "40", "--max-new-tokens", "230", "--batch-size", "64"]
        words += ["--sandbox", sandbox, "--output", str(results)]
        planned.append(Step(tuple(words), results / SUMMARY_FILE))
    evaluations = [str(output / "evaluation" / name) for name in _EVALUATED]
    return [*planned, Step(("report", *evaluations, "--output", str(output / "report")), _report(output))]


def _run(step: Step) -> None:
    """Raises what the command raises, and Exit if it ends with another code than 0."""
    from ms_pangu_quant.cli import app  # which knows this command too

    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        if step.stdin is not None:
            stack.enter_context(_reading(step.stdin))
        if step.prints:
            stack.enter_context(contextlib.redirect_stdout(printed))
        code = app(list(step.words), prog_name="pangu-quant", standalone_mode=False)
    if code:
        raise typer.Exit(code)
    if step.prints:
        step.done.parent.mkdir(exist_ok=True)
        write_atomically(step.done, [printed.getvalue().encode()])
        _show_comparison(json.loads(printed.getvalue()))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    before = sys.stdin
    with open(path, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _opened(output: Path, assets: Path) -> IO[bytes]:
    """Hold the folder for this process until what is returned is closed. Raises OutputError if it is not this demo's."""
    mark = output / _MARK
    made_by = {"version of ms_pangu_quant": version("ms_pangu_quant"), "sha256 of the assets": _digest(assets)}
    try:
        if not mark.exists() and output.exists() and any(output.iterdir()):
            raise OutputError(f"{output}: holds something that no demo wrote; choose another --output")
        (output / "answers").mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            problem = next(iter(load_problems(TASKS[_TASK]).by_id.values()))
            write_atomically(output / "answers/problem.txt", [problem.statement.text.encode()])
            write_atomically(mark, [json_bytes(made_by)])
        elif mark.read_bytes() != json_bytes(made_by):
            raise OutputError(
                f"{output}: holds the demo of another version of this program; remove it, or choose another --output"
            )
        lock = open(mark, "rb")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise OutputError(f"{output}: another demo is at work here; wait for it, or choose another --output") from None
    except OSError as error:
        raise OutputError(f"{output}: cannot write here ({error.strerror}); choose another --output") from None


def _digest(assets: Path) -> str:
    digest = hashlib.sha256()
    names = ["calibration.jsonl", "validation.jsonl", TASKS[_TASK].file, "openpangu-mini/model.safetensors"]
    for name in names:
        digest.update(hashlib.sha256((assets / name).read_bytes()).digest())
    return digest.hexdigest()


# --- what is shown --------------------------------------------------------------------------------------------------


def _show_comparison(found: dict[str, Any]) -> None:
    """Nothing for what is not a comparison: answers are shown together."""
    if "kl_mean" in found:
        out.print(
            f"mean KL {figure(found['kl_mean'], '.3g')} nats, top-1 agreement {figure(found['top1_agreement'], '.2%')}, "
            f"perplexity {figure(found['ppl_quantized'], '.4f')} (float {figure(found['ppl_reference'], '.4f')})",
            soft_wrap=True,
        )


def _show_answers(output: Path) -> None:
    """A problem, and what the quantized model makes of it in each thinking mode."""
    out.print("\nA problem that the model has not seen:", style="bold")
    out.print((output / "answers/problem.txt").read_text(encoding="utf-8").strip(), markup=False, style="dim")
    for mode in THINKING_MODES:
        found = json.loads(_answer(output, mode).read_bytes())
        out.print(f"\n{_SPEAKING}, {mode}, {len(found['token_ids'])} tokens:", style="bold")
        if found["thought"]:
            out.print(found["thought"].strip(), markup=False, style="dim")
        out.print(found["answer"].strip(), markup=False)


def _show_table(output: Path, assets: Path) -> None:
    """Float beside quantized."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "bits", "size", "mean KL", "top-1", "passed"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in ("float", *_RECIPES):
        held = inspection(assets / "openpangu-mini" if name == "float" else output / name)
        apart = {} if name == "float" else json.loads(_comparison(output, name).read_bytes())
        table.add_row(
            name,
            f"{held['bits_per_weight']:.2f}",
            size(held["bytes"]),
            figure(apart["kl_mean"], ".2g") if apart else "",
            figure(apart["top1_agreement"], ".1%") if apart else "",
            _passed(output, name) if name in _EVALUATED else "",
        )
    out.print()
    out.print(table)
    out.print("KL in nats and top-1 agreement are to the float model; passed: problems of all thinking modes.\n")


def _passed(output: Path, name: str) -> str:
    entries = json.loads((output / "evaluation" / name / SUMMARY_FILE).read_bytes())["entries"]
    return f"{sum(entry['passed'] for entry in entries)}/{sum(entry['samples'] for entry in entries)}"


def _comparison(output: Path, recipe: str) -> Path:
    return output / "comparison" / f"{recipe}.json"


def _answer(output: Path, mode: str) -> Path:
    return output / "answers" / f"{mode}.json"


def _report(output: Path) -> Path:
    return output / "report" / "report.html"


def _with_values(words: Sequence[str]) -> list[str]:
    """Quoted words, an option's value joined to it."""
    joined: list[str] = []
    for index, word in enumerate(words):
        valued = index > 0 and words[index - 1].startswith("--") and not word.startswith("--")
        joined[-1:] = [f"{joined[-1]} {_quoted(word)}"] if valued else [*joined[-1:], _quoted(word)]
    return joined


def _quoted(word: str | Path) -> str:
    return shlex.quote(str(word))


def _assets() -> Path:
    """Relative where that is shorter to read: below the current folder."""
    path = Path(str(files("ms_pangu_quant") / "assets"))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
