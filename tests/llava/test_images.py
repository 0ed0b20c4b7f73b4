"""Image files in training: the same pixels for TSM and VLM, deep ones refused, broken ones named with their sample."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import png16, write_every_mode
from PIL import Image
from runs import arguments

from vitask_plugin.cli import main
from vitask_plugin.data.checking import check_images, read_image
from vitask_plugin.data.images import decode, pixel_hash
from vitask_plugin.data.instructions import DRAWN, sample
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm import extraction, samples
from vitask_plugin.tsm.model import TSM


def test_tsm_and_vlm_see_the_same_pixels(build, tmp_path, monkeypatch):
    names = write_every_mode(tmp_path)
    words = {"modality": "test", "task": DRAWN.task, "choices": list(DRAWN.choices)}
    rows = [sample(identifier=name, image=name, label=index % 2, **words) for index, name in enumerate(names)]
    rows += [{key: value for key, value in row.items() if key != "vitask"} for row in rows]  # general data too
    (tmp_path / "data.json").write_text(json.dumps(rows))
    dataset, _ = build(vitask_ep="learned")
    dataset.image_folder, dataset.list_data_dict = str(tmp_path), rows
    dataset.data_args.image_folder = str(tmp_path)
    processor, hashes = dataset.data_args.image_processor, {"vlm": [], "extracting": [], "training": []}
    preprocess = type(processor).preprocess

    def spy(self, image, **kwargs):
        hashes["vlm"].append(pixel_hash(image))
        return preprocess(self, image, **kwargs)

    def spy_of(what):
        def seen(image: Image.Image) -> torch.Tensor:
            hashes[what].append(pixel_hash(image))
            return torch.zeros(3, 2, 2)

        return seen

    monkeypatch.setattr(type(processor), "preprocess", spy)
    for index in range(len(rows)):
        dataset[index]
    extracting = extraction._Images.__new__(extraction._Images)
    extracting.preprocess, extracting.folder, extracting.images = spy_of("extracting"), tmp_path, names
    for index in range(len(names)):
        extracting[index]
    labelled = samples.read_labelled([tmp_path / "data.json"], [tmp_path], training=True)
    training = samples._Dataset(labelled, {DRAWN.task: {"choices": DRAWN.choices, "multi_label": False}}, None)
    training.preprocess = spy_of("training")
    for index in range(len(names)):
        training[index]
    expected = [pixel_hash(decode((tmp_path / name).read_bytes(), name)) for name in names]
    assert hashes == {"vlm": expected * 2, "extracting": expected, "training": expected}
    assert len(set(expected)) >= 15
    turned = decode((tmp_path / "turned.jpg").read_bytes(), "")
    assert turned.size == (30, 40)


@pytest.fixture
def ended(tiny_llava, mixed_data, tmp_path, monkeypatch):
    """Runs the training command in this process on a changed copy of the data; returns the sentence it ended with."""
    from vitask_plugin.llava import compat
    from vitask_plugin.llava.install import wrap

    compat.prepare()
    from llava.train.train import train

    def run(change, *flags: str) -> str:
        data = Path(shutil.copytree(mixed_data, tmp_path / "changed"))
        rows = json.loads((data / "train.json").read_text())
        change(rows, data / "images")
        (data / "train.json").write_text(json.dumps(rows))
        command = arguments(tiny_llava, data, tmp_path / "output", "--vitask", "True", "--vitask_ep", "none", *flags)
        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        with pytest.raises(SystemExit) as stopped:
            wrap(train)()
        sentence = str(stopped.value)
        assert sentence.startswith("vitask: error: ") and "\n" not in sentence
        return sentence

    return run


def general(rows: list[dict], number: int = 0) -> dict:
    return next(row for row in rows if row.get("id") == f"general-{number}")


def truncate(rows: list[dict], images: Path) -> None:
    """Of general data: an image of its own that is cut off in the middle."""
    original = images / general(rows)["image"]
    (images / "cut.png").write_bytes(original.read_bytes()[: original.stat().st_size // 2])
    general(rows)["image"] = "cut.png"


def deepen(rows: list[dict], images: Path) -> None:
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(images / "deep.png")
    general(rows)["image"] = "deep.png"


def test_a_broken_image_of_general_data_is_named_before_the_first_step(ended, tmp_path):
    sentence = ended(truncate)
    assert "sample 'general-0': image " in sentence and "changed/images/cut.png' cannot be read" in sentence
    assert "truncated" in sentence and not (tmp_path / "output").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_broken_image_is_named_when_its_turn_comes(workers, ended):
    sentence = ended(truncate, "--vitask_check_images", "none", "--dataloader_num_workers", workers)
    assert "error: sample 'general-0': image " in sentence and "changed/images/cut.png' cannot be read" in sentence


def deepen_colours(rows: list[dict], images: Path) -> None:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    (images / "deep.png").write_bytes(png16(np.stack([ramp] * 3, axis=-1)))
    general(rows)["image"] = "deep.png"


@pytest.mark.parametrize("change", [deepen, deepen_colours])
def test_deep_pixels_are_refused(change, ended):
    """Of 16 bits per colour, the upper 8 were trained on without a word."""
    sentence = ended(change)
    assert "sample 'general-0': image " in sentence and "deep.png' holds uint16 values (0 to 4095" in sentence
    assert "write the data set with `vitask data folder`" in sentence


def blacken(rows: list[dict], images: Path) -> None:
    for row in rows:
        if "vitask" in row:
            Image.new("RGB", (28, 28)).save(images / row["image"])


def test_images_with_nothing_to_see_are_refused(ended):
    sentence = ended(blacken)
    assert f"task '{DRAWN.task}': all " in sentence and " images are of one colour, RGB (0, 0, 0)" in sentence


def test_16_bits_per_colour_are_the_same_to_tsm_and_vlm(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (8, 24, 32, 3)).astype(np.uint16)
    for number, one in enumerate(values):
        path = tmp_path / "scans" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png16(one))
    words = ["--out", str(tmp_path / "out"), "--modality", "test", "--val", "0", "--test", "0", "--window", "0", "4095"]
    assert main(["data", "folder", str(tmp_path / "scans"), *words]) == 0
    train, images = tmp_path / "out/train.json", tmp_path / "out/images"
    rows = json.loads(train.read_text())
    labelled = samples.read_labelled([train], [images], training=True)
    training = samples._Dataset(labelled, {rows[0]["vitask"]["task"]: {"choices": "ab", "multi_label": False}}, None)
    training.preprocess = np.asarray
    seen = [np.asarray(read_image(row, images)) for row in rows]
    assert all(np.array_equal(training[index][0], one) for index, one in enumerate(seen))
    assert {one.tobytes() for one in seen} == {
        np.round(one * (255 / 4095)).astype(np.uint8).tobytes() for one in values
    }


def test_a_tsm_of_images_of_another_size_is_refused(ended, tsm_directory, tmp_path):
    tsm = TSM.load(tsm_directory)
    sizes = {DRAWN.task: {"width": [224, 224], "height": [224, 224], "images": 9}}
    TSM(tsm.backbone.network, tsm.record | {"images": sizes}).save(tmp_path / "tsm")
    sentence = ended(lambda rows, images: None, "--vitask_ep", "cls", "--vitask_tsm", str(tmp_path / "tsm"))
    assert "was trained on 224x224 images of task 'vitask_drawn', those of" in sentence and "are 28x28" in sentence


def test_a_tsm_of_images_through_another_window_is_refused(ended, tsm_directory, tmp_path):
    tsm = TSM.load(tsm_directory)
    deep = {"width": [28, 28], "height": [28, 28], "images": 9, "pixels": {"window": [0, 4095]}}
    TSM(tsm.backbone.network, tsm.record | {"images": {DRAWN.task: deep}}).save(tmp_path / "tsm")
    sentence = ended(lambda rows, images: None, "--vitask_ep", "cls", "--vitask_tsm", str(tmp_path / "tsm"))
    assert "was trained on images through the window 0 to 4095 of task 'vitask_drawn', those of" in sentence
    assert "train.json' are through no window (8-bit as they were)" in sentence and "--any-image-size" in sentence


def test_what_the_label_set_says_is_part_of_the_record(build, mixed_data, tmp_path):
    labels = json.loads((mixed_data / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps(labels | {"pixels": {"window": [0, 4095], "max_side": 28}}))
    shutil.copy(mixed_data / "train.json", tmp_path)
    dataset, _ = build(data=tmp_path / "train.json")
    expected = {"window": [0, 4095], "max_side": 28, "resampling": "lanczos"}
    assert dataset.seen.images[DRAWN.task]["pixels"] == expected


def rows_of(folder: Path, count: int, broken: set[int]) -> list[dict]:
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:40])
    return [{"id": f"s{number}", "image": f"{number}.png"} for number in range(count)]


def test_all_broken_images_are_listed_with_their_number(tmp_path):
    rows = rows_of(tmp_path, 20, {1, 3, 5, 7, 9, 11, 13})
    with pytest.raises(VITaskError) as caught:
        check_images([{"id": "text"}, *rows, *rows], tmp_path)
    sentence = str(caught.value)
    assert sentence.startswith("sample 's1': image ") and "7 of 20 images looked at are like it" in sentence
    assert sentence.endswith("also sample 's3' ('3.png'), sample 's5' ('5.png'), sample 's7' ('7.png'), "
                             "sample 's9' ('9.png') and 2 more")  # fmt: skip


def task_rows(folder: Path, task: str, pictures: list[Image.Image]) -> list[dict]:
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{task}{number}.png")
    return [
        {"id": f"{task}{number}", "image": f"{task}{number}.png", "vitask": {"task": task}}
        for number in range(len(pictures))
    ]


def test_each_task_must_have_something_to_see(tmp_path, caplog):
    """A black set among others, one with few grey levels, and one in which a single image is not black."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    black = Image.new("RGB", (16, 16))
    right = task_rows(tmp_path, "right", [noise] * 40)
    check_images([*right, {"id": "blank", "image": task_rows(tmp_path, "blank", [black])[0]["image"]}], tmp_path)
    assert "samples of no task: all 1 images are of one colour, RGB (0, 0, 0)" in caplog.text
    wrong = task_rows(tmp_path, "wrong", [black] * 40)
    sentence = r"^task 'wrong': all 40 images are of one colour, RGB \(0, 0, 0\), so there is nothing to see; check the"
    with pytest.raises(VITaskError, match=sentence):
        check_images([*right, *wrong], tmp_path)
    check_images([*right, *wrong], tmp_path, "none")
    check_images([*right, *wrong], tmp_path, part=(1, 2))  # the first process says it
    noise.save(tmp_path / "wrong39.png")  # not among those looked at first
    check_images([*right, *wrong], tmp_path)
    assert "task 'wrong': 39 of 40 images are of one colour throughout, the first of them 'wrong0.png'" in caplog.text
    few = task_rows(tmp_path, "few", [Image.eval(noise, lambda value: value // 16)] * 40)
    check_images([*right, *few], tmp_path)
    assert "task 'few': 32 of 32 images keep fewer than 32 of 256 grey levels (median 16)" in caplog.text


def test_a_sample_of_many_images_or_all_of_them(tmp_path, monkeypatch):
    from vitask_plugin.data import checking, levels

    monkeypatch.setattr(checking, "SAMPLE", 5)
    monkeypatch.setattr(levels, "LOOKED_AT", 5)
    rows = rows_of(tmp_path, 20, {1})
    check_images(rows, tmp_path, "none")
    check_images(rows, tmp_path, "sample")  # 0, 4, 8, 12, 16
    check_images(rows, tmp_path, "all", part=(0, 2))  # the other process of the node looks at the odd ones
    for which, part in (("all", (0, 1)), ("all", (1, 2))):
        with pytest.raises(VITaskError, match="sample 's1'"):
            check_images(rows, tmp_path, which, part=part)
