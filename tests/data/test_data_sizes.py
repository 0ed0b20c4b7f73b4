"""Sizes of a task's images, from headers."""

from PIL import Image

from vitask_plugin.data.sizes import measured, spread


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


def test_a_spread_keeps_to_its_number():
    assert spread(3, 5) == [0, 1, 2] and spread(10, 4) == [0, 2, 5, 7] and spread(10, 0) == []
