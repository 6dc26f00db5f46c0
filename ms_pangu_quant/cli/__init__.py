"""The command line, pangu-quant: one file for each command, gathered here.

Results go to the standard output, progress and errors to the standard error. Exit codes: 0 done, 2 something the user can
mend (one line says what), 1 another process of the job has ended, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from ms_pangu_quant.cli.bench import bench_command
from ms_pangu_quant.cli.compare import compare_command
from ms_pangu_quant.cli.console import err
from ms_pangu_quant.cli.doctor import doctor_command
from ms_pangu_quant.cli.evaluate import evaluate_command
from ms_pangu_quant.cli.export import export_command
from ms_pangu_quant.cli.generate import generate_command
from ms_pangu_quant.cli.inspect import inspect_command
from ms_pangu_quant.cli.merge import merge_command
from ms_pangu_quant.cli.quantize import quantize_command
from ms_pangu_quant.cli.report import report_command
from ms_pangu_quant.cli.sensitivity import sensitivity_command
from ms_pangu_quant.cli.verify import verify_command
from ms_pangu_quant.errors import PanguQuantError

_OUT_OF_MEMORY = "out of memory; quantize --dry-run tells what a run takes, and a run that has begun goes on with --resume"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-training quantization (W8A8, W4A8) of openPangu-Embedded checkpoints in MindSpore.",
)
app.command("quantize")(quantize_command)
app.command("sensitivity")(sensitivity_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("export")(export_command)
app.command("merge")(merge_command)
app.command("compare")(compare_command)
app.command("generate")(generate_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
app.command("evaluate")(evaluate_command)
app.command("report")(report_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; arguments default to the process's. Returns the exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except PanguQuantError as error:
        err.print(f"pangu-quant: error: {error}", style="red", markup=False, soft_wrap=True)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except Exception as error:
        if isinstance(error, MemoryError) or "Allocate memory failed" in str(error):  # NumPy's, or MindSpore's
            err.print(f"pangu-quant: error: {_OUT_OF_MEMORY}", style="red", markup=False, soft_wrap=True)
            return 2
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own: a wrong option
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)
        raise
    return code if isinstance(code, int) else 0  # typer returns the code of an Exit that a command raised
