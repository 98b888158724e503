"""Notebooks: the examples run, and objects show themselves."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from atoll import data
from atoll.tracking import progress
from atoll.tracking.progress import NotebookProgress, PlainProgress, in_notebook

NOTEBOOKS = [
    # It imports every framework there is.
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem == "frameworks"))
    for path in sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_example_notebooks_run(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "flax", "torch", "sklearn"):
        pytest.importorskip(package)
    notebook = nbformat.read(path, as_version=4)
    kept = [cell.get("outputs") for cell in notebook.cells]
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=place, kernel_name="python3").execute()
    for cell, before in zip(notebook.cells, kept, strict=True):
        # What is committed is what comes out, kind by kind.
        shown = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        assert [o.output_type for o in shown] == [o["output_type"] for o in before or []]


def drawn(html):
    """The SVG inside some HTML, parsed; that it can be is half of the check."""
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", html, re.DOTALL)[0])


def test_data_show_a_bar_for_each_client(digits):
    html = digits._repr_html_()
    counts = digits.label_distribution()
    rectangles = drawn(html).findall("{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == (counts > 0).sum()
    heights = np.array([float(r.get("height")) for r in rectangles])
    assert heights.sum() == pytest.approx(90 * counts.sum() / counts.sum(1).max(), rel=0.02)
    assert "12 clients hold" in html
    many = data.load("digits").iid(clients=300, seed=0)._repr_html_()
    assert "the first 200 clients" in many


def test_federations_and_runs_show_themselves(blobs, federation):
    html = federation._repr_html_()
    assert "NumpyLearner(" in html and "Synchronous(rounds=6" in html
    run = federation.simulate(blobs)
    html = run._repr_html_()
    (line,) = drawn(html).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(line.get("points").split()) == 6
    assert f"{run.metrics['accuracy']:.4g}" in html


def test_what_is_shown_is_text(blobs):
    odd = data.from_arrays(
        np.zeros((4, 1), np.float32), np.array([0, 1, 0, 1]), name="<script>alert(1)</script>"
    ).iid(clients=2)
    assert "<script>" not in odd._repr_html_()


def test_progress_in_a_notebook_is_one_bar_that_changes(blobs, federation, monkeypatch):
    module = pytest.importorskip("IPython.display")
    shown, updates = [], []
    handle = SimpleNamespace(update=updates.append)
    monkeypatch.setattr(module, "display", lambda what, **_: shown.append(what) or handle)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    assert in_notebook() and isinstance(progress(), NotebookProgress)
    federation.simulate(blobs, observers=[progress()])
    assert len(shown) == 1
    assert "value='6' max='6'" in updates[-1].data and "done in" in updates[-1].data
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert isinstance(progress(), PlainProgress)
