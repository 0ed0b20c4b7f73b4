"""MedMNIST files as LLaVA JSON and images, from files of that layout which the tests draw themselves."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from lmms_output import write_file
from medmnist.info import INFO
from PIL import Image

from vitask_plugin.cli import main
from vitask_plugin.data import medmnist
from vitask_plugin.data.instructions import DRAWN, label_set, read_samples, tasks_of
from vitask_plugin.errors import VITaskError

SIZES = {"train": 12, "val": 6, "test": 8}


def arrays(classes: int, *, grey: bool = False, multi_label: bool = False, side: int = 28) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for split, count in SIZES.items():
        shape = (count, side, side) if grey else (count, side, side, 3)
        found[f"{split}_images"] = generator.integers(0, 256, shape, dtype=np.uint8)
        labels = (np.arange(count) % classes)[:, None]
        if multi_label:
            labels = generator.integers(0, 2, (count, classes))
            labels[0], labels[1] = 1, 0
        found[f"{split}_labels"] = labels.astype(np.uint8)
    return found


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("MEDMNIST_ROOT", str(folder))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")  # the files are not the official ones
    return folder


def command(root: Path, task: str, *flags: str) -> list[str]:
    return ["data", "medmnist", "--task", task, "--out", str(root.parent / "out"), *flags]


def fails(root: Path, capsys, task: str, *flags: str) -> str:
    assert main(command(root, task, *flags)) == 1
    assert set(os.listdir(root.parent)) - {"out-duplicates.csv"} == {"root"}
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vitask: error: ")
    return error


@pytest.mark.parametrize("grey", [True, False])
def test_images_and_labels_are_the_files_own(root, grey):
    source = arrays(2, grey=grey)
    np.savez(root / "breastmnist.npz", **source)
    assert main(command(root, "breast")) == 0
    out = root.parent / "out"
    assert sorted(os.listdir(out)) == ["images", "labels.json", "test.json", "train.json", "val.json"]
    choices = ["malignant", "normal or benign"]
    labels = {"task": "medmnist_breast", "choices": choices, "modality": "breast ultrasound", "type": "binary-class"}
    assert json.loads((out / "labels.json").read_text()) == labels | {"pixels": {}, "file": "breastmnist.npz"}
    for split, count in SIZES.items():
        rows = read_samples(out / f"{split}.json")
        assert tasks_of(rows) == {"medmnist_breast": {"choices": choices, "multi_label": False}}
        assert len(rows) == count == len({row["id"] for row in rows})
        for index, row in enumerate(rows):
            label = int(source[f"{split}_labels"][index, 0])
            assert row["vitask"]["label"] == label and row["image"].startswith(f"{split}/")
            question, answer = (turn["value"] for turn in row["conversations"])
            assert answer == f"{choices[label]}."
            assert question.endswith("The possible diagnoses are: malignant, normal or benign.")
            with Image.open(out / "images" / row["image"]) as image:
                assert np.array_equal(np.asarray(image), source[f"{split}_images"][index])


def test_incomplete_instructions_and_a_limit(root):
    np.savez(root / "retinamnist.npz", **arrays(5))
    assert main(command(root, "retinamnist", "--incomplete", "--limit", "5")) == 0
    out = root.parent / "out"
    for split in SIZES:
        rows = read_samples(out / f"{split}.json")
        assert len(rows) == 5
        assert {row["conversations"][0]["value"] for row in rows} == {
            "<image>\nAnalyze the given retinal fundus image."
        }
    assert json.loads((out / "labels.json").read_text())["type"] == "ordinal-regression"


def test_multi_label(root):
    source = arrays(14, grey=True, multi_label=True)
    np.savez(root / "chestmnist.npz", **source)
    assert main(command(root, "chest")) == 0
    rows = read_samples(root.parent / "out" / "train.json")
    for row, bits in zip(rows, source["train_labels"], strict=True):
        assert row["vitask"]["label"] == np.flatnonzero(bits).tolist()
    assert rows[0]["conversations"][1]["value"].startswith("atelectasis, cardiomegaly, effusion,")
    assert rows[1]["conversations"][1]["value"] == "no finding."
    assert rows[0]["conversations"][0]["value"].endswith("pleural thickening, hernia, no finding.")


def test_other_sizes_have_files_of_their_own(root):
    np.savez(root / "bloodmnist_64.npz", **arrays(8, side=64))
    assert main(command(root, "blood", "--size", "64")) == 0
    with Image.open(root.parent / "out" / "images" / "train" / "00000.png") as image:
        assert image.size == (64, 64)


def test_the_drawn_set(root, drawn_root):
    os.symlink(drawn_root / "drawn.npz", root / "drawn.npz")
    assert main(command(root, "drawn")) == 0
    rows = read_samples(root.parent / "out" / "train.json")
    assert tasks_of(rows) == {"vitask_drawn": {"choices": list(DRAWN.choices), "multi_label": False}}


@pytest.mark.parametrize("flag", ["pathmnist", "tissuemnist"])
def test_the_other_sets_go_the_same_way(root, flag):
    known = label_set(flag)
    np.savez(root / f"{flag}.npz", **arrays(len(known.choices)))
    assert main(command(root, flag)) == 0
    assert read_samples(root.parent / "out" / "train.json")[1]["vitask"]["choices"] == list(known.choices)


def test_the_same_image_in_two_splits(root, capsys):
    source = arrays(2, grey=True)
    source["test_images"][4] = source["train_images"][3]
    source["val_images"][2] = source["train_images"][0]
    np.savez(root / "breastmnist.npz", **source)
    error = fails(root, capsys, "breast")
    assert "the same image is in train (breastmnist train row 0, labelled 'malignant') and in val" in error
    assert "and 1 more" in error and error.endswith("or with --allow-duplicates")
    assert main(command(root, "breast", "--allow-duplicates")) == 0
    found = json.loads((root.parent / "out" / "labels.json").read_text())["duplicates"]
    assert found == [
        {"train": "breastmnist train row 0", "val": "breastmnist val row 2"},
        {"train": "breastmnist train row 3", "test": "breastmnist test row 4"},
    ]
    assert len(read_samples(root.parent / "out" / "test.json")) == SIZES["test"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda found: {"val_labels": found["val_labels"] / 2}, "labels float64 (6, 1) are not"),
        (lambda found: {"val_labels": found["val_labels"].astype(str)}, "labels <U3 (6, 1) are not"),
        (lambda found: {"val_images": found["val_images"][:, :, :27]}, "(6, 28, 27, 3)"),
        (lambda found: {"val_images": found["val_images"][:, 1:, 1:]}, "are not uint8 images of 28x28 pixels"),
        (lambda found: {"val_images": found["val_images"][..., :2]}, "(6, 28, 28, 2)"),
        (lambda found: {name: found[name][:0] for name in ("val_images", "val_labels")}, "(0, 28, 28, 3)"),
    ],
)
def test_arrays_of_another_kind(root, capsys, change, sentence):
    source = arrays(2)
    np.savez(root / "breastmnist.npz", **source | change(source))
    error = fails(root, capsys, "breast")
    assert "breastmnist.npz': val images uint8" in error and sentence in error


def test_the_same_image_twice_in_one_split_is_no_leak(root):
    source = arrays(2)
    source["train_images"][4] = source["train_images"][2]
    np.savez(root / "breastmnist.npz", **source)
    assert main(command(root, "breast")) == 0


def test_unknown_names_and_labels(root, capsys):
    assert "data set 'brain' is unknown; choose one of bloodmnist" in fails(root, capsys, "brain")
    source = arrays(2)
    source["val_labels"][3] = 2
    np.savez(root / "breastmnist.npz", **source)
    error = fails(root, capsys, "breast")
    assert "breastmnist.npz', val row 3: label [2] is unknown; breastmnist has the labels 0 to 1" in error


def test_an_empty_class(root, capsys):
    source = arrays(5)
    np.savez(root / "retinamnist.npz", **source)
    error = fails(root, capsys, "retina", "--limit", "4")
    assert "class 'proliferative diabetic retinopathy' is empty, it has no training image" in error
    source["train_labels"][source["train_labels"] == 2] = 1
    np.savez(root / "retinamnist.npz", **source)
    error = fails(root, capsys, "retina")
    assert "class 'moderate diabetic retinopathy' is empty, it has no training image (3 in val and test)" in error
    assert "--limit is 0; it must be at least 1" in fails(root, capsys, "retina", "--limit", "0")


def test_damaged_files(root, capsys):
    path = root / "breastmnist.npz"
    np.savez(path, **arrays(2))
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"something else"):
        path.write_bytes(data)
        assert "breastmnist.npz' is damaged" in fails(root, capsys, "breast")
    np.savez(path, train_images=np.zeros((2, 28, 28), np.uint8))
    assert "breastmnist.npz' is damaged" in fails(root, capsys, "breast")
    source = arrays(2)
    source["test_labels"] = source["test_labels"][:, 0]
    np.savez(path, **source)
    said = fails(root, capsys, "breast")
    assert "(8,) are not uint8 images of 28x28 pixels, grey or RGB, with whole numbers as labels [N, 1]" in said


@pytest.mark.parametrize("size", [28, 224])
def test_a_file_that_is_not_the_official_one(root, capsys, monkeypatch, size):
    path = root / ("breastmnist.npz" if size == 28 else "breastmnist_224.npz")
    np.savez(path, **arrays(2, side=size))
    before = path.read_bytes()
    official = INFO["breastmnist"]["MD5" if size == 28 else "MD5_224"]
    for setting in (None, "", "0", "yes"):
        if setting is None:
            monkeypatch.delenv("MEDMNIST_ALLOW_MODIFIED")
        else:
            monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", setting)
        error = fails(root, capsys, "breast", "--size", str(size))
        assert f"{path.name}' is not the official one: its MD5 is {hashlib.md5(before).hexdigest()}" in error
        assert f"medmnist.INFO has {official}" in error and "set MEDMNIST_ALLOW_MODIFIED=1" in error
    assert path.read_bytes() == before
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    assert main(command(root, "breast", "--size", str(size))) == 0


def test_an_official_file_is_known_by_its_md5_and_read_anew_when_it_changes(root, monkeypatch):
    path = root / "breastmnist.npz"
    np.savez(path, **arrays(2))
    monkeypatch.delenv("MEDMNIST_ALLOW_MODIFIED")
    monkeypatch.setitem(INFO, "breastmnist", {**INFO["breastmnist"], "MD5": hashlib.md5(path.read_bytes()).hexdigest()})
    assert set(medmnist.load(label_set("breast"))) == {"train", "val", "test"}
    np.savez(path, **arrays(2, grey=True))
    with pytest.raises(VITaskError, match="is not the official one"):
        medmnist.load(label_set("breast"))


def test_only_the_splits_that_are_asked_for_are_read(root):
    source = arrays(2)
    np.savez(root / "breastmnist.npz", **{name: array for name, array in source.items() if name.startswith("test")})
    found = medmnist.load(label_set("breast"), splits=("test",))
    assert set(found) == {"test"} and np.array_equal(found["test"][0], source["test_images"])
    with pytest.raises(VITaskError, match="is damaged"):
        medmnist.load(label_set("breast"))


def test_an_absent_file_that_cannot_be_downloaded(root, capsys, monkeypatch):
    import torchvision.datasets.utils as utils

    def interrupted(url, root, filename, md5):
        Path(root, filename).write_bytes(b"the beginning of a file")
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_url", interrupted)
    error = fails(root, capsys, "path")
    assert "pathmnist.npz' does not exist and cannot be downloaded; connect to the network, or put the file" in error
    assert "https://" in error and os.listdir(root) == []
    assert "drawn.npz' does not exist; `vitask demo` draws it" in fails(root, capsys, "drawn")


def test_an_absent_file_is_downloaded_by_medmnist(root, monkeypatch):
    import torchvision.datasets.utils as utils

    def download(url, root, filename, md5):
        np.savez(Path(root, filename), **arrays(2))

    monkeypatch.setattr(utils, "download_url", download)
    assert main(command(root, "pneumonia")) == 0
    assert (root / "pneumoniamnist.npz").exists()


def test_a_second_run_replaces_the_first_and_nothing_else(root, capsys):
    np.savez(root / "breastmnist.npz", **arrays(2))
    assert main(command(root, "breast", "--limit", "4")) == 0
    assert main(command(root, "breast")) == 0
    out = root.parent / "out"
    assert len(read_samples(out / "train.json")) == SIZES["train"]
    (out / "thesis.tex").write_text("years of work")
    assert main(command(root, "breast")) == 1
    assert "already holds 'thesis.tex', which is not an earlier output" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    (out / "labels.json").unlink()  # somebody's own LLaVA data looks like this
    assert main(command(root, "breast")) == 1
    assert "already holds 'images'" in capsys.readouterr().err


def test_the_real_files_if_they_are_here(tmp_path, capsys):
    known = Path(os.environ.get("MEDMNIST_ROOT", "~/.medmnist")).expanduser() / "breastmnist.npz"
    if not known.is_file():
        pytest.skip(f"no {known}")
    with pytest.raises(
        VITaskError, match=r"train row 115, labelled 'malignant'.*test row 76, labelled 'normal or benign'"
    ):
        from vitask_plugin.data.medmnist import convert

        convert("breast", tmp_path / "out")


@pytest.mark.parametrize(("task", "name"), [("dermamnist", "CC BY-NC 4.0"), ("breastmnist", "CC BY 4.0")])
def test_the_license_is_said(task, name, tmp_path, monkeypatch, capsys):
    """DermaMNIST alone is not for commercial use."""
    write_file(tmp_path, task, 14)
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    words = ["--task", task, "--out", str(tmp_path / "out"), "--allow-duplicates"]
    assert main(["data", "medmnist", *words]) == 0
    assert f"{task} is published under {name}\n" in "".join(capsys.readouterr())
