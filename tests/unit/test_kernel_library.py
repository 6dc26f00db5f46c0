"""Building the kernels: cached by what goes in, safe for two processes, and never a reason not to work."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.kernels import library as module


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, a compiler that only notes that it was called, and nothing loaded yet."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "compiler ${VERSION:-1}"; exit; }\necho "$$" >> "$LOG"\n'
        'while [ "$1" != -o ]; do shift; done\necho object > "$2"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MS_PANGU_QUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(module.SETTING, raising=False)
    monkeypatch.setattr(module, "_built", None)
    monkeypatch.setattr(module, "_failure", None)
    return tmp_path


def runs(folder: Path) -> int:
    return len((folder / "log").read_text().split()) if (folder / "log").exists() else 0


def test_a_second_build_takes_the_file_of_the_first_and_leaves_nothing_else_behind(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    before = set(os.listdir(fresh))
    first = module.build()
    count = runs(fresh)
    assert count == len(module._UNITS) + 1
    assert module.build() == first
    assert runs(fresh) == count
    assert [file.name for file in (fresh / "cache").iterdir()] == [first.name]
    assert set(os.listdir(fresh)) == before | {"cache", "log"}


@pytest.mark.parametrize("changed", ["source", "compiler", "flags"])
def test_another_source_compiler_or_flag_is_another_library(changed, fresh, monkeypatch):
    first = module.build()
    if changed == "source":
        copy = fresh / "sources"
        copy.mkdir()
        for file in module._SOURCES.iterdir():
            if file.suffix in (".cc", ".h"):
                (copy / file.name).write_bytes(file.read_bytes() + (b"\n" if file.name == "isa.h" else b""))
        monkeypatch.setattr(module, "_SOURCES", copy)
    elif changed == "compiler":
        monkeypatch.setenv("VERSION", "2")
    else:
        monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-g"))
    assert module.build() != first
    assert first.exists()


def test_without_a_compiler_a_library_built_earlier_is_used(fresh, monkeypatch):
    first = module.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert module.build() == first


def test_without_a_compiler_the_plain_operators_are_used_and_that_is_said_once(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert module.library() is None
    assert module.library() is None
    said = capsys.readouterr().err
    assert said.count("plain MindSpore operators") == 1
    assert "no-such-compiler is not on the PATH" in said
    assert "no-such-compiler" in module.failure()


def test_what_a_failing_compiler_prints_is_shown(fresh, monkeypatch, capsys):
    (fresh / "compiler").write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "isa.h:1: cannot do that"; exit 3\n')
    assert module.library() is None
    said = capsys.readouterr().err
    assert "isa.h:1: cannot do that" in said
    assert "exit code 3" in said
    assert not any(file.suffix == ".so" for file in (fresh / "cache").iterdir())


def test_when_one_compiler_fails_the_others_have_ended_before_their_folder_goes(fresh, capsys):
    """Each slow one says whether it could write; one that outlives the build says nothing in time."""
    (fresh / "compiler").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\ncase "$*" in *parallel.cc*) echo "no such flag"; exit 3;; esac\n'
        'while [ "$1" != -o ]; do shift; done\nsleep 0.5\necho object > "$2" && echo written >> "$LOG"\n'
    )
    assert module.library() is None
    assert (fresh / "log").read_text().split() == ["written"] * (len(module._UNITS) - 1)
    assert list((fresh / "cache").iterdir()) == []
    assert "failed with exit code 3:\nno such flag" in capsys.readouterr().err


def test_a_compiler_that_hangs_costs_the_limit_once_and_leaves_nothing_behind(fresh, monkeypatch, capsys):
    (fresh / "compiler").write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexec sleep 3600\n')
    monkeypatch.setattr(module, "_TIMEOUT", 1)
    fault, deadlines = module._fault, []

    def noted(line, process, deadline):
        deadlines.append(deadline)
        return fault(line, process, deadline)

    monkeypatch.setattr(module, "_fault", noted)
    assert module.library() is None
    assert len(deadlines) == len(module._UNITS)
    assert len({*deadlines}) == 1, "each waits anew"
    assert "did not end within 1 s" in capsys.readouterr().err
    assert list((fresh / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch, capsys):
    (fresh / "file").write_text("")
    monkeypatch.setenv("MS_PANGU_QUANT_CACHE", str(fresh / "file" / "cache"))
    assert module.library() is None
    assert "MS_PANGU_QUANT_CACHE" in capsys.readouterr().err


def test_a_file_that_is_no_library_is_not_used(fresh, capsys):
    assert module.library() is None  # the noting compiler writes the word "object"
    assert "delete the file" in capsys.readouterr().err


def test_switched_off_means_plain_operators_without_a_word(fresh, monkeypatch, capsys):
    monkeypatch.setenv(module.SETTING, "off")
    assert module.library() is None
    assert capsys.readouterr().err == ""
    assert runs(fresh) == 0


def test_an_unknown_setting_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv(module.SETTING, "fast")
    with pytest.raises(BackendError, match="fast"):
        module.library()


def test_a_path_this_cpu_lacks_is_an_error(monkeypatch):
    found = module.library()
    if found is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(module, "_built", module.Library(found.file, found.functions, "portable"))
    monkeypatch.setenv(module.SETTING, "vnni")
    with pytest.raises(BackendError, match="no vnni"):
        module.library()


def test_processes_that_build_at_once_get_the_library_that_one_of_them_built(fresh):
    program = (
        "from ms_pangu_quant.kernels import library as m\n"
        "file = m.build()\nassert file.read_text() == 'object\\n', file.read_bytes()\nprint(file)"
    )
    root = Path(module.__file__).parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)
    ]
    found = {process.communicate(timeout=500)[0] for process in running}
    assert len(found) == 1
    assert all(process.returncode == 0 for process in running)
    assert len(list((fresh / "cache").iterdir())) == 1
    assert runs(fresh) == len(module._UNITS) + 1


def test_every_source_travels_with_the_package():
    import setuptools

    text = (Path(module.__file__).parents[2] / "setup.py").read_text()
    assert '"kernels/*.cc"' in text
    assert '"kernels/*.h"' in text
    assert {file.suffix for file in module._SOURCES.iterdir() if file.is_file()} <= {".cc", ".h", ".py"}
    assert setuptools
