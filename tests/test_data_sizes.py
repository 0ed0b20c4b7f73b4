"""Sizes of a task's images, from headers: what is recorded in training and compared later."""

import json

from pictures import write_task
from PIL import Image
from small_tsm import make

from vitask_plugin.cli import main
from vitask_plugin.data.sizes import differing, measured, sizes_of, spread


def test_sizes_are_those_of_upright_images(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, options in {"a.png": {}, "b.jpg": {"exif": turned}, "c.tif": {"exif": turned}}.items():
        Image.new("L", (40, 30) if name == "a.png" else (30, 40)).save(tmp_path / name, **options)
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = [("one", tmp_path / name) for name in ("a.png", "b.jpg", "c.tif", "broken.png")]
    Image.new("L", (50, 20)).save(tmp_path / "d.png")
    files.append(("two", (tmp_path / "d.png").read_bytes()))
    assert measured(files) == {
        "one": {"width": [40, 40], "height": [30, 30], "images": 3},
        "two": {"width": [50, 50], "height": [20, 20], "images": 1},
    }
    assert measured([*files, ("one", tmp_path / "d.png")])["one"] == {
        "width": [40, 50],
        "height": [20, 30],
        "images": 4,
    }


def test_only_single_sizes_are_compared():
    def of(width: list[int], height: list[int]) -> dict:
        return {"task": {"width": width, "height": height, "images": 9}}

    small, large, various = of([28, 28], [28, 28]), of([224, 224], [224, 224]), of([28, 224], [28, 28])
    assert differing(large, small) == [("task", (224, 224), (28, 28))]
    assert differing(small, small) == differing(various, small) == differing(small, various) == []
    assert differing(None, small) == differing({"other": large["task"]}, small) == []


def test_a_spread_keeps_to_its_number():
    assert spread(3, 5) == [0, 1, 2] and spread(10, 4) == [0, 2, 5, 7] and spread(10, 0) == []


def test_features_of_other_images_than_the_tsms_are_refused(tmp_path, capsys):
    path = write_task(tmp_path, "one", ["red", "green", "blue"], 3)
    assert sizes_of(json.loads(path.read_text()), tmp_path / "images")["one"]["width"] == [32, 32]
    sizes = {"one": {"width": [224, 224], "height": [224, 224], "images": 9}}
    make(images=sizes).save(tmp_path / "tsm")
    words = [
        "--tsm",
        tmp_path / "tsm",
        "--data",
        path,
        "--image-folder",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
    ]
    command = ["tsm", "extract", *map(str, words)]
    assert main(command) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was trained on 224x224 images of task 'one', those of" in sentence and "are 32x32" in sentence
    assert "--any-image-size" in sentence and not (tmp_path / "out").exists()
    assert main([*command, "--any-image-size"]) == 0
    make().save(tmp_path / "tsm")  # an older one, or an imported one: nothing to compare
    assert main(command) == 0
