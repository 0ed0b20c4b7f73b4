"""Pixels of more than 8 bits: all bits of 16-bit colours, pictures the right way round, a sentence for what is lost."""

import io
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from pictures import png16
from PIL import Image, ImageFile

from vitask_plugin.cli import main
from vitask_plugin.data.deep import is_deep, read
from vitask_plugin.data.images import decode, opened, to_rgb
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError

SIDES = (37, 50)
FULL = Window(0, 65535)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    options.setdefault("photometric", "rgb")
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def noise(colours: int, top: int = 65536) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, (*SIDES, colours), dtype=np.uint16)


WAYS = {
    "PNG": png16,
    "interlaced PNG": lambda values: png16(values, interlaced=True),
    "TIFF": tiff,
    "big-endian TIFF": lambda values: tiff(values, byteorder=">"),
    "deflated TIFF": lambda values: tiff(values, compression="zlib"),
    "deflated big-endian TIFF": lambda values: tiff(values, compression="zlib", byteorder=">"),
    "tiled TIFF": lambda values: tiff(values, tile=(16, 16)),
    "PPM": lambda values: b"P6 %d %d 65535\n" % SIDES[::-1] + values.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_16_bits_of_a_colour_are_read(way):
    values = noise(3)
    with opened(WAYS[way](values), way) as image:
        assert is_deep(image)
        assert np.array_equal(read(image, way).values, values)


RAMP = np.arange(4096).reshape(64, 64)


def coloured(number: int) -> np.ndarray:
    """12 bits in [64, 64, 3], of another strength in each channel."""
    return np.stack([np.roll(RAMP // one, number, axis=0) for one in (1, 2, 4)], axis=-1).astype(np.uint16)


@pytest.mark.parametrize(("suffix", "write"), [("png", png16), ("tif", tiff)])
def test_12_bits_in_a_16_bit_colour_keep_their_levels(suffix, write, tmp_path, caplog):
    """The upper 8 bits held 16 levels of the 4,096."""
    before, expected = [], set()
    for number in range(8):
        path = tmp_path / "scans" / "ab"[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write(coloured(number)))
        with Image.open(path) as image:
            before.append(len(np.unique(np.asarray(image)[..., 0])))
    words = ["--out", str(tmp_path / "out"), "--modality", "test", "--val", ".25", "--test", ".25"]
    assert main(["data", "folder", str(tmp_path / "scans"), *words]) == 0
    assert "8 of 8 images hold more than 8 bits; the window" in caplog.text
    low, high = json.loads((tmp_path / "out/labels.json").read_text())["pixels"]["window"]
    assert [low, high] == pytest.approx(np.percentile(coloured(0), (0.5, 99.5)), abs=15)  # of all colours together
    for number in range(8):
        values = ((coloured(number) - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)
        expected.add(values.tobytes())
    written = [np.asarray(Image.open(path)) for path in (tmp_path / "out/images").rglob("*.png")]
    assert {one.tobytes() for one in written} == expected  # one window for all colours, so that they stay
    assert before == [16] * 8 and [len(np.unique(one[..., 0])) for one in written] == [256] * 8


def windowed(values: np.ndarray) -> np.ndarray:
    return np.round(values / 257)


def test_what_is_transparent_is_black():
    values = noise(4)
    alpha = values[..., 3:] / 65535
    for data in (png16(values), tiff(values, extrasamples=["unassalpha"])):
        with opened(data, "") as image:
            assert np.array_equal(np.asarray(to_rgb(image, FULL)), np.round(windowed(values[..., :3]) * alpha))
    with opened(png16(values[..., 2:]), "") as image:  # grey
        seen, grey = np.asarray(to_rgb(image, FULL)), np.round(windowed(values[..., 2]) * alpha[..., 0])
    assert all(np.array_equal(seen[..., channel], grey) for channel in range(3))
    key = tuple(int(one) for one in values[5, 6, :3])
    with opened(png16(values[..., :3], key=key), "") as image:
        expected = windowed(values[..., :3])
        expected[5, 6] = 0
        assert np.array_equal(np.asarray(to_rgb(image, FULL)), expected)


def test_colours_multiplied_by_alpha_are_divided_before_the_window():
    alpha = noise(1) // 2 + 32768
    stored = np.concatenate([noise(3) * (alpha / 65535), alpha], axis=-1).round().astype(np.uint16)
    with opened(tiff(stored, extrasamples=["assocalpha"]), "") as image:
        values = read(image, "").values.astype(int)
    assert np.abs(values - noise(3)).max() <= 1


def test_cmyk_of_16_bits_is_as_that_of_8_bits():
    values = noise(4)
    shallow = Image.fromarray((values >> 8).astype(np.uint8), "CMYK")
    for data in (tiff(values, photometric="separated"), tiff(values, photometric="separated", byteorder=">")):
        with opened(data, "") as image:
            seen = np.asarray(to_rgb(image, FULL)).astype(int)
        assert np.abs(seen - np.asarray(shallow.convert("RGB"))).max() <= 2


def test_a_turned_picture_and_another_page():
    values = noise(3)
    with opened(tiff(values, extratags=[(274, 3, 1, 6, True)]), "") as image:
        assert np.array_equal(np.asarray(to_rgb(image, FULL)), windowed(np.rot90(values, -1)))
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in (values, values[::-1]):
            writer.write(page, photometric="rgb")
    with opened(file.getvalue(), "", 1) as image:
        assert np.array_equal(np.asarray(to_rgb(image, FULL)), windowed(values[::-1]))


def test_white_is_zero_is_no_negative_whatever_its_depth():
    """Deep ones came out as negatives: PIL turns round those of 8 bits alone."""
    grey = noise(1, 256)[..., 0]
    files = [
        tiff(grey.astype(np.uint8), photometric="miniswhite"),
        tiff(grey * 257, photometric="miniswhite"),
        tiff(grey.astype(np.float32) * 257, photometric="miniswhite"),
        tiff((255 - grey) * 257, photometric="minisblack"),
        tiff((255 - grey) * 257, photometric="minisblack", byteorder=">"),
    ]
    for data in files:
        with opened(data, "") as image:
            assert np.array_equal(np.asarray(to_rgb(image, FULL))[..., 0], 255 - grey)


def test_nan_is_black_in_a_negative_too():
    with opened(tiff(np.array([[np.nan, 0, 1]], np.float32), photometric="miniswhite"), "") as image:
        assert np.asarray(to_rgb(image, Window(0, 1)))[0, :, 0].tolist() == [0, 255, 0]


def test_unsigned_numbers_of_32_bits_do_not_wrap():
    with opened(tiff(np.array([[0, 1 << 31, 4294967295]], np.uint32), photometric="minisblack"), "") as image:
        assert read(image, "").values.tolist() == [[0, 1 << 31, 4294967295]]


def deep_jpeg2000() -> bytes:
    """Of 8 bits, but its header says 16: enough for a look."""
    file = io.BytesIO()
    Image.fromarray(noise(3, 256).astype(np.uint8)).save(file, "JPEG2000")
    before, marker, size = file.getvalue().partition(b"\xff\x4f\xff\x51")
    return before + marker + size[:38] + b"\x0f\1\1" * 3 + size[47:]


LOST = {
    "colour by colour": lambda: tiff(np.moveaxis(noise(3), 2, 0), planarconfig="separate"),
    "colour by colour, deflated": lambda: tiff(
        np.moveaxis(noise(3), 2, 0), planarconfig="separate", compression="zlib"
    ),
    "PPM in digits": lambda: b"P3 2 1 4095\n1 2 3 4000 5 6\n",
    "JPEG 2000": deep_jpeg2000,
}


@pytest.mark.parametrize("kind", LOST)
def test_bits_that_pil_does_not_tell_are_refused(kind):
    """PIL takes a colour's bytes for another's, or the upper 8 bits."""
    with pytest.raises(VITaskError, match=r"^image 'scan' holds more than 8 bits per colour in a way that cannot be"):
        decode(LOST[kind](), "scan")


def test_what_pil_does_not_know_is_named():
    big_endian = tiff(noise(1)[..., 0], photometric="miniswhite", byteorder=">")
    with pytest.raises(VITaskError, match=r"a TIFF that is damaged, or whose kind of pixels .*; convert it to PNG"):
        decode(big_endian, "scan")
    with pytest.raises(
        VITaskError, match=r"'scan' cannot be read \(a DICOM file, .*; write the data set with the former"
    ):
        decode(bytes(128) + b"DICM" + bytes(99), "scan")


def test_8_bit_files_are_not_deep(tmp_path):
    picture = Image.fromarray(noise(3, 256).astype(np.uint8))
    for kind in ("PNG", "TIFF", "PPM", "BMP", "TGA", "JPEG", "WEBP", "SGI", "JPEG2000"):
        picture.save(tmp_path / "image", kind)
        with Image.open(tmp_path / "image") as image:
            assert not is_deep(image), kind
            image.load()
            assert not is_deep(image) and to_rgb(image).size == SIDES[::-1], kind
    header = struct.pack(
        "<2sIIIIiiHHIIIIII3I", b"BM", 74, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F
    )
    with opened(header + struct.pack("<2H", 0xF800, 0x1F), "16 bits a pixel") as image:
        assert not is_deep(image)
        assert np.asarray(to_rgb(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_8_bits_of_every_format_that_pillow_writes_are_read(tmp_path):
    Image.init()
    read_again = set()
    for kind, mode in itertools.product(sorted(Image.SAVE), ("1", "L", "P", "RGB", "RGBA")):
        try:
            Image.fromarray(noise(3, 256).astype(np.uint8)).convert(mode).save(tmp_path / "image", kind)
            with Image.open(tmp_path / "image") as image:
                image.load()
                if image.mode == "F":
                    continue  # SPIDER keeps floating point
        except (OSError, ValueError, KeyError, ImportError, RuntimeError):
            continue  # not a mode or format of it, or of what is installed beside it
        with Image.open(tmp_path / "image") as image:
            assert not is_deep(image), (kind, mode)
        assert min(decode((tmp_path / "image").read_bytes(), kind).size) >= 16, (kind, mode)
        read_again.add(kind)
    assert {"QOI", "XBM", "MSP", "PNG", "TIFF", "GIF", "PCX", "DDS"} & set(Image.SAVE) <= read_again


def test_a_tile_of_which_pillow_needs_no_more_to_know():
    """PCD, FLI and run-length MSP, which Pillow does not write."""
    image = Image.new("RGB", (2, 2))
    image.tile = [ImageFile._Tile("pcd", (0, 0, 2, 2), 0, None)]
    assert not is_deep(image)


@pytest.mark.parametrize("way", ["PNG", "TIFF"])
def test_a_file_that_is_loaded_already_is_refused_too(way, tmp_path):
    """As the data sets of lmms-eval are; PIL has forgotten its lower bits then."""
    Path(tmp_path / "scan").write_bytes(WAYS[way](noise(3, 4096)))
    image = Image.open(tmp_path / "scan")
    image.load()
    with pytest.raises(VITaskError, match=r"holds uint16 values \(0 to 4095; mode RGB, 16 bits per colour\), and no"):
        to_rgb(image)
