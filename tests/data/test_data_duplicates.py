"""Pictures that are there twice: the whole list as a file, and those in train left out on request."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitask_plugin.cli import main

NAMES = ("red", "blue")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """train/, val/ and test/ with 4 images of each class, of which these are the same:

    train red 0 = test red 0; train blue 1 = val blue 1 = test red 1 (two labels); train red 2 = train blue 2 (two
    labels, in one split); val red 3 = test red 3.
    """
    generator = np.random.default_rng(0)
    images = {
        (split, name, number): generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for split in ("train", "val", "test")
        for name in NAMES
        for number in range(4)
    }
    images["train", "red", 0] = images["test", "red", 0]
    images["train", "blue", 1] = images["val", "blue", 1] = images["test", "red", 1]
    images["train", "red", 2] = images["train", "blue", 2]
    images["val", "red", 3] = images["test", "red", 3]
    for (split, name, number), pixels in images.items():
        path = tmp_path / "source" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "source"


def command(source: Path, *more: str) -> list[str]:
    return ["data", "folder", str(source), "--out", str(source.parent / "out"), "--modality", "scan", *more]


def pairs(path: Path) -> dict[frozenset[str], dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {frozenset({row["name"].strip("'"), row["other_name"].strip("'")}): row for row in rows}
    assert len(found) == len(rows)
    return found


EXPECTED = {
    frozenset({"train/red/0.png", "test/red/0.png"}): "no",
    frozenset({"train/blue/1.png", "val/blue/1.png"}): "no",
    frozenset({"train/blue/1.png", "test/red/1.png"}): "yes",
    frozenset({"train/red/2.png", "train/blue/2.png"}): "yes",
    frozenset({"val/red/3.png", "test/red/3.png"}): "no",
}


def test_the_whole_list_of_pairs_beside_the_output_where_it_is_refused(source, capsys) -> None:
    assert main(command(source)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    beside = source.parent / "out-duplicates.csv"
    assert f"{str(beside)!r} lists all 5 pair(s)" in error and "--drop-duplicates, which leaves out those" in error
    assert not (source.parent / "out").exists()
    assert {names: row["two_labels"] for names, row in pairs(beside).items()} == EXPECTED
    assert all(row["kind"] == "same" and not row["dropped"] for row in pairs(beside).values())


def test_and_in_the_output_where_it_is_allowed(source) -> None:
    assert main(command(source, "--allow-duplicates")) == 0
    out = source.parent / "out"
    assert {names: row["two_labels"] for names, row in pairs(out / "duplicates.csv").items()} == EXPECTED
    assert [len(json.loads((out / f"{split}.json").read_text())) for split in ("train", "val", "test")] == [8, 8, 8]
    assert main(command(source, "--allow-duplicates")) == 0  # an earlier output, list and all, is replaced


def test_those_in_train_are_dropped_and_test_stays_as_it_is(source, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert main(command(source, "--drop-duplicates")) == 0
    out = source.parent / "out"
    rows = {split: json.loads((out / f"{split}.json").read_text()) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 6, "val": 6, "test": 8}
    for split, found in rows.items():
        files = {path.name for path in (out / "images" / split).iterdir()}
        assert files == {Path(row["image"]).name for row in found}
    pixels = [np.asarray(Image.open(path)).tobytes() for path in sorted((out / "images").rglob("*.png"))]
    assert len(set(pixels)) == 19  # of 20: two of train have two labels, and which of them is wrong nobody knows
    assert "4 image(s) were left out of train and val" in caplog.text
    dropped = {name for row in pairs(out / "duplicates.csv").values() for name in row["dropped"].split("; ") if name}
    assert {name.strip("'") for name in dropped} == {
        *("train/red/0.png", "train/blue/1.png"),
        *("val/blue/1.png", "val/red/3.png"),
    }
    assert len(json.loads((out / "labels.json").read_text())["dropped"]) == 4


def test_without_any_there_is_no_list(source) -> None:
    (source / "train/red/2.png").unlink()
    assert main(command(source / "train", "--val", "0", "--test", "0")) == 0
    assert not (source / "out" / "duplicates.csv").exists() and (source / "out" / "labels.json").is_file()


def test_not_both(source, capsys) -> None:
    assert main(command(source, "--allow-duplicates", "--drop-duplicates")) == 1
    assert "exclude each other" in capsys.readouterr().err


def test_a_medmnist_file(tmp_path: Path, monkeypatch) -> None:
    """Whose rows keep their numbers: figures on val and test stay comparable row by row."""
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    generator = np.random.default_rng(1)
    images = {split: generator.integers(0, 256, (6, 28, 28), dtype=np.uint8) for split in ("train", "val", "test")}
    images["train"][2] = images["test"][4]
    labels = np.arange(6).reshape(-1, 1) % 2
    files = {f"{split}_images": found for split, found in images.items()}
    np.savez(tmp_path / "breastmnist.npz", **files, **{f"{split}_labels": labels for split in images})
    write = ["data", "medmnist", "--task", "breast", "--out", str(tmp_path / "out"), "--drop-duplicates"]
    assert main(write) == 0
    rows = {split: json.loads((tmp_path / "out" / f"{split}.json").read_text()) for split in images}
    assert [row["id"][-1] for row in rows["train"]] == ["0", "1", "3", "4", "5"]
    assert [row["id"][-1] for row in rows["test"]] == ["0", "1", "2", "3", "4", "5"]
