"""formats/finished.py: a run that is started again after its end has nothing to do, and says what is in its way."""

from __future__ import annotations

import shutil

import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import REPORT_FILE
from ms_pangu_quant.cli import main
from ms_pangu_quant.formats import ascend
from ms_pangu_quant.formats.finished import is_exported
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint_tool):
    """A float checkpoint, and what quantize and export made of it."""
    folder = tmp_path_factory.mktemp("finished")
    config = checkpoint_tool.make_config("tiny", layers=2)
    checkpoint_tool.write_checkpoint(folder / "float", config, seed=0, dtype="bfloat16", shard_bytes=10**9)
    quantize(CheckpointReader(folder / "float"), load_recipe(find_recipe("w8a8_rtn")), folder / "quantized")
    assert main(["export", str(folder / "quantized"), "--format", "ascend", "--output", str(folder / "exported")]) == 0
    return folder


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place, tmp_path / "copy")


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def command(place, *more):
    return ["quantize", str(place / "float"), "--recipe", "w8a8_rtn", "--output", str(place / "quantized"), *more]


def export(place, *more):
    return ["export", str(place / "quantized"), "--format", "ascend", "--output", str(place / "exported"), *more]


@pytest.mark.parametrize(("make", "name"), [(command, "quantized"), (export, "exported")])
def test_a_finished_run_that_is_resumed_is_complete_and_touches_nothing(make, name, copy, capsys):
    before = contents(copy / name)
    assert main(make(copy, "--resume")) == 0
    assert capsys.readouterr().out == f"{copy / name}: already complete\n"
    assert contents(copy / name) == before


def test_its_result_is_that_of_the_run_that_made_it(place, tmp_path):
    reader, recipe = CheckpointReader(place / "float"), load_recipe(find_recipe("w8a8_rtn"))
    first = quantize(reader, recipe, tmp_path / "out")
    again = quantize(reader, recipe, tmp_path / "out", resume=True)
    assert (again.blocks, again.bytes_before, again.bytes_after) == (first.blocks, first.bytes_before, first.bytes_after)
    assert again.was_complete
    assert not first.was_complete


@pytest.mark.parametrize("make", [command, export])
def test_without_resume_a_finished_directory_is_refused(make, copy, capsys):
    assert main(make(copy)) == 2
    assert "holds a finished checkpoint; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--recipe", "w4a8_rtn"], "made with another recipe; choose"),
        (["--format", "ascend"], "made with another format; choose"),
    ],
)
def test_a_finished_directory_of_another_run_is_refused_by_what_differs(change, said, copy, capsys):
    assert main(command(copy, "--resume", *change)) == 2
    assert said in capsys.readouterr().err


def test_another_checkpoint_is_another_run(copy, capsys):
    path = next((copy / "float").glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(command(copy, "--resume")) == 2
    assert "made with another checkpoint; choose" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "name"), [(command, "quantized"), (export, "exported")])
def test_a_finished_directory_with_a_damaged_file_is_not_called_complete(make, name, copy, capsys):
    path = sorted((copy / name).glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert main(make(copy, "--resume")) == 2
    assert f"that is damaged: {path}: is not the file that was written" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_what_made_it_is_never_complete(copy):
    reader = QuantizedReader(copy / "quantized")
    assert is_exported(reader, ascend, copy / "exported")
    (copy / "quantized" / REPORT_FILE).unlink()
    assert not is_exported(reader, ascend, copy / "exported")
