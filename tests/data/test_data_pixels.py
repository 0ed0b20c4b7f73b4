"""What `vitask data folder` makes of pixels that are not 8-bit, of several frames, of large and rotated images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitask_plugin.cli import main
from vitask_plugin.data.images import to_rgb
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError

RAMP = np.arange(4096, dtype=np.float64).reshape(64, 64) / 4095  # 0 to 1


def write(folder: Path, make, suffix: str, count: int = 4) -> Path:
    """`count` images of each of two classes, `make(number)` apart."""
    for number in range(2 * count):
        path = folder / f"scans/{'ab'[number % 2]}/{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = make(number)
        image.save(path, **({"exif": image.info["exif"]} if "exif" in image.info else {}))
    return folder / "scans"


def converts(source: Path, *flags: str) -> tuple[Path, int]:
    out = source.parent / "out"
    words = ["data", "folder", str(source), "--out", str(out), "--modality", "test", "--val", ".25", "--test", ".25"]
    return out, main([*words, *flags])


def levels(folder: Path) -> list[int]:
    """Grey levels of each written image."""
    found = []
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            found.append(len(np.unique(np.asarray(image.convert("L")))))
    return found


def shifted(values: np.ndarray, number: int) -> np.ndarray:
    return np.roll(values, number, axis=0)


DEEP = {
    "12 bits in a 16-bit PNG": (lambda n: Image.fromarray(shifted((RAMP * 4095).astype(np.uint16), n)), ".png"),
    "16-bit TIFF": (lambda n: Image.fromarray(shifted((RAMP * 65535).astype(np.uint16), n)), ".tif"),
    "float TIFF of 0 to 1": (lambda n: Image.fromarray(shifted(RAMP, n).astype(np.float32)), ".tif"),
    "Hounsfield units": (lambda n: Image.fromarray(shifted(RAMP * 4000 - 1000, n).astype(np.float32)), ".tif"),
    "signed integers": (lambda n: Image.fromarray(shifted(RAMP * 4000 - 1000, n).astype(np.int32)), ".tif"),
    "12 bits in a PGM": (lambda n: Image.fromarray(shifted((RAMP * 4095).astype(np.uint16), n)), ".pgm"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_keep_their_levels(kind, tmp_path, caplog):
    """Before there was a window, a ramp of 12 bits kept 16 levels, and one of 0 to 1 in floating point 1."""
    out, status = converts(write(tmp_path, *DEEP[kind]))
    assert status == 0
    assert levels(out / "images") == [256] * 8
    window = json.loads((out / "labels.json").read_text())["pixels"]["window"]
    low, high = (float(np.percentile(np.asarray(DEEP[kind][0](0)), p)) for p in (0.5, 99.5))
    assert window == pytest.approx([low, high], abs=0.002 * (high - low))
    assert "8 of 8 images hold more than 8 bits; the window" in caplog.text


def test_one_window_for_all_images(tmp_path):
    """Dark images stay dark: no image is stretched by itself."""
    source = write(tmp_path, lambda n: Image.fromarray((RAMP * 500 * (n + 1)).astype(np.uint16)), ".png")
    out, status = converts(source, "--window", "0", "4000")
    assert status == 0
    brightest = sorted(int(np.asarray(Image.open(path)).max()) for path in (out / "images").rglob("*.png"))
    assert brightest == [round(500 * (n + 1) * 255 / 4000) for n in range(8)]
    assert json.loads((out / "labels.json").read_text())["pixels"] == {"window": [0, 4000]}


def test_the_window_is_that_of_the_training_images(tmp_path):
    for split, factor in (("train", 1000), ("test", 60000)):
        for number in range(4):
            path = tmp_path / "scans" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shifted(RAMP * factor, number).astype(np.uint16)).save(path)
    out, status = converts(tmp_path / "scans", "--val", "0")
    assert status == 0
    assert json.loads((out / "labels.json").read_text())["pixels"]["window"][1] == pytest.approx(995, abs=2)


def test_a_set_to_evaluate_on_alone_needs_the_window_of_training(tmp_path, capsys):
    source = write(tmp_path, *DEEP["12 bits in a 16-bit PNG"])
    out, status = converts(source, "--val", "0", "--test", "1")
    assert status == 1 and not out.exists()
    assert "give --window-from with the labels.json of the training set, or --window LOW" in capsys.readouterr().err
    assert converts(source, "--val", "0", "--test", "1", "--window", "0", "4095")[1] == 0
    assert levels(out / "images") == [256] * 8


def test_8_bit_beside_deep_is_said(tmp_path, caplog):
    source = write(tmp_path, lambda n: Image.fromarray(shifted((RAMP * 4095).astype(np.uint16), n)), ".png")
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(source / "a/eight.png")
    _, status = converts(source)
    assert status == 0 and "8 of 9 images hold more than 8 bits" in caplog.text
    assert "the other 1 are 8-bit and stay as they are" in caplog.text


@pytest.mark.parametrize("window", [("5", "5"), ("9", "1"), ("nan", "1"), ("0", "inf")])
def test_an_empty_window_is_refused(window, tmp_path, capsys):
    source = write(tmp_path, *DEEP["16-bit TIFF"])
    assert converts(source, "--window", *window)[1] == 1
    assert "is empty; give two numbers, the lower one first" in capsys.readouterr().err


def test_nan_is_black_and_infinity_is_cut_off():
    values = np.array([[np.nan, -np.inf, np.inf, 0.5]], np.float32)
    seen = np.asarray(to_rgb(Image.fromarray(values), Window(0, 1)))[..., 0]
    assert seen.tolist() == [[0, 0, 255, 128]]


def test_nothing_to_see_is_refused(tmp_path, capsys):
    source = write(tmp_path, lambda n: Image.new("L", (8 + n, 8), 7), ".png")
    out, status = converts(source)
    assert status == 1 and not out.exists()
    assert "all 8 images are of one colour, RGB (7, 7, 7), so there is nothing to see" in capsys.readouterr().err
    source = write(tmp_path, lambda n: Image.fromarray(np.full((8, 8 + n), np.nan, np.float32)), ".tif")
    (source / "a/0.png").unlink()
    assert converts(source)[1] == 1
    assert "hold one and the same value or none that is finite" in capsys.readouterr().err


def test_few_levels_are_said_with_figures(tmp_path, caplog):
    source = write(tmp_path, lambda n: Image.fromarray(shifted((RAMP * 15).astype(np.uint8), n)), ".png")
    Image.new("L", (9, 9), 30).save(source / "a/flat.png")
    assert converts(source)[1] == 0
    assert "8 of 9 images keep fewer than 32 of 256 grey levels (median 16)" in caplog.text
    assert "1 of 9 images are of one colour throughout, the first of them 'a/flat.png'" in caplog.text


def test_a_mask_of_two_colours_is_data(tmp_path, caplog):
    source = write(tmp_path, lambda n: Image.fromarray(shifted(RAMP > 0.5, n)), ".png")
    out, status = converts(source)
    assert status == 0 and levels(out / "images") == [2] * 8
    assert "(median 2)" in caplog.text


def test_frames(tmp_path, caplog, capsys):
    def pages(number: int) -> Image.Image:
        return Image.fromarray(shifted((RAMP * 255).astype(np.uint8), number))

    source = write(tmp_path, pages, ".tif")
    first, second = (Image.fromarray(shifted((RAMP * top).astype(np.uint8), 9)) for top in (255, 100))
    first.save(source / "b/pages.tif", save_all=True, append_images=[second])
    out, status = converts(source)
    assert status == 0 and "1 of 9 image files have several pages or frames" in caplog.text
    assert "'b/pages.tif' (2)" in caplog.text
    assert json.loads((out / "labels.json").read_text())["pixels"] == {"frame": 0}
    assert converts(source, "--frame", "1")[1] == 1
    assert "has 1 frame(s), so no --frame 1 (the first is 0)" in capsys.readouterr().err
    for path in source.rglob("[0-9].tif"):
        image = Image.open(path)
        image.load()
        image.save(path, save_all=True, append_images=[Image.eval(image, lambda value: value // 2)])
    assert converts(source, "--frame", "1")[1] == 0
    brightest = {int(np.asarray(Image.open(path)).max()) for path in (out / "images").rglob("*.png")}
    assert brightest == {127, 100}


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_a_jpeg_stays_one_where_nothing_is_lost(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    files = {
        "rgb": jpeg(Image.fromarray(noise[0])),
        "grey": jpeg(Image.fromarray(noise[1][..., 0])),
        "progressive": jpeg(Image.fromarray(noise[2]), progressive=True),
        "turned": jpeg(Image.fromarray(noise[3]), exif=turned),
        "cmyk": jpeg(Image.fromarray(noise[4]).convert("CMYK")),
        "large": jpeg(Image.fromarray(noise[5]).resize((300, 200))),
        "rgb2": jpeg(Image.fromarray(noise[6])),
        "rgb3": jpeg(Image.fromarray(noise[7])),
    }
    for number, (name, data) in enumerate(files.items()):
        path = tmp_path / "scans" / "ab"[number % 2] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    out, status = converts(tmp_path / "scans", "--max-side", "100")
    assert status == 0
    written = sorted((out / "images").rglob("*.*"))
    kept = {path.read_bytes() for path in written if path.suffix == ".jpg"}
    assert kept == {files[name] for name in ("rgb", "grey", "progressive", "rgb2", "rgb3")}  # nothing to be left out
    sizes = sorted(Image.open(path).size for path in written if path.suffix == ".png")
    assert sizes == [(40, 60), (60, 40), (100, 67)]  # turned, CMYK, large
    named = {
        row["image"] for split in ("train", "val", "test") for row in json.loads((out / f"{split}.json").read_text())
    }
    assert named == {str(path.relative_to(out / "images")) for path in written}
    assert json.loads((out / "labels.json").read_text())["pixels"] == {"max_side": 100}


def test_signed_bytes_are_deep():
    file = io.BytesIO()
    values = np.linspace(-128, 127, 256).astype(np.int8).reshape(16, 16)
    Image.fromarray(values.view(np.uint8)).save(file, "TIFF", tiffinfo={339: 2})
    seen = np.asarray(to_rgb(Image.open(file), Window(-128, 127)))[..., 0]
    assert np.array_equal(seen, values.astype(np.int16) + 128)


def test_deep_pixels_without_a_window_are_refused():
    with pytest.raises(VITaskError, match=r"holds uint16 values \(0 to 4095; mode I;16\), and no window says"):
        to_rgb(Image.fromarray((RAMP * 4095).astype(np.uint16)))


def test_a_window_for_8_bit_images_is_applied_and_recorded(tmp_path, caplog):
    """It was ignored without a word."""
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 16, 4), dtype=np.uint8)
    source = write(tmp_path, lambda n: Image.fromarray(values[n] if n > 3 else values[n, ..., :3]), ".png")
    (source / "b/1.jpg").write_bytes(jpeg(Image.fromarray(values[1, ..., :3])))
    (source / "b/1.png").unlink()
    out, status = converts(source, "--window", "50", "201")
    assert status == 0 and json.loads((out / "labels.json").read_text())["pixels"] == {
        "window": [50, 201],
        "of_8_bits": True,
    }
    assert "none of 8 images holds more than 8 bits; the window 50 to 201 (as given) becomes 0 to 255" in caplog.text
    written = {np.asarray(Image.open(path)).tobytes() for path in (out / "images").rglob("*.*")}
    originals = [np.asarray(Image.open(path)).astype(float) for path in source.rglob("*.*")]
    scaled = [((one[..., :3] - 50) * 255 / 151).clip(0, 255).round() for one in originals]
    for number, one in enumerate(originals):
        if one.shape[-1] == 4:
            black = Image.new("RGBA", (16, 12), (0, 0, 0, 255))
            whole = np.dstack([scaled[number], one[..., 3]]).astype(np.uint8)
            scaled[number] = np.asarray(Image.alpha_composite(black, Image.fromarray(whole)).convert("RGB"))
    assert written == {one.astype(np.uint8).tobytes() for one in scaled}
    assert not list((out / "images").rglob("*.jpg"))


def test_a_window_that_shows_nothing_of_8_bit_images_is_refused(tmp_path, capsys):
    source = write(tmp_path, lambda n: Image.fromarray(shifted((RAMP * 255).astype(np.uint8), n)), ".png")
    assert converts(source, "--window", "300", "4000")[1] == 1
    assert "all 8 images are of one colour, RGB (0, 0, 0)" in capsys.readouterr().err


def test_8_bit_images_beside_deep_ones_stay_as_they_are_under_a_window(tmp_path):
    source = write(tmp_path, lambda n: Image.fromarray(shifted((RAMP * 4095).astype(np.uint16), n)), ".png")
    Image.fromarray((RAMP * 200).astype(np.uint8)).save(source / "a/eight.png")
    out, status = converts(source, "--window", "0", "4095")
    assert status == 0
    assert {int(np.asarray(Image.open(path)).max()) for path in (out / "images").rglob("*.png")} == {200, 255}


def test_nothing_beside_the_picture_is_written(tmp_path):
    """PNGs kept colour profiles, in which devices and their owners are named."""
    source = write(tmp_path, lambda n: Image.fromarray(shifted((RAMP * 255).astype(np.uint8), n)), ".png")
    notes = PngInfo()
    notes.add_text("Patient", "Jane Doe")
    for path in source.rglob("*.png"):
        image = Image.open(path)
        image.load()
        image.save(path, icc_profile=b"Jane Doe's scanner", pnginfo=notes, exif=Image.Exif(), dpi=(72, 72))
    out, status = converts(source)
    assert status == 0
    for path in (out / "images").rglob("*.png"):
        assert b"iCCP" not in path.read_bytes() and b"Jane" not in path.read_bytes()
        assert b"pHYs" not in path.read_bytes()
