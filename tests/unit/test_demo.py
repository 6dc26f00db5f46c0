"""The demo's plan and what it does when it is run again; what it computes is in tests/e2e/test_wheel.py."""

from __future__ import annotations

import shlex

import pytest
import typer

from ms_pangu_quant.cli import app, main

GROUP = typer.main.get_command(app)


def refused(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_step_of_the_demo_is_a_command_that_its_parser_accepts(tmp_path):
    from ms_pangu_quant.cli.demo import steps

    planned = steps(tmp_path / "out put", tmp_path, "bubblewrap")
    assert len({step.done for step in planned}) == len(planned)
    for step in planned:
        name, *rest = step.words
        GROUP.commands[name].make_context(name, list(rest))
        assert max(map(len, step.shell.splitlines())) <= 80 or str(tmp_path) in step.shell
        words = shlex.split(step.shell.removeprefix("$ ").replace("\\\n", ""))
        redirected = [">", str(step.done)] if step.prints else []
        redirected = ["<", str(step.stdin), *redirected] if step.stdin else redirected
        assert words == ["pangu-quant", *step.words, *redirected]


@pytest.fixture
def rehearsed(monkeypatch):
    """The demo with steps that only write their last file; returns (main, the steps that ran, the one to fail at)."""
    from ms_pangu_quant.cli import demo

    ran, fail_at = [], []

    def run(step):
        if len(ran) in fail_at:
            raise typer.Exit(2)
        ran.append(step.done)
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "_show_answers", lambda output: None)
    monkeypatch.setattr(demo, "_show_table", lambda output, assets: None)
    monkeypatch.setattr(demo, "sandbox_fault", lambda: None)
    return ran, fail_at


def test_a_demo_that_ended_goes_on_with_the_step_it_ended_in_and_is_done_once(tmp_path, rehearsed, capsys):
    from ms_pangu_quant.cli.demo import steps

    ran, fail_at = rehearsed
    fail_at.append(4)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert len(ran) == 4
    fail_at.clear()
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    assert ran == [step.done for step in steps(tmp_path / "out", tmp_path, "")]
    capsys.readouterr()
    before = len(ran)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    assert len(ran) == before
    assert "was done before" in capsys.readouterr().out


def test_a_quantization_that_was_begun_is_resumed(tmp_path):
    from ms_pangu_quant.cli.demo import steps

    (tmp_path / "w8a8").mkdir()
    resumed = {step.done.parent.name for step in steps(tmp_path, tmp_path, "") if "--resume" in step.words}
    assert resumed == {"w8a8"}


def test_a_demo_writes_into_no_folder_that_is_not_its_own(tmp_path, rehearsed, capsys):
    ran, _ = rehearsed
    (tmp_path / "mine.txt").touch()
    assert "holds something that no demo wrote" in refused(capsys, "demo", "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    (tmp_path / "out/demo.json").write_text("{}")
    capsys.readouterr()
    before = len(ran)
    assert "the demo of another version" in refused(capsys, "demo", "--output", str(tmp_path / "out"))
    assert len(ran) == before


def test_two_demos_do_not_work_in_one_folder(tmp_path, rehearsed, capsys):
    from ms_pangu_quant.cli import demo

    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    with demo._opened(tmp_path / "out", demo._assets()):
        assert "another demo is at work here" in refused(capsys, "demo", "--output", str(tmp_path / "out"))
