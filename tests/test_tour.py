"""The notebook: it runs from its first cell to its last, wherever it is opened, and stays small."""

import os

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "experiments/tour.ipynb"


@pytest.mark.parametrize(
    "folder", [ROOT, pytest.param(ROOT / "experiments", marks=pytest.mark.slow)]
)
def test_the_tour_runs_without_a_gpu_a_download_or_cifar10(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("CHAINER_DATASET_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "synthetic images instead" in text and "test images are right" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert len(nbformat.writes(notebook)) < 300_000


def test_the_committed_tour_is_small_and_valid():
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert NOTEBOOK.stat().st_size < 300_000
