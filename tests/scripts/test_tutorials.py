"""The tutorials: as notebooks they run from top to bottom, show pictures, and leave nothing outside of their folder."""

import pytest
import tiny

SCRIPTS = tiny.ROOT / "scripts"
# What the cells of a tutorial are known by in this test: a part of their text, and the kind of what they show.
SHOWN = {
    "tutorial.py": {
        "Image.open(": "image/png",
        'history.series("loss")': "image/png",
        "display(found)": "image/png",
        "detector.explain": "image/png",
        "hpr_jax.report": "text/html",
    },
    "tutorial_refiner.py": {"term/{name}": "image/png", 'names("merge/")': "image/png", "detector.explain": "image/png"},
}


def executed(name, folder, monkeypatch):
    """A tutorial as a notebook whose cells were run in a folder, with few steps."""
    import jupytext
    import nbclient

    for key, value in tiny.process_environment(TUTORIAL_STEPS="2", MPLCONFIGDIR=str(folder / "matplotlib")).items():
        monkeypatch.setenv(key, value)
    # Kernels note where they listen; neither this nor a user's profile of IPython belongs to a test.
    for key in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(key, str(folder / "jupyter"))
    notebook = jupytext.read(SCRIPTS / name)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    before = {path for folder in (SCRIPTS, tiny.ROOT) for path in folder.iterdir()}
    notebook = executed(name, tmp_path, monkeypatch)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for text, kind in SHOWN[name].items():
        found = [cell for cell in cells if text in cell.source]
        assert any(kind in output.get("data", {}) for cell in found for output in cell.outputs), text
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "jupyter", "matplotlib"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name.removesuffix(".py")]
    assert {path for folder in (SCRIPTS, tiny.ROOT) for path in folder.iterdir()} == before
