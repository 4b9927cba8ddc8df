"""The notebooks run from top to bottom, define nothing and train nothing themselves, and are small."""

import ast
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's own making


def test_there_are_four():
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_defined_and_outputs_are_small(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 320_000
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs or cell.execution_count for cell in cells)
    for cell in cells:
        assert not any(output.output_type == "error" for output in cell.outputs)
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), f"{path.name} defines {node.name}"
            named = isinstance(node, ast.Attribute) and node.attr in ("backward", "step", "zero_grad")
            assert not named, f"{path.name} trains: {ast.unparse(node)}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    """With their assertions; what they write goes elsewhere."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("../recipes", str(FOLDER.parent / "recipes"))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
