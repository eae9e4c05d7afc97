"""The notebooks run, show pictures and nothing else, and are what their sources say."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="the extra `notebooks` is absent")
nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is absent")
pytest.importorskip("ipykernel", reason="the extra `notebooks` is absent")

SOURCES = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("0*.py"))
LARGEST = 600_000  # bytes of a notebook with its pictures

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in code for output in cell.outputs]


@each
def test_is_in_step_with_its_source(source):
    pair = [jupytext.read(path) for path in (source, source.with_suffix(".ipynb"))]
    ours, theirs = ([(c.cell_type, c.source) for c in one.cells] for one in pair)
    assert ours == theirs, f"`make notebooks` brings {source.stem} in step"


@each
def test_shows_pictures_and_nothing_of_the_machine(source):
    path = source.with_suffix(".ipynb")
    shown = outputs(jupytext.read(path))
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3
    texts = [output["text"] for output in shown if output["output_type"] == "stream"]
    assert {o["output_type"] for o in shown} <= {"stream", "display_data"}
    assert {o["name"] for o in shown if o["output_type"] == "stream"} == {"stdout"}
    for trace in ("/tmp", "/home", "/root", "/Users", "Warning"):
        assert not any(trace in text for text in texts)
    assert path.stat().st_size < LARGEST


@pytest.mark.slow
@each
def test_runs(source, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = jupytext.read(source)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    streams = [o for o in outputs(notebook) if o["output_type"] == "stream"]
    assert [o["text"] for o in streams if o["name"] == "stderr"] == []
