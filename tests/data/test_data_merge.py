"""Several data sets below one folder: `vitask data medmnist --task all` and `vitask data merge`."""

import json
import os
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from twelve import SETS, training_images, write_twelve

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import read_samples, tasks_of
from vitask_plugin.data.preparation import seen_in
from vitask_plugin.files import inside


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_twelve_become_one_data_argument(twelve):
    """Each written as the single command writes it, and all of them one JSON and one image root."""
    assert {path.name for path in twelve.iterdir()} == {
        *(known.flag for known in SETS),
        *("images", "labels.json", "train.json", "val.json", "test.json"),
    }
    samples = read_samples(twelve / "train.json")
    counts = Counter(sample["vitask"]["task"] for sample in samples)
    assert counts == {known.task: training_images(known) for known in SETS} and len(samples) == 519
    assert {task: tuple(entry["choices"]) for task, entry in tasks_of(samples).items()} == {
        known.task: known.choices for known in SETS
    }
    for split in ("train", "val", "test"):
        samples = read_samples(twelve / f"{split}.json")
        assert len({sample["id"] for sample in samples}) == len({sample["image"] for sample in samples}) == len(samples)
        for sample in samples:
            name, _, image = sample["image"].partition("/")
            (own,) = [one for one in read_samples_of(twelve / name, split) if one["image"] == image]
            assert sample == {**own, "id": f"{name}/{own['id']}", "image": sample["image"]}
            assert inside(twelve / "images", sample["image"]).samefile(twelve / name / "images" / image)
    images = twelve / "images"
    assert all(path.is_symlink() and not os.path.isabs(os.readlink(path)) for path in images.iterdir())
    sets = json.loads((twelve / "labels.json").read_text())["sets"]
    assert {name: (labels["task"], labels["type"]) for name, labels in sets.items()} == {
        known.flag: (known.task, known.kind) for known in SETS
    }


@lru_cache(maxsize=64)
def read_samples_of(folder: Path, split: str) -> list[dict]:
    return read_samples(folder / f"{split}.json")


def test_a_set_of_several_is_what_the_single_command_writes(twelve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDMNIST_ROOT", str(twelve.parent / "root"))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    assert main(["data", "medmnist", "--task", "retina", "--out", str(tmp_path / "one")]) == 0
    assert files(tmp_path / "one") == files(twelve / "retinamnist")
    words = ["data", "medmnist", "--task", "breast,retina", "blood", "--out", str(tmp_path / "three")]
    assert main(words) == 0
    assert files(tmp_path / "three" / "retinamnist") == files(twelve / "retinamnist")
    said = capsys.readouterr()
    assert "retinamnist: 5 train, 7 val, 7 test samples of medmnist_retina" in said.out + said.err
    # Again, and into a folder that is somebody else's.
    assert main(words) == 0 and (tmp_path / "three" / "images" / "bloodmnist").is_dir()
    (tmp_path / "three" / "thesis.tex").touch()
    assert main(words) == 1 and "already holds 'thesis.tex'" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "one")]) == 1
    assert "already holds 'labels.json', which is not of an earlier output of several" in capsys.readouterr().err
    assert files(tmp_path / "one") == files(twelve / "retinamnist")
    assert main(["data", "medmnist", "--task", "all", "breast", "--out", str(tmp_path / "new")]) == 1
    assert "--task names 'breastmnist' twice" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.fixture
def general(tmp_path) -> tuple[Path, Path]:
    """LLaVA's own kind of data: an image of another folder, and text alone."""
    from PIL import Image

    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "coco" / "train2017" / "1.png")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A red square."}]
    text = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello!"}]
    samples = [{"id": "1", "image": "train2017/1.png", "conversations": turns}, {"conversations": text}]
    (tmp_path / "llava_mix.json").write_text(json.dumps(samples))
    return tmp_path / "llava_mix.json", tmp_path / "coco"


def merge(*words: object) -> int:
    return main(["data", "merge", *map(str, words)])


def test_general_data_is_trained_on_and_not_judged(twelve, general, tmp_path):
    words = [twelve / "breastmnist", twelve / "bloodmnist", "--also", general[0], "--also-images", general[1]]
    out = tmp_path / "deep" / "merged"
    assert merge(*words, "--out", out) == 0
    train = read_samples(out / "train.json")
    assert [sample["id"] for sample in train[-2:]] == ["llava_mix/1", "llava_mix/1"]
    assert train[-2]["image"] == "llava_mix/train2017/1.png" and "image" not in train[-1]
    assert all(inside(out / "images", sample["image"]).is_file() for sample in train if "image" in sample)
    assert all("vitask" in sample for sample in read_samples(out / "test.json"))
    assert {path.name for path in out.iterdir() if path.is_symlink()} == {"breastmnist", "bloodmnist"}
    assert files(out / "breastmnist") == files(twelve / "breastmnist")
    before = files(twelve / "breastmnist")
    assert merge(*words, "--out", out) == 0 and files(twelve / "breastmnist") == before  # replaced, not emptied


def test_what_one_set_says_of_its_pixels_and_groups_is_kept(twelve, tmp_path):
    first, second = (shutil.copytree(twelve / "breastmnist", tmp_path / name) for name in ("north", "south"))
    for folder in (first, second):
        labels = json.loads((folder / "labels.json").read_text())
        (folder / "labels.json").write_text(json.dumps({**labels, "pixels": {"max_side": 28}}))
        samples = json.loads((folder / "train.json").read_text())
        for sample in samples:
            sample["vitask"]["group"] = "patient 1"
        (folder / "train.json").write_text(json.dumps(samples))
    assert merge(first, second, "--out", tmp_path / "both") == 0  # one task, the same labels: two hospitals
    samples = read_samples(tmp_path / "both" / "train.json")
    assert Counter(s["vitask"]["group"] for s in samples) == {"north/patient 1": 4, "south/patient 1": 4}
    seen = seen_in(samples, tmp_path / "both" / "images", tmp_path / "both" / "train.json")
    assert seen.images["medmnist_breast"]["pixels"] == {"max_side": 28, "resampling": "lanczos"}


