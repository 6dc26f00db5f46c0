"""docs/quickstart.ipynb runs as it stands, and is committed without what running it leaves."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    ran = [cell.id for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
    assert ran == [], "clear the outputs: they change with every run"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "a machine's own metadata"
    assert notebook.metadata.language_info == {"name": "python"}


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom_and_shows_what_it_says(notebook):
    NotebookClient(notebook, timeout=1500, kernel_name="python3").execute()  # a cell that fails raises
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    errors = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert all(f"--- {mode}:" in printed for mode in ("slow_think", "auto_think", "no_think"))
    kl = [float(line.split(" KL ")[1].split()[0]) for line in printed.splitlines() if " KL " in line]
    assert len(kl) == 2
    assert kl[1] < kl[0] / 2  # smoothing and GPTQ beside plain rounding
    assert errors == "", "a newcomer sees warnings first"
