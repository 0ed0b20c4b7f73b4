"""Anybody's labelled images: class folders and CSV files, and everything that is refused."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from own_images import command, converts, csv, fails, fill
from pictures import picture, save
from PIL import Image

from vitask_plugin.cli import main
from vitask_plugin.data.folder import Row, assign_splits
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.errors import VITaskError


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source" / "Fruit colours"
    folder.mkdir(parents=True)
    return folder


def answers(rows: list[dict]) -> Counter:
    return Counter(row["conversations"][1]["value"] for row in rows)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_class_folders_are_split_class_by_class(source):
    fill(source, {"red": 20, "dark_blue": 10, "green": 5})
    (source / ".DS_Store").write_bytes(b"junk")
    (source / "red" / "Thumbs.db").write_bytes(b"junk")
    (source / "README.txt").write_text("about these")
    found = converts(source)
    assert answers(found["train"]) == {"red.": 16, "dark blue.": 8, "green.": 3}
    assert answers(found["val"]) == answers(found["test"]) == {"red.": 2, "dark blue.": 1, "green.": 1}
    out = Path(command(source)[4])
    labels = json.loads((out / "labels.json").read_text())
    assert labels == {
        "task": "out",
        "choices": ["dark blue", "green", "red"],
        "modality": "fruit",
        "type": "multi-class",
        "pixels": {},
    }
    question = "<image>\nAnalyze the given fruit image. The possible diagnoses are: dark blue, green, red."
    assert found["train"][0]["conversations"][0]["value"] == question
    written = {
        pixels(out / "images" / row["image"]).tobytes(): row["conversations"][1]["value"]
        for rows in found.values()
        for row in rows
    }
    expected = {pixels(path).tobytes(): path.parent.name.replace("_", " ") + "." for path in source.rglob("*.png")}
    assert written == expected and len(written) == 35


def test_the_split_depends_on_the_seed_alone(source):
    fill(source, {"red": 12, "blue": 12})
    first = converts(source)
    out = Path(command(source)[4])
    images = {split: {pixels(out / "images" / row["image"]).tobytes() for row in rows} for split, rows in first.items()}
    assert converts(source) == first
    converts(source, "--seed", "1")
    other = {pixels(path).tobytes() for path in (out / "images" / "test").iterdir()}
    assert other != images["test"] and len(other) == len(images["test"])


def test_given_splits_are_kept(source):
    fill(source, {"red": 4, "blue": 3}, "train/")
    fill(source, {"red": 2, "blue": 1}, "Validation/", 1000)
    fill(source, {"blue": 1}, "val/", 1500)
    fill(source, {"red": 1, "blue": 5}, "test/", 2000)
    found = converts(source, "--incomplete", "--task", "mine", "--labels", "red,blue")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 7, "val": 4, "test": 6}
    assert found["test"][0]["vitask"] == {"task": "mine", "label": 1, "choices": ["red", "blue"]}
    assert found["test"][0]["conversations"][0]["value"] == "<image>\nAnalyze the given fruit image."


def test_a_missing_validation_split_is_taken_out_of_train(source):
    fill(source, {"red": 10, "blue": 20}, "train/")
    fill(source, {"red": 3, "blue": 3}, "test/", 2000)
    found = converts(source, "--val", "0.2")
    assert answers(found["train"]) == {"red.": 8, "blue.": 16}
    assert answers(found["val"]) == {"red.": 2, "blue.": 4}
    assert answers(found["test"]) == {"red.": 3, "blue.": 3}
    assert set(converts(source, "--val", "0")) == {"train", "test"}


def test_a_csv(source):
    fill(source, {"red": 3, "blue": 3})
    rows = [f"{colour}/{index:02d}.png,{colour}_fruit" for colour in ("red", "blue") for index in range(3)]
    found = converts(csv(source, "image,label\n" + "\n".join(rows) + "\n\n"), "--val", "0.3", "--test", "0.3")
    assert [answers(found[split]) for split in ("train", "val", "test")] == [{"red fruit.": 1, "blue fruit.": 1}] * 3
    assert found["train"][0]["vitask"]["task"] == "out"  # as the folder, which evaluation goes by


def test_a_set_for_evaluation_alone(source):
    """All images in test, in the label order of the training data, one class of which it lacks."""
    fill(source, {"red": 3, "blue": 1})
    found = converts(source, "--val", "0", "--test", "1", "--labels", "green,blue,red")
    assert found.keys() == {"test"} and answers(found["test"]) == {"red.": 3, "blue.": 1}
    assert all(row["vitask"]["choices"] == ["green", "blue", "red"] for row in found["test"])


def test_a_csv_with_splits_and_an_image_folder(source):
    fill(source, {"red": 3, "blue": 3})
    lines = ["split,label,image", "train,red,red/00.png", "train,blue,blue/00.png", "valid,red,red/01.png"]
    lines += ["test,blue,blue/01.png", 'test,"red ","red/02.png"']
    elsewhere = source / "tables"
    elsewhere.mkdir()
    path = elsewhere / "labels.csv"
    path.write_text("\n".join(lines))
    assert main([*command(path), "--image-folder", str(source)]) == 0
    out = Path(command(path)[4])
    assert answers(read_samples(out / "test.json")) == {"blue.": 1, "red.": 1}
    assert len(read_samples(out / "val.json")) == 1


def test_a_multi_label_csv(source):
    fill(source, {"red": 4, "blue": 4})
    cells = ["b;a", "a", "", "b", "c ; a", "c", "a;b;c", "b"]
    files = [f"{colour}/{index:02d}.png" for colour in ("red", "blue") for index in range(4)]
    text = "image,label,split\n" + "".join(
        f"{file},{cell},{'train' if number < 7 else 'val'}\n"
        for number, (file, cell) in enumerate(zip(files, cells, strict=True))
    )
    found = converts(csv(source, text), "--multi-label")
    assert [row["vitask"]["label"] for row in found["train"]] == [[0, 1], [0], [], [1], [0, 2], [2], [0, 1, 2]]
    assert found["train"][2]["conversations"][1]["value"] == "no finding."
    assert found["train"][4]["conversations"][1]["value"] == "a, c."
    out = Path(command(source)[4])
    assert json.loads((out / "labels.json").read_text())["type"] == "multi-label, binary-class"


def test_grades_in_order(source):
    fill(source, {"red": 5, "blue": 5})
    found = converts(source, "--ordinal", "--labels", "red,blue")
    labels = json.loads((Path(command(source)[4]) / "labels.json").read_text())
    assert (labels["type"], labels["choices"]) == ("ordinal-regression", ["red", "blue"])
    assert {row["vitask"]["label"] for row in found["train"]} == {0, 1}


def test_grades_that_are_not_understood(source, capsys):
    fill(source, {"red": 5, "blue": 5})
    assert "add --labels LOWEST,...,HIGHEST" in fails(source, capsys, "--ordinal")
    table = csv(source, "image,label\nred/00.png,red\nblue/00.png,blue\n")
    both = ("--ordinal", "--multi-label", "--labels", "red,blue")
    assert "--ordinal and --multi-label exclude each other" in fails(table, capsys, *both)


def test_pictures_of_all_kinds_become_upright_rgb(source):
    fill(source, {"red": 3, "blue": 3}, "train/")
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(source / "train" / "red" / "deep.png")
    turned = picture("blue", 5).resize((6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(source / "train" / "red" / "turned.jpg", exif=exif, quality=95)
    converts(source, "--val", "0", "--window", "0", "65535")
    out = Path(command(source)[4])
    written = {pixels(path).shape[:2]: pixels(path) for path in (out / "images" / "train").iterdir()}
    assert set(written) == {(32, 32), (8, 8), (6, 4)}
    assert np.array_equal(written[8, 8][..., 0], np.round(deep / 257))


def test_the_same_picture_in_train_and_test(source, capsys):
    fill(source, {"red": 3, "blue": 3}, "train/")
    fill(source, {"red": 2, "blue": 2}, "test/", 2000)
    with Image.open(source / "train/red/01.png") as image:
        image.save(source / "test/blue/again.bmp")  # another format, the same pixels
    error = fails(source, capsys, "--val", "0")
    assert "the same image is in train ('train/red/01.png', labelled 'red') and in test ('test/blue/again.bmp'" in error
    found = converts(source, "--val", "0", "--allow-duplicates")
    assert len(found["test"]) == 5
    out = Path(command(source)[4])
    assert json.loads((out / "labels.json").read_text())["duplicates"] == [
        {"train": "'train/red/01.png'", "test": "'test/blue/again.bmp'"}
    ]


def test_unreadable_images(source, capsys):
    fill(source, {"red": 5, "blue": 5})
    whole = (source / "red/03.png").read_bytes()
    (source / "red/03.png").write_bytes(whole[: len(whole) // 2])
    error = fails(source, capsys)
    assert "'red/03.png': image" in error and "cannot be read (" in error and "replace or remove it" in error
    (source / "red/03.png").write_text("a note")
    assert "cannot be read (not an image of a known format)" in fails(source, capsys)
    path = csv(source, "image,label\nred/00.png,a\nred/01.png,a\nblue/77.png,b\nblue/00.png,b\n")
    error = fails(path, capsys, "--val", "0", "--test", "0")
    assert f"{str(path)!r}, row 4 ('blue/77.png'): image" in error and "No such file or directory" in error


def test_unknown_labels(source, capsys):
    fill(source, {"red": 5, "blue": 5})
    error = fails(source, capsys, "--labels", "red,green")
    assert "'blue/" in error and "label 'blue' is unknown; expected one of red, green" in error
    path = csv(source, "image,label,split\nred/00.png,a,train\nred/01.png,b,train\nred/02.png,c,test\n")
    error = fails(path, capsys, "--labels", "a,b", "--val", "0")
    assert f"{str(path)!r}, row 4 ('red/02.png'): label 'c' is unknown; expected one of a, b" in error


def test_labels_are_cleaned_as_folder_names_are(source):
    fill(source, {"dark_red": 5, "blue": 5})
    found = converts(source, "--labels", "dark_red, blue")
    assert found["test"][0]["vitask"]["choices"] == ["dark red", "blue"]
    assert answers(found["test"]) == {"dark red.": 1, "blue.": 1}


def test_empty_classes(source, capsys):
    fill(source, {"red": 5, "blue": 5})
    (source / "green").mkdir()
    error = fails(source, capsys)
    assert "class 'green' is empty: no file in" in error and "add images or remove the folder" in error
    (source / "green").rmdir()
    assert "class 'green' is empty, it has no training image;" in fails(source, capsys, "--labels", "red,blue,green")
    path = csv(source, "image,label,split\nred/00.png,a,train\nred/01.png,b,train\nred/02.png,c,test\n")
    assert "class 'c' is empty, it has no training image (1 in val and test)" in fails(path, capsys, "--val", "0")


def test_one_class(source, capsys):
    fill(source, {"red": 5})
    assert "1 class(es) ['red']; at least two are needed" in fails(source, capsys)


def test_a_class_too_small_to_split(source, capsys):
    fill(source, {"red": 5, "blue": 2})
    error = fails(source, capsys)
    assert "class 'blue' has 2 image(s), too few for 3 splits; add images, or use --val 0 and --test 0" in error
    assert "leave nothing to train on" in fails(source, capsys, "--val", "0.5", "--test", "0.5")


def test_paths_that_leave_the_folder(source, capsys):
    fill(source, {"red": 5, "blue": 5})
    outside = save(source.parent / "outside.png", "red", 77)
    for path in ("../outside.png", str(outside)):
        table = csv(source, f"image,label\nred/00.png,a\n{path},b\n")
        error = fails(table, capsys, "--val", "0", "--test", "0")
        assert f"{str(table)!r}, row 3: image path {path!r} leaves the image folder" in error
    table.unlink()
    (source / "red" / "link.png").symlink_to(outside)  # the owner's own doing
    assert sum(len(rows) for rows in converts(source).values()) == 11


LEFTOVERS = (
    *(".ipynb_checkpoints/00-checkpoint.png", "red/.ipynb_checkpoints/00.png", "red/Thumbs.db", "red/._00.png"),
    *(".DS_Store", "red/.DS_Store", "red/desktop.ini", "@eaDir/00.png/SYNOPHOTO_THUMB.png", "red/@eaDir/00.png"),
    *("__MACOSX/red/._00.png", ".thumbnails/00.png", "red/.AppleDouble/00.png", ".Trash-1000/files/00.png"),
    *("lost+found/00.png", "$RECYCLE.BIN/00.png", "red/deep/.hidden/00.png", "red/00.png:Zone.Identifier"),
)


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_what_is_in_a_folder_besides_data(source, caplog, capsys, prefix):
    fill(source, {"red": 5, "blue": 5}, prefix)
    save(source / prefix / "red" / "deep" / "er" / "x.png", "red", 555)
    for number, name in enumerate(LEFTOVERS):
        picture_of_its_own = save(source / "x.png", "grey", 2000 + number)
        (source / prefix / name).parent.mkdir(parents=True, exist_ok=True)
        picture_of_its_own.rename(source / prefix / name)
    for name in ("README.txt", "labels.csv", "red/notes.md"):
        (source / prefix / name).write_text("about these")
    with caplog.at_level(logging.WARNING):
        found = converts(source, "--val", "0", "--test", "0")
    assert len(found["train"]) == 11 and found["train"][0]["vitask"]["choices"] == ["blue", "red"]
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1 and ".ipynb_checkpoints (2)" in lines[0] and "@eaDir (2)" in lines[0]
    named = next(record.getMessage() for record in caplog.records if "it is no image" in record.getMessage())
    assert all(f"{prefix}{name}" in named for name in ("README.txt", "labels.csv", "red/notes.md"))
    save(source / prefix / "green" / ".ipynb_checkpoints" / "a.png", "green", 1)
    (source / prefix / "green" / "Thumbs.db").write_bytes(b"x")
    assert "class 'green' is empty" in fails(source, capsys)


def test_class_folders_that_are_links(source, caplog):
    fill(source, {"red": 4, "blue": 4})
    elsewhere = source.parent / "elsewhere"
    (source / "blue").rename(elsewhere)
    (source / "blue").symlink_to(elsewhere)
    (source / "red" / "more").symlink_to(source / "red")  # a ring
    (source / "red" / "others").symlink_to(source.parent / "others")
    save(source.parent / "others" / "a.png", "red", 77)
    found = converts(source, "--val", "0", "--test", "0")
    assert answers(found["train"]) == {"red.": 5, "blue.": 4}
    assert "not followed, because it leads back into a folder that it lies in: red/more" in caplog.text


def test_folders_that_are_not_understood(source, capsys):
    assert "has no class folders; expected DIR/class/image" in fails(source, capsys)
    fill(source, {"red": 5, "blue": 5})
    loose = save(source / "loose.png", "red", 99)
    assert f"image {str(loose)!r} lies in no class folder; move it into one" in fails(source, capsys)
    loose.unlink()
    fill(source, {"red": 2}, "train/")
    assert "has split folders and 'blue' beside them; expected train, val and test only" in fails(source, capsys)
    assert "needs a CSV file" in fails(source, capsys, "--multi-label")
    missing = source.parent / "missing"
    assert main(["data", "folder", str(missing), "--out", str(source.parents[1] / "out"), "--modality", "x"]) == 1
    assert "missing' is neither a folder nor a CSV file; check the path" in capsys.readouterr().err
    inside = source / "out"
    assert main(["data", "folder", str(source), "--out", str(inside), "--modality", "x"]) == 1
    assert "lies in the folder that is read" in capsys.readouterr().err and not inside.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file,class\nred/00.png,a\n", "the header is ['file', 'class']; expected image,label or image,label,split"),
        ("", "the header is []; expected image,label or image,label,split"),
        ("image,label\n", "has a header and no rows"),
        ("image,label\nred/00.png\n", "row 2: has more or fewer cells than the header"),
        ("image,label\nred/00.png,a,b\n", "row 2: has more or fewer cells than the header"),
        ("image,label\n,a\n", "row 2: no image; name its file"),
        ("image,label\nred/00.png,\n", "1 of 1 rows have no label: row 2 ('red/00.png', ''); name their classes"),
        ("image,label,split\nred/00.png,a,dev\n", "row 2 ('red/00.png'): split 'dev' is unknown"),
        (
            "image,label\nred/00.png,a\nred/01.png,b\nred/../red/00.png,a\n",
            "row 4 ('red/../red/00.png') is the same file as",
        ),
        ('image,label\nred/00.png,"a\n', "is not a CSV file in UTF-8"),
        ('image,label\nred/00.png,"a, b"\nred/01.png,c\n', "class name 'a, b' holds a comma"),
    ],
)
def test_bad_csv_files(source, capsys, text, sentence):
    fill(source, {"red": 2})
    assert sentence in fails(csv(source, text), capsys)


def test_a_csv_in_another_encoding(source, capsys):
    path = source / "labels.csv"
    path.write_bytes("image,label\nä.png,a\n".encode("latin-1"))
    assert "is not a CSV file in UTF-8" in fails(path, capsys)
    path.write_text("image,label\na.png,x;y;x\n")
    assert "row 2 ('a.png'): names a class twice" in fails(path, capsys, "--multi-label")


def test_shares_are_right_in_every_class():
    rows = [Row(str(i), Path(str(i)), (("a", "b", "b", "b")[i % 4],), None) for i in range(400)]
    split = assign_splits(rows, 0.1, 0.2, 0)
    assert [row.name for row in split] == [row.name for row in rows]
    counts = Counter((row.labels[0], row.split) for row in split)
    assert counts == {
        ("a", "train"): 70, ("a", "val"): 10, ("a", "test"): 20,
        ("b", "train"): 210, ("b", "val"): 30, ("b", "test"): 60,
    }  # fmt: skip
    for val, test in ((-0.1, 0.1), (0.1, 1.0), (0.6, 0.5)):
        with pytest.raises(VITaskError, match="leave nothing to train on; their sum must be below 1"):
            assign_splits(rows, val, test, 0)
