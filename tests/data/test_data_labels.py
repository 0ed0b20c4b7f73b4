"""Labels of one's own images that are missing, contradict each other, or are told by the kind of file."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from own_images import command, converts, csv, fails, fill
from pictures import picture, save
from PIL import Image

from vitask_plugin.cli import main
from vitask_plugin.data.telltales import Telltales

WHOLE = ("--val", "0", "--test", "0")


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source" / "skin"
    folder.mkdir(parents=True)
    return folder


def table(source: Path, cells: list[str]) -> Path:
    lines = [f"red/{number:02d}.png,{cell}" for number, cell in enumerate(cells)]
    return csv(source, "image,label\n" + "\n".join(lines))


# Missing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "NA", "null", "N/A", "<NA>", "#N/A", "nan\u00a0", "", "NaT"])
def test_a_cell_without_a_label_is_no_class(source, capsys, cell):
    fill(source, {"red": 8})
    error = fails(table(source, ["a", "b", cell, "a", cell, "b", cell, cell]), capsys, *WHOLE)
    assert f"4 of 8 rows have no label: row 4 ('red/02.png', {cell!r}), row 6 ('red/04.png'" in error
    assert ", ...; name their classes, or take out rows whose class is not known" in error
    assert "list all classes with --labels" in error


def test_a_class_called_none_is_named(source, capsys):
    fill(source, {"red": 6})
    path = table(source, ["mild", "None", "severe", "none", "mild", "None"])
    assert "3 of 6 rows have no label" in fails(path, capsys, *WHOLE, "--labels", "mild,severe")
    path = table(source, ["mild", "none", "severe", "none", "mild", "none"])
    found = converts(path, *WHOLE, "--labels", "none,mild,severe")["train"]
    assert [row["vitask"]["label"] for row in found] == [1, 0, 2, 0, 1, 0]


def test_several_labels_of_which_one_is_missing(source, capsys):
    fill(source, {"red": 5})
    error = fails(table(source, ["a;b", "a", "", "b;nan", "nan"]), capsys, *WHOLE, "--multi-label")
    assert "2 of 5 rows have no label: row 5 ('red/03.png', 'b;nan'), row 6 ('red/04.png', 'nan')" in error
    assert "leave the cell empty where no class applies" in error
    found = converts(table(source, ["a;b", "a", "", "b"]), *WHOLE, "--multi-label")["train"]
    assert [row["vitask"]["label"] for row in found] == [[0, 1], [0], [], [1]]


@pytest.mark.parametrize(
    ("cells", "flags", "choices", "labels"),
    [
        (["x|y;b", "x|y", "b", ""], (), ["b", "x|y"], [[0, 1], [1], [0], []]),
        (["A|B", "C|D", "A|B", "C|D"], ("--labels", "A|B,C|D"), ["A|B", "C|D"], [[0], [1], [0], [1]]),
        (["A|B;C|D", "C|D", "A|B", ""], ("--labels", "A|B,C|D"), ["A|B", "C|D"], [[0, 1], [1], [0], []]),
        (["x|y", "x", "y", ""], (), ["x", "y"], [[0, 1], [0], [1], []]),
    ],
)
def test_a_table_has_one_separator_of_labels_and_choices_are_whole(source, cells, flags, choices, labels):
    fill(source, {"red": 4})
    found = converts(table(source, cells), *WHOLE, "--multi-label", *flags)["train"]
    assert found[0]["vitask"]["choices"] == choices
    assert [row["vitask"]["label"] for row in found] == labels


def test_a_choice_may_be_named_as_others_are_together(source, capsys):
    fill(source, {"red": 4})
    path = table(source, ["left", "right", "left|right", "left"])
    assert "'left|right' names 2 classes of other rows" in fails(path, capsys, *WHOLE)
    found = converts(path, *WHOLE, "--labels", "left,right,left|right")["train"]
    assert [row["vitask"]["label"] for row in found] == [0, 1, 2, 0]


def test_a_class_folder_called_none(source, caplog):
    fill(source, {"red": 4})
    for number in range(4):
        save(source / "none" / f"{number}.png", "blue", 500 + number)
    with caplog.at_level(logging.WARNING):
        found = converts(source, *WHOLE)["train"]
    assert {row["conversations"][1]["value"] for row in found} == {"red.", "none."}
    assert "the folder 'none' is a class like the others" in caplog.text


# Contradictory --------------------------------------------------------------------------------------------------------


def test_one_picture_under_two_classes(source, caplog):
    fill(source, {"red": 5, "blue": 5})
    for number in range(2):
        with Image.open(source / f"red/0{number}.png") as image:
            image.save(source / f"blue/again{number}.bmp")
    shutil.copy(source / "red/04.png", source / "red/99.png")
    with caplog.at_level(logging.INFO):
        converts(source, *WHOLE)
    assert "2 image(s) show exactly what another one shows and have another label" in caplog.text
    assert "train ('blue/again0.bmp', labelled 'blue') and train ('red/00.png', labelled 'red'), ...;" in caplog.text
    assert "1 image(s) are in their split more than once, with the same label" in caplog.text
    kept = json.loads((Path(command(source)[4]) / "labels.json").read_text())
    assert kept["contradictions"] == [
        [
            {"split": "train", "name": f"'blue/again{number}.bmp'", "answer": "blue."},
            {"split": "train", "name": f"'red/0{number}.png'", "answer": "red."},
        ]
        for number in range(2)
    ]
    assert "duplicates" not in kept


def test_one_picture_under_two_classes_in_two_splits(source, caplog):
    """Also where the picture's first label is in another split, and both labels of the second split are its own."""
    fill(source, {"red": 3, "blue": 3}, "train/")
    fill(source, {"red": 2, "blue": 2}, "test/", 2000)
    for name in ("test/red/a.png", "test/blue/a.png", "test/blue/b.png"):
        shutil.copy(source / "train/red/01.png", source / name)
    with caplog.at_level(logging.WARNING):
        converts(source, "--val", "0", "--allow-duplicates")
    kept = json.loads((Path(command(source)[4]) / "labels.json").read_text())
    names = [[entry["name"] for entry in pair] for pair in kept["contradictions"]]
    assert names == [
        ["'train/red/01.png'", "'test/blue/a.png'"],
        ["'train/red/01.png'", "'test/blue/b.png'"],
        ["'test/blue/a.png'", "'test/red/a.png'"],
    ]
    assert len(kept["duplicates"]) == 3 and "3 image(s) show exactly" in caplog.text


