"""One's own images in the report: first, under their own name, and beside the paper's figures only where these fit."""

import re
from pathlib import Path

import pytest
from lmms_output import write_file, write_own_folder, write_run

from vitask_plugin.cli import main
from vitask_plugin.report.tables import title


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/ on own images with labels of their own, and on a known set."""
    for name in ("breastmnist", "retinamnist"):
        write_file(tmp_path / "data", name, 20)
    write_own_folder(tmp_path / "mri", "breastmnist", tmp_path / "data")
    how = {"variants": ("",), "own": tmp_path / "mri"}
    write_run(tmp_path / "results", {"breastmnist": 1.0}, tmp_path, **how)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_own_data_alone(folder: Path) -> None:
    assert main(["report", "results", "--markdown", "--csv"]) == 0
    text = (folder / "report.md").read_text()
    assert headings(text) == ["Runs", "Own data", "mri"]
    assert re.search(r"^\| mri \| 0\.\d{3} / 0\.\d{3} \(", text, re.MULTILINE)
    # Nothing of the paper's is beside what it has no figures of.
    assert "paper" not in text and "APTOS" not in text


def test_own_data_come_first(folder: Path) -> None:
    write_run(folder / "results", {"retinamnist": 1.0}, folder / "data", variants=("",), date="20260102_000000")
    assert main(["report", "results", "--markdown"]) == 0
    text = (folder / "report.md").read_text()
    order = ["Runs", "Own data", "Main results: the paper's table 1", "mri", "retina"]
    assert headings(text) == order
    assert "| mri |" in text[text.index("## Own") : text.index("## Main")]
    assert "mri" not in text[text.index("## Main") : text.index("## mri")]


def test_sets_of_one_name_are_told_apart() -> None:
    names = ("vitask_retina", "medmnist_retina", "vitask_scans@val", "vitask_drawn")
    assert [title(name) for name in names] == ["own retina", "retina", "scans (val)", "vitask_drawn"]
