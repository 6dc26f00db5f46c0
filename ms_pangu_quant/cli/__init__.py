"""The command line, pangu-quant: one file for each command, gathered here.

Results go to the standard output, progress and errors to the standard error. Exit codes: 0 done, 2 something the user can
mend (one line says what), 1 another process of the job has ended, or tune met no
target, 130 interrupted, 143 terminated. Without a command it
says where to begin and exits with 2: nothing was asked for, and a script whose command is an empty variable should notice.

The text behind "Example:" in a command's docstring ends its --help, ready to be copied.
"""

from __future__ import annotations

import inspect as introspection
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ms_pangu_quant.checkpoint.files import CheckpointNote
from ms_pangu_quant.cli.bench import bench_command
from ms_pangu_quant.cli.calibrate import calibrate_command
from ms_pangu_quant.cli.compare import compare_command
from ms_pangu_quant.cli.console import err, out
from ms_pangu_quant.cli.demo import demo_command
from ms_pangu_quant.cli.doctor import doctor_command
from ms_pangu_quant.cli.evaluate import evaluate_command
from ms_pangu_quant.cli.export import export_command
from ms_pangu_quant.cli.generate import generate_command
from ms_pangu_quant.cli.inspect import inspect_command
from ms_pangu_quant.cli.merge import merge_command
from ms_pangu_quant.cli.quantize import quantize_command
from ms_pangu_quant.cli.report import report_command
from ms_pangu_quant.cli.sensitivity import sensitivity_command
from ms_pangu_quant.cli.tune import tune_command
from ms_pangu_quant.cli.verify import verify_command
from ms_pangu_quant.errors import PanguQuantError, RequestError
from ms_pangu_quant.installation import missing_module
from ms_pangu_quant.suggestion import did_you_mean

_OUT_OF_MEMORY = "out of memory; quantize --dry-run tells what a run takes, and a run that has begun goes on with --resume"
_BEGIN = """\
Quantizes openPangu-Embedded checkpoints to W8A8 and W4A8 in MindSpore.

Begin here:
  pangu-quant doctor   what this machine has, and what to install next
  pangu-quant demo     the whole job on a small included model, in minutes
  pangu-quant quantize openPangu-Embedded-7B --recipe w8a8 \\
      --calibration chats.jsonl --output pangu-7b-w8a8
                       your own checkpoint; --dry-run says what it will take

pangu-quant --help lists the commands; the help of each ends with an example.
"""
_EXAMPLE = "\n\nExample:\n"
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "doctor": doctor_command,
    "calibrate": calibrate_command,
    "quantize": quantize_command,
    "sensitivity": sensitivity_command,
    "tune": tune_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "export": export_command,
    "merge": merge_command,
    "compare": compare_command,
    "generate": generate_command,
    "bench": bench_command,
    "evaluate": evaluate_command,
    "report": report_command,
}


class _Command(typer.core.TyperCommand):
    @property
    def example(self) -> str:
        """The lines behind "Example:" in the docstring; typer's own epilog would join or part them."""
        return textwrap.dedent((introspection.getdoc(self.callback) or "").partition(_EXAMPLE)[2])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_example(self.example)


class _Group(typer.core.TyperGroup):
    example = "pangu-quant demo"

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_example(self.example)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise RequestError(f"{name}: no such command{did_you_mean(name, self.commands)}; pangu-quant --help lists them")
        return super().resolve_command(ctx, args)


def _print_example(lines: str) -> None:
    out.print(" Example:", textwrap.indent(lines.rstrip(), "   "), "", sep="\n", markup=False, soft_wrap=True)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ms_pangu_quant {version('ms_pangu_quant')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _begin(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Post-training quantization (W8A8, W4A8) of openPangu-Embedded checkpoints in MindSpore."""
    if context.invoked_subcommand is None:
        err.print(_BEGIN, markup=False, soft_wrap=True, end="")
        raise typer.Exit(2)


for _name, _command in COMMANDS.items():
    _text = (introspection.getdoc(_command) or "").partition(_EXAMPLE)[0]
    app.command(_name, cls=_Command, help=_text)(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; arguments default to the process's. Returns the exit code."""
    with _notes_shown():
        return _run(arguments)


@contextmanager
def _notes_shown() -> Iterator[None]:
    """What reading a checkpoint decided, in one line each; other warnings as ever."""
    shown: set[str] = set()
    usual = warnings.showwarning

    def show_note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, CheckpointNote):
            usual(message, category, *where, **more)
        elif str(message) not in shown:  # a directory may be opened several times
            shown.add(str(message))
            err.print(f"note: {message}", markup=False, soft_wrap=True)

    warnings.simplefilter("always", CheckpointNote)
    warnings.showwarning = show_note
    try:
        yield
    finally:
        warnings.showwarning = usual


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="pangu-quant", standalone_mode=False)
    except PanguQuantError as error:
        return _failed(str(error), error.exit_code)
    except BrokenPipeError:
        return 1
    except ModuleNotFoundError as error:
        message = missing_module(error)
        if message is None:
            raise
        return _failed(f"{message}; pangu-quant doctor checks the rest")
    except Exception as error:
        if isinstance(error, MemoryError) or "Allocate memory failed" in str(error):  # NumPy's, or MindSpore's
            return _failed(_OUT_OF_MEMORY)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: a wrong option
            return _failed(str(RequestError(_usage(error))), int(error.exit_code))
        raise
    return code if isinstance(code, int) else 0  # typer returns the code of an Exit that a command raised


def _failed(message: str, code: int = 2) -> int:
    err.print(f"pangu-quant: error: {message}", style="red", markup=False, soft_wrap=True)
    return code


def _usage(error: Any) -> str:
    """One line for a wrong command line: what typer found, the likely option, and where help is."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "pangu-quant"
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):
        known = _options(context) if context is not None else ()
        message = f"{name}: no such option{did_you_mean(name, known)}"
    else:
        message = " ".join(error.format_message().split()).rstrip(".")
        message = message[:1].lower() + message[1:]
    return "".join(f"{command}: " for command in where.split()[1:]) + f"{message}; {where} --help shows an example"


def _options(context: Any) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        yield from (name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-"))
