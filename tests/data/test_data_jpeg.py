"""JPEGs that are copied: the pixels of the file, and nothing of what is written beside them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from vitask_plugin.cli import main
from vitask_plugin.data.jpeg import picture_alone

SECRET = b"Jane Doe"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
PICTURES = {
    "rgb": (NOISE, {}),
    "grey": (NOISE.convert("L"), {}),
    "progressive": (NOISE, {"progressive": True}),
    "with restarts": (NOISE, {"restart_marker_blocks": 2}),
    "rgb as stored": (NOISE, {"keep_rgb": True}),
    "cmyk": (NOISE.convert("CMYK"), {}),
}


def plain(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def with_notes(image: Image.Image, **options) -> bytes:
    """A JPEG with a place, a name, a date, a comment, a colour profile, a preview, and a second file behind it."""
    exif = Image.Exif()
    exif[0x013B], exif[0x0132] = SECRET.decode(), "2020:01:01 00:00:00"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 0.0)})
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + SECRET
    data = plain(image, exif=exif, comment=SECRET, icc_profile=profile, **options)
    segments = [(0xE0, b"JFXX\0\x13" + SECRET), (0xE2, b"MPX\0" + SECRET), (0xED, b"Photoshop 3.0\0" + SECRET)]
    more = b"".join(bytes((0xFF, 0xFF, kind)) + (len(one) + 2).to_bytes(2, "big") + one for kind, one in segments)
    return data[:2] + more + data[2:] + SECRET + data


@pytest.mark.parametrize("kind", PICTURES)
def test_the_pixels_stay_and_nothing_else(kind):
    image, options = PICTURES[kind]
    data = with_notes(image, **options)
    alone = picture_alone(data)
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(alone))
    assert before.mode == after.mode and np.array_equal(np.asarray(before), np.asarray(after))
    assert len(before.getexif()) >= 2 and SECRET in data
    assert not after.getexif() and "comment" not in after.info and "icc_profile" not in after.info
    assert SECRET not in alone and b"2020" not in alone and b"Exif" not in alone
    assert alone == plain(image, **options) == picture_alone(alone)


def test_a_preview_in_the_header_is_left_out():
    data = plain(NOISE)
    assert data[2:4] == b"\xff\xe0" and data[4:6] == b"\0\x10"
    preview = bytes((2, 1)) + SECRET[:6]
    data = data[:4] + (16 + 6).to_bytes(2, "big") + data[6:18] + preview + data[20:]
    assert picture_alone(data) == plain(NOISE)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"II*\0", plain(NOISE)[:-2]])
def test_what_is_laid_out_otherwise_is_not_copied(data):
    assert picture_alone(data) is None


def test_copied_files_name_no_patient(tmp_path: Path):
    for number in range(8):
        path = tmp_path / "scans" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(with_notes(NOISE.rotate(number)))
    words = ["--out", str(tmp_path / "out"), "--modality", "test", "--val", ".25", "--test", ".25"]
    assert main(["data", "folder", str(tmp_path / "scans"), *words]) == 0
    written = list((tmp_path / "out/images").rglob("*.jpg"))
    assert len(written) == 8
    pixels = {np.asarray(Image.open(path)).tobytes() for path in written}
    assert pixels == {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "scans").rglob("*.jpg")}
    assert not any(SECRET in path.read_bytes() or Image.open(path).getexif() for path in written)
