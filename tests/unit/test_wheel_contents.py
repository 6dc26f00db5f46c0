"""A wheel holds the package's every file, and the recipes; what git does not know stays outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGED = ("ms_pangu_quant/", "configs/")
BESIDES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
NAMED = (  # a glance at what would be missed first, whatever git says
    "ms_pangu_quant/assets/openpangu-mini/model.safetensors",
    "ms_pangu_quant/assets/openpangu-mini/tokenizer.model",
    "ms_pangu_quant/assets/benchmarks/HumanEval.jsonl.gz",
    "ms_pangu_quant/assets/calibration.jsonl",
    "ms_pangu_quant/assets/served.yaml",
    "ms_pangu_quant/kernels/linear.cc",
    "ms_pangu_quant/kernels/linear.h",
    "ms_pangu_quant/configs/w8a8.yaml",
    "ms_pangu_quant/configs/devices/atlas_a2.yaml",
    "ms_pangu_quant/evaluation/guest/server.py",
    "ms_pangu_quant/report/templates/page.html.j2",
)


@pytest.fixture(scope="module")
def tracked(root) -> list[str]:
    """Files that git knows, or would: a new file that was not added yet counts."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGED, *BESIDES]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listed.splitlines() if (root / name).exists()]


@pytest.fixture(scope="module")
def wheel(root, tracked, tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: a build leaves folders beside its sources, and would take up what an older one left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_a_wheel_holds_exactly_the_files_of_the_package_and_the_recipes(wheel, tracked):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        name if name.startswith("ms_pangu_quant/") else f"ms_pangu_quant/{name}"
        for name in tracked
        if name.startswith(PACKAGED)
    }
    assert held == expected
    assert set(NAMED) <= held


def test_a_wheel_holds_the_files_as_they_are(wheel, root):
    for name in NAMED:
        source = root / name if (root / name).exists() else root / Path(name).relative_to("ms_pangu_quant")
        assert wheel.read(name) == source.read_bytes()


def test_a_wheel_installs_the_command_and_names_every_extra_and_the_licence(wheel, root):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    (licence,) = (name for name in wheel.namelist() if name.startswith(info) and name.endswith("LICENSE"))
    assert wheel.read(licence) == (root / "LICENSE").read_bytes()
    assert "pangu-quant=ms_pangu_quant.__main__:run" in wheel.read(f"{info}/entry_points.txt").decode().replace(" ", "")
    lines = wheel.read(f"{info}/METADATA").decode().splitlines()
    assert "License: Apache-2.0" in lines or "License-Expression: Apache-2.0" in lines
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert {"all", "dev", "goldens", "peers"} <= extras
    needs = {extra: {line.split(";")[0] for line in lines if f'extra == "{extra}"' in line} for extra in extras}
    assert needs["all"] >= needs["dev"] | needs["goldens"]
