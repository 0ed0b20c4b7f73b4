"""What is in examples/ runs as it stands there, and comes out as it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_script_tunes_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "own_images.py", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"loss (\S+) -> (\S+) in (\d+) steps", done.stdout)
    assert found and float(found[2]) < float(found[1]) and int(found[3]) > 4
    assert {"config.json", "vitask.json", "vitask_connector.safetensors"} <= {*os.listdir(tmp_path / "out/tuned")}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, by a kernel of this environment; an error in one is an error here."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(EXAMPLES / "look_inside.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    client = NotebookClient(notebook, timeout=540, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    printed = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "the nearest one is of the same class" in printed and "image/png" in printed