def other_labels(folder: Path) -> None:
    text = (folder / "labels.json").read_text().replace("malignant", "tumour")
    (folder / "labels.json").write_text(text)
    for split in ("train", "val", "test"):
        path = folder / f"{split}.json"
        path.write_text(path.read_text().replace("malignant", "tumour"))


def other_pixels(folder: Path) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps({**labels, "pixels": {"window": [0, 100]}}))


def other_task(folder: Path) -> None:
    for name in ("labels", "train", "val", "test"):
        path = folder / f"{name}.json"
        path.write_text(path.read_text().replace("medmnist_breast", "scans"))


def one_class(folder: Path) -> None:
    other_task(folder)
    samples = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps([s for s in samples if s["vitask"]["label"] == 0]))


def no_training(folder: Path) -> None:
    other_task(folder)
    (folder / "train.json").unlink()


def lost_image(folder: Path) -> None:
    next((folder / "images" / "val").iterdir()).unlink()


CHANGED = {
    "other labels": (other_labels, "'breastmnist' and 'b' are both of task 'medmnist_breast', with the choices ['"),
    "other pixels": (other_pixels, "their pixels were prepared otherwise, {} and {'window': [0, 100]}"),
    "a class without training": (one_class, "no training image has the class 'normal or benign', but val and test"),
    "no training at all": (no_training, "data set 'b', task 'scans': no training image has the class 'malignant'"),
    "a lost image": (lost_image, "is not in the image folder"),
    "no label set": (lambda folder: (folder / "labels.json").unlink(), "is no folder of `vitask data`: its label set"),
    "labels of another set": (
        lambda folder: shutil.copy(folder.parent / "blood.json", folder / "labels.json"),
        "is not that of labels.json",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_does_not_go_together_is_one_sentence(name, twelve, tmp_path, capsys):
    change, sentence = CHANGED[name]
    shutil.copy(twelve / "bloodmnist" / "labels.json", tmp_path / "blood.json")
    change(shutil.copytree(twelve / "breastmnist", tmp_path / "b"))
    refused(capsys, sentence, tmp_path, twelve / "breastmnist", tmp_path / "b")


def refused(capsys, sentence: str, tmp_path: Path, *words: object) -> None:
    before = sorted(tmp_path.iterdir())
    assert merge(*words, "--out", tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vitask: error: ")]
    assert sentence in line, line
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_given_wrongly_is_one_sentence(twelve, general, tmp_path, capsys):
    breast, blood = twelve / "breastmnist", twelve / "bloodmnist"
    (tmp_path / "link").symlink_to(breast)
    shutil.copytree(blood, tmp_path / "again" / "breastmnist")
    shutil.copytree(blood, tmp_path / "images")
    refused(capsys, "is given twice (", tmp_path, breast, blood, breast)
    refused(capsys, "is given twice (", tmp_path, breast, tmp_path / "link")
    refused(capsys, "would both be called 'breastmnist'", tmp_path, breast, tmp_path / "again" / "breastmnist")
    refused(capsys, "would be called 'images'", tmp_path, breast, tmp_path / "images")
    refused(capsys, "has the label sets of several data sets, pathmnist, chestmnist, ", tmp_path, twelve, breast)
    refused(capsys, "does not exist; give a folder", tmp_path, breast, tmp_path / "nowhere")
    refused(capsys, "say with --also-images in which folder it is", tmp_path, breast, "--also", general[0])
    refused(capsys, "is not in the image folder", tmp_path, breast, "--also", general[0], "--also-images", breast)
    refused(capsys, "but 1 image folders", tmp_path, breast, "--also-images", breast)
    refused(capsys, "is no general data", tmp_path, breast, "--also", blood / "train.json", "--also-images", blood)
    # Data sets are not replaced by what is made of them.
    before = files(twelve)
    for out in (breast, twelve):
        assert merge(breast, blood, "--out", out) == 1
        assert "which is not an earlier output of this command" in capsys.readouterr().err
    assert files(twelve) == before


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    """The sets are there and what they make together is not yet."""
    monkeypatch.setenv("MEDMNIST_ROOT", str(write_twelve(tmp_path / "root")))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    words = ["data", "medmnist", "--task", "breast", "retina", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "labels.json").unlink()
    shutil.rmtree(tmp_path / "out" / "retinamnist")
    assert main(words) == 0 and files(tmp_path / "out") == whole


def test_an_image_that_one_set_learns_and_another_is_judged_by_is_refused(twelve, tmp_path, capsys):
    """Under any name: the file is compared, and not what it is called."""
    other = shutil.copytree(twelve / "breastmnist", tmp_path / "copied")
    learnt = next((other / "images" / "train").iterdir())
    judged = next((twelve / "retinamnist" / "images" / "test").iterdir())
    shutil.copyfile(judged, learnt)
    refused(
        capsys,
        f"1 test image(s) of '{twelve / 'retinamnist'}' are train images of another data set, the first being "
        f"'{judged}', which holds what '{learnt}' does",
        tmp_path,
        *(twelve / "retinamnist", other),
    )
    words = (twelve / "retinamnist", other, "--out", tmp_path / "both")
    assert merge(*words, "--allow-duplicates") == 0
