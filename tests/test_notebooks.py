"""The notebooks of the documentation run, and are small."""

from __future__ import annotations

from pathlib import Path

import pytest

# In the extra `dev`; an environment of an older release may lack them.
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 60_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_its_folder(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_notebooks_are_two_and_small() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["from_checkpoint_to_answer", "looking_inside_a_graph"]
    assert all(path.stat().st_size < MOST_BYTES for path in NOTEBOOKS)
