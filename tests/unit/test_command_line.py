"""The command line before any work is done: help, examples, wrong names, no arguments at all."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ms_pangu_quant import installation
from ms_pangu_quant.cli import app, main
from ms_pangu_quant.evaluation.tasks import TASKS

GROUP = typer.main.get_command(app)
ROOT = Path(__file__).parents[2]
TOOLS = [  # those with a parser of argparse; the thin mains of commands show the command's help
    str(path.relative_to(ROOT / "tools").with_suffix(""))
    for path in sorted(ROOT.glob("tools/**/*.py"))
    if re.search(r"Parser\(", path.read_text(encoding="utf-8"))
]


def examples(text: str) -> list[list[str]]:
    """The commands of an example, one a line but for lines that a backslash continues."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def said(capsys, *arguments: str) -> str:
    """The one line of a command that must be refused."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("pangu-quant: error: ")
    return line


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUP.commands)
def test_the_help_of_every_command_ends_with_an_example_that_its_parser_accepts(name, capsys, monkeypatch):
    command = GROUP.commands[name]
    given = examples(command.example)
    assert given
    for words in given:
        assert words[:2] == ["pangu-quant", name]
        command.make_context(name, words[2:])  # parses, and raises for what it does not know
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert examples(shown.partition("\n Example:\n")[2]) == given
    assert max(map(len, shown.splitlines())) <= 80


def test_an_example_with_a_wrong_option_would_be_noticed():
    with pytest.raises(Exception, match="--recipee"):
        GROUP.commands["quantize"].make_context("quantize", ["x", "--recipee", "w8a8", "--output", "y"])


class _Parsing(Exception):
    """Carries the parser that a tool was about to use."""


@pytest.mark.parametrize("name", TOOLS)
def test_the_help_of_every_tool_ends_with_an_example_that_its_parser_accepts(name, monkeypatch):
    module = importlib.import_module(f"tools.{name.replace('/', '.')}")

    def caught(parser, args=None, namespace=None):
        raise _Parsing(parser)

    with monkeypatch.context() as patched:
        for owner in (argparse.ArgumentParser, getattr(module, "Parser", argparse.ArgumentParser)):
            patched.setattr(owner, "parse_args", caught)
        with pytest.raises(_Parsing) as raised:
            module.main()
    (parser,) = raised.value.args
    given = examples(parser.format_help().partition("\nExample:\n")[2])
    assert given
    for words in given:
        assert words[:2] == ["python", f"tools/{name}.py"]
        parser.parse_args(words[2:])  # exits for what it does not know


@pytest.mark.parametrize("name", ["ascend/acceptance", "msrun_quantize", "msrun_generate", "msrun_evaluate"])
def test_the_help_of_every_shell_tool_ends_with_an_example(name, root):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [root / "tools" / f"{name}.sh", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    (words,) = examples(done.stdout.partition("Example:\n")[2])
    assert words[0] == f"tools/{name}.sh" or words[:4] == ["python", "-m", "ms_pangu_quant.job.msrun", "quantize"]


# --- wrong names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "likely"),
    [
        (["quantise"], "quantize"),
        (["Doctor"], "doctor"),
        (["quantize", "--recpe", "w8a8"], "--recipe"),
        (["evaluate", "x", "--score-onyl"], "--score-only"),
        (["--verson"], "--version"),
        (["export", "x", "--format", "asend", "--output", "y"], "ascend"),
        (["evaluate", "x", "--tasks", "humanevl"], "humaneval"),
        (["evaluate", "x", "--modes", "slow_thnik"], "slow_think"),
        (["evaluate", "x", "--prompt", "zero_shot_instuct"], "zero_shot_instruct"),
        (["inspect", "x", "--graph", "--device", "asscend"], "ascend"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_likely_one(arguments, likely, capsys):
    assert f"(did you mean '{likely}'?)" in said(capsys, *arguments)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_found_with_a_letter_missing(task, capsys):
    assert "(did you mean '" in said(capsys, "evaluate", "x", "--tasks", task[1:])


@pytest.mark.parametrize("recipe", ["w8a8_statc", "W4A8_G128", "w4a8_mixd"])
def test_a_mistyped_recipe_is_answered_with_a_shipped_one(recipe, capsys, mini):
    line = said(capsys, "quantize", str(mini), "--recipe", recipe, "--output", "never-written")
    assert "(did you mean 'w" in line


def test_a_name_like_nothing_gets_no_suggestion(capsys):
    assert "did you mean" not in said(capsys, "xyzzy")
    assert "did you mean" not in said(capsys, "doctor", "--qqqq")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{}"],
        ["quantize", "{}", "--recipe", "w8a8_rtn", "--output", "never-written"],
        ["compare", "{}", "y", "--data", "z"],
        ["bench", "{}"],
        ["generate", "{}", "--prompt", "hello"],
        ["evaluate", "{}", "--output", "never-written"],
        ["sensitivity", "{}", "--recipe", "w4a8", "--calibration", "x", "--output", "never-written"],
        ["export", "{}", "--format", "ascend", "--output", "never-written"],
        ["merge", "{}", "--output", "never-written"],
        ["report", "{}", "--output", "never-written"],
    ],
)
def test_a_mistyped_folder_is_answered_with_its_neighbour(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right, wrong = tmp_path / "models/openPangu-Embedded-7B", tmp_path / "model/openpangu-embeded-7b"
    right.mkdir(parents=True)
    line = said(capsys, *(word.format(wrong) for word in arguments))
    assert f"(did you mean '{right}'?)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_verify_names_the_neighbour_of_a_mistyped_folder_among_its_faults(tmp_path, capsys):
    (tmp_path / "pangu-w8a8").mkdir()
    assert main(["verify", str(tmp_path / "pangu-w8a")]) == 2
    assert f"(did you mean '{tmp_path / 'pangu-w8a8'}'?)" in capsys.readouterr().out


def test_a_mistyped_data_file_is_answered_with_its_neighbour(tmp_path, capsys, mini):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    line = said(capsys, "compare", str(mini), str(mini), "--data", str(tmp_path / "chat.jsonl"))
    assert f"(did you mean '{tmp_path / 'chats.jsonl'}'?)" in line


@pytest.mark.parametrize(
    ("arguments", "likely"),
    [(["quantise"], "quantize"), (["quantize", "--worker", "2", "--localworkers", "2"], "--local-workers")],
)
def test_msrun_answers_a_mistyped_name_too(arguments, likely, capsys):
    from ms_pangu_quant.job import msrun

    with pytest.raises(SystemExit) as ended:
        msrun.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert f"(did you mean '{likely}'?)" in line


@pytest.mark.parametrize("arguments", [["quantize"], ["bench", "x", "--repeats", "many"], ["doctor", "x"], ["evaluate"]])
def test_any_other_wrong_command_line_is_one_line_too(arguments, capsys):
    assert said(capsys, *arguments)


# --- the beginning --------------------------------------------------------------------------------------------------


def test_without_arguments_in_an_empty_folder_it_says_where_to_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert {"demo", "doctor", "quantize"} <= set(re.findall(r"^  pangu-quant (\w+)", printed.err, re.MULTILINE))
    assert max(map(len, printed.err.splitlines())) <= 80
    assert len(printed.err.splitlines()) <= 15
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_the_installed_one(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ms_pangu_quant {installation.version()}\n"


def test_a_requirement_that_is_not_installed_is_one_line_with_the_command_for_it(capsys, monkeypatch):
    def broken(*arguments):
        raise ModuleNotFoundError("No module named 'mindspore'", name="mindspore.common")

    monkeypatch.setattr("ms_pangu_quant.cli.doctor.diagnosis", broken)
    line = said(capsys, "doctor")
    assert "mindspore is not installed; pip install 'mindspore==" in line


def test_a_module_that_is_no_requirement_keeps_its_traceback(monkeypatch):
    def broken(*arguments):
        raise ModuleNotFoundError("No module named 'ms_pangu_quant.quantise'", name="ms_pangu_quant.quantise")

    monkeypatch.setattr("ms_pangu_quant.cli.doctor.diagnosis", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_without_its_requirements_the_program_still_answers_in_one_line(root):
    """As it is when only the package itself was copied somewhere: typer, NumPy and the rest are not there."""
    program = "import sys\nsys.modules['typer'] = None\nfrom ms_pangu_quant.__main__ import run\nrun(['doctor'])\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pangu-quant: error: typer is not installed; pip install 'typer")


def test_the_example_of_a_docstring_is_not_part_of_the_help_above_it():
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(["quantize", "--help"])
    assert shown.getvalue().count("Example") == 1