def test_one_picture_under_two_classes_of_a_medmnist_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    images = {
        split: [np.asarray(picture("grey", first + n, 28).convert("L")) for n in range(4)]
        for first, split in enumerate(("train", "val", "test"))
    }
    images = {split: np.stack(found) + np.uint8(n) for n, (split, found) in enumerate(images.items())}
    images["test"][3] = images["test"][0]
    np.savez(
        tmp_path / "breastmnist.npz",
        **{f"{split}_images": found for split, found in images.items()},
        **{f"{split}_labels": np.arange(4).reshape(-1, 1) % 2 for split in images},
    )
    with caplog.at_level(logging.WARNING):
        assert main(["data", "medmnist", "--task", "breast", "--out", str(tmp_path / "out")]) == 0
    assert "1 image(s) show exactly what another one shows" in caplog.text
    (pair,) = json.loads((tmp_path / "out" / "labels.json").read_text())["contradictions"]
    assert [entry["name"] for entry in pair] == ["breastmnist test row 0", "breastmnist test row 3"]


# Told by the file -----------------------------------------------------------------------------------------------------


def deep(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 4096, (32, 32)).astype(np.uint16)
    Image.fromarray(values).save(path)


def told(source: Path, caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        converts(source, *WHOLE)
    found = [record.getMessage() for record in caplog.records if "tells its class" in record.getMessage()]
    assert all("no figure of this set can be believed" in line for line in found)
    return [line.partition(";")[0] for line in found]


def test_depth_that_tells_the_class(source, caplog):
    fill(source, {"red": 6})
    for name in ("mel", "nv"):
        for number in range(6):
            deep(source / name / f"{number}.png", ord(name[0]) * 100 + number)
    lines = told(source, caplog)
    assert lines[0] == (
        "the depth of a file tells its class: more than 8 bits in 12 of 12 images of 'mel', 'nv', and in 0 of 6 of "
        "'red'"
    )
    assert len(lines) == 2 and lines[1].startswith("the mode of a file tells its class: grey in 12 of 12")
    for number in range(3):  # red is deep and not deep: nothing is told
        deep(source / "red" / f"deep{number}.png", number)
    assert told(source, caplog) == []


def test_format_and_size_that_tell_the_class(source, caplog):
    fill(source, {"red": 12})
    for number in range(12):
        path = source / "blue" / (f"{number}.jpg" if number else "0.png")
        path.parent.mkdir(exist_ok=True)
        picture("blue", number, 48).save(path)
    assert told(source, caplog) == [
        "the format of a file tells its class: PNG in 12 of 12 images of 'red', and in 1 of 12 of 'blue'",
        "the size of a file tells its class: 48x48 pixels in 12 of 12 images of 'blue', and in 0 of 12 of 'red'",
    ]


def test_two_classes_that_are_told_apart_beside_one_that_is_not(caplog):
    def said(counts: dict[str, tuple[int, int]]) -> list[str]:
        caplog.clear()
        telltales = Telltales()
        for name, (grey, colour) in counts.items():
            for image, count in ((Image.new("L", (8, 8)), grey), (Image.new("RGB", (8, 8)), colour)):
                for _ in range(count):
                    telltales.see(image, (name,))
        telltales.say()
        return [record.getMessage().partition(";")[0] for record in caplog.records]

    assert said({"a": (20, 0), "b": (0, 30), "c": (10, 10)}) == [
        "the mode of a file tells its class: grey in 20 of 20 images of 'a', and in 0 of 30 of 'b'"
    ]
    assert said({"a": (19, 0), "b": (0, 30), "c": (10, 10)}) == []
    assert said({"a": (19, 0), "b": (0, 30), "c": (1, 10)}) != []


def test_classes_that_no_file_tells(source, caplog):
    """Sizes that are all different, and a class of two images."""
    for number in range(12):
        path = source / ("red", "blue")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        picture("red", number, 20 + number).save(path)
    for number in range(2):
        path = source / "green" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture("green", number, 50).save(path)
    assert told(source, caplog) == []
