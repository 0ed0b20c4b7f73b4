"""What lies beside the images of published sets: masks, previews, notes, backups; and folders that may be patients."""

import logging
from pathlib import Path

import pytest
from own_images import converts, fails, fill
from pictures import save


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source" / "scans"
    folder.mkdir(parents=True)
    return folder


def images(found: dict[str, list[dict]]) -> int:
    return sum(map(len, found.values()))


def warnings(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


MASKS = {
    "BUSI": ("red/00_mask.png", "red/00_mask_1.png", "blue/03_mask.png"),
    "ISIC": ("red/00_superpixels.png", "red/01_segmentation.png"),
    "COVID-19 Radiography": ("red/masks/00.png", "blue/masks/00.png", "blue/Lung masks/00.png"),
    "previews": ("red/00_thumb.png", "red/thumbs/00.png", "blue/Thumbnails/00.png"),
}


@pytest.mark.parametrize("files", MASKS.values(), ids=MASKS)
def test_masks_and_thumbnails_are_no_images(source, caplog, files):
    fill(source, {"red": 12, "blue": 12})
    for number, name in enumerate(files):
        save(source / name, "grey", 900 + number)
    found = converts(source)
    assert images(found) == 24 and found["train"][0]["vitask"]["choices"] == ["blue", "red"]
    said = warnings(caplog)
    assert "it is a mask, an annotation or a thumbnail of other images" in said and files[0].split("/")[0] in said


GROUND_TRUTH = ("red/GT/00.png", "blue/gts/03_mask.png")


def test_ground_truth_is_told_by_what_its_files_are_named_after(source, caplog):
    fill(source, {"red": 12, "blue": 12})
    (source / "blue/images").mkdir()
    for path in source.glob("blue/*.png"):
        path.rename(source / "blue/images" / path.name)
    for number, name in enumerate(GROUND_TRUTH):
        save(source / name, "grey", 900 + number)
    assert images(converts(source)) == 24
    assert "thumbnail of other images: blue/gts, red/GT (2 file(s)" in warnings(caplog)


def test_a_patient_called_gt_is_none(source, caplog):
    for number in range(36):
        colour = ("red", "blue")[number % 2]
        save(source / colour / ("AB", "GT", "CD")[number // 2 % 3] / f"{number // 6}.png", colour, number)
    assert images(converts(source)) == 36
    assert "a thumbnail of other images" not in warnings(caplog)


def test_a_mask_of_no_image_beside_it_and_a_class_called_mask_are_images(source):
    fill(source, {"red": 12, "blue": 12})
    (source / "blue").rename(source / "mask")
    save(source / "red" / "nobody_mask.png", "red", 901)
    found = converts(source)
    assert images(found) == 25 and found["train"][0]["vitask"]["choices"] == ["mask", "red"]


@pytest.mark.parametrize("name", ["LICENSE", "00.xmp", "split.py", "report.pdf", "run.log", "look.ipynb", "SHA256SUMS"])
def test_notes_are_named_and_no_images(source, caplog, name):
    fill(source, {"red": 12, "blue": 12})
    (source / "red" / name).write_text("about these")
    assert images(converts(source)) == 24 and f"it is no image: red/{name}" in warnings(caplog)


@pytest.mark.parametrize(
    "name", ["00.png.bak", "00.png.orig", "00.png.filepart", "00.png.download", "ZbThumbnail.info"]
)
def test_what_programs_leave_is_passed_over(source, caplog, name):
    fill(source, {"red": 12, "blue": 12})
    (source / "red" / name).write_bytes(b"half a picture")
    assert images(converts(source)) == 24 and f"left out, because it is no data: {name} (1)" in warnings(caplog)


def test_what_could_be_an_image_is_refused_and_not_passed_over(source, capsys):
    fill(source, {"red": 12, "blue": 12})
    (source / "red" / "00.dcm").write_bytes(bytes(128) + b"DICM")
    assert "'red/00.dcm': image" in fails(source, capsys)


def test_training_and_testing_are_splits(source):
    fill(source, {"red": 5, "blue": 5}, "Training/")
    fill(source, {"red": 3, "blue": 3}, "Testing/", 1000)
    found = converts(source, "--val", "0")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 10, "test": 6}


def test_folders_that_may_be_patients_are_named(source, caplog):
    for number in range(36):
        colour = ("red", "blue")[number % 2]
        save(source / colour / f"patient_{number // 6}{colour[0]}" / f"{number}.png", colour, number)
    converts(source)
    assert "lie in 12 folders below them, such as 'blue/patient_0b'" in warnings(caplog)
    pattern = warnings(caplog).split("--group-pattern '")[1].split("'")[0]
    caplog.clear()
    found = converts(source, "--group-pattern", pattern)
    groups = {split: {row["vitask"]["group"] for row in rows} for split, rows in found.items()}
    assert sum(map(len, groups.values())) == 12 == len(set.union(*groups.values()))
    assert "folders below them" not in warnings(caplog)


def test_one_folder_of_each_class_is_no_patient(source, caplog):
    for number in range(24):
        save(source / ("red", "blue")[number % 2] / "images" / f"{number}.png", "red", number)
    converts(source)
    assert "folders below them" not in warnings(caplog)
