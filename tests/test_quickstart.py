"""The notebook of the documentation runs, and the page beside it names every argument."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

import clipmap_hf


DOCS = Path(clipmap_hf.__file__).parents[1] / "docs"


@pytest.mark.recipes
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", f"{DOCS.parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    student, teacher = map(float, re.search(r"mean_recall: ([\d.]+) \(teacher ([\d.]+)\)", printed).groups())
    assert 0.45 < student < teacher < 0.7
    assert (tmp_path / "quickstart-student" / "README.md").exists()


@pytest.mark.parametrize(
    "name", ["DistillationArguments", "MappingArguments", "PretrainingArguments", "TernaryArguments"]
)
def test_every_argument_is_in_the_docs(name):
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    missing = [f.name for f in dataclasses.fields(getattr(clipmap_hf, name)) if f"`{f.name}`" not in page]
    assert not missing


def test_every_short_name_of_the_command_line_is_in_the_docs():
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    fields = dataclasses.fields(clipmap_hf.DistillationArguments)
    rows = {f.name: f.metadata["aliases"] for f in fields if "aliases" in f.metadata}
    assert len(rows) == 8
    for name, alias in rows.items():
        assert f"| `{name}` | `{alias}` |" in page
