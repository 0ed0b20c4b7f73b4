"""Images as this project sees them: readable, upright, 8-bit RGB; and a hash of what is in the picture.

One rule for every way a picture comes in, and the same for TSM and VLM: `to_rgb`.
"""

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vitask_plugin.data.deep import DeepPixels, is_deep, read
from vitask_plugin.data.dicom import is_dicom, picture
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
_COLOURS = ("RGB", "RGBA", "CMYK")
_said: set[str] = set()  # what this process has said once


def to_rgb(
    image: Image.Image, window: Window | None = None, name: str | Path = "in memory", *, of_8_bits: bool = False
) -> Image.Image:
    """The picture as 8-bit RGB and nothing beside it, turned as its EXIF tag says; what is transparent is black.

    Of a picture in colour that was loaded from bytes, PIL has forgotten whether it was deep: its upper 8 bits are seen.

    Args:
        window: of the data set, for deep pixels (`deep.is_deep`).
        name: names the picture in the error.
        of_8_bits: the window is for 8-bit pictures too, which stay what they are otherwise.

    Raises:
        VITaskError: deep pixels without a window: which of their values are black and white, no image tells by itself.
    """
    with _before_loading(image) as file:
        if is_deep(file):
            return _from_deep(file, window, name)
    image.load()  # which turns a TIFF
    image = ImageOps.exif_transpose(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    if of_8_bits and window is not None:
        table = window.apply(np.arange(256)).tolist() * 3
        image = image.point(table + list(range(256)) if transparent else table)
    if transparent:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image).convert("RGB")
    image.info.clear()  # what PIL would write: colour profiles, comments, ...
    return image


def refuse_deep(image: Image.Image, name: str | Path) -> None:
    """Refuses deep pixels of a file that is opened and not loaded yet.

    Raises:
        VITaskError: as `to_rgb` does without a window.
    """
    if is_deep(image):
        raise _without_window(read(image, name), name)


def _from_deep(image: Image.Image, window: Window | None, name: str | Path) -> Image.Image:
    pixels = read(image, name)
    if window is None and pixels.own is None:
        raise _without_window(pixels, name)
    picture = pixels.to_8_bits(window)
    picture.getexif()[ExifTags.Base.Orientation] = pixels.orientation
    return ImageOps.exif_transpose(picture).convert("RGB")


@contextlib.contextmanager
def _before_loading(image: Image.Image) -> Iterator[Image.Image]:
    """A loaded picture in colour as its file has it, if that is at hand: PIL forgets how many bits a colour had."""
    path = getattr(image, "filename", "")
    could_be_deep = image.format in ("PNG", "TIFF", "PPM", "SGI", "JPEG2000") and image.mode in _COLOURS
    if not could_be_deep or image.tile or not os.path.isfile(path):
        yield image
        return
    with Image.open(path) as again:
        if frame := image.tell():
            again.seek(frame)
        yield again


def frames(image: Image.Image) -> int:
    """Pages or frames of a file; previews beside a camera's JPEG (MPO) do not count."""
    several = image.format != "MPO" and getattr(image, "is_animated", False)
    return image.n_frames if several else 1


def _without_window(pixels: DeepPixels, name: str | Path) -> VITaskError:
    finite = pixels.values[np.isfinite(pixels.values)]
    found = f"{finite.min():g} to {finite.max():g}" if len(finite) else "none of them finite"
    return VITaskError(
        f"image {str(name)!r} holds {pixels.values.dtype.name} values ({found}; mode {pixels.mode}), and no window "
        "says which are black and white; write the data set with `vitask data folder`, which reads the window from its "
        "training images or takes --window LOW HIGH, or convert the images to 8 bits, all in the same way"
    )


@contextlib.contextmanager
def truncated_refused() -> Iterator[None]:
    """lmms-eval lets PIL fill up truncated images for the whole process; here they are refused all the same."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def opened(source: bytes | Path, name: str | Path, frame: int = 0, *, dicom: bool = False) -> Iterator[Image.Image]:
    """A file's picture, not loaded yet; what goes wrong in the block is an error of this image.

    Args:
        source: the bytes of the file, or where it is.
        name: names it in the error.
        frame: which page or frame, from 0.
        dicom: whether DICOM files are read too: not those that a data file names, which other programs read as well.

    Raises:
        VITaskError: not a whole image of a format PIL knows, or without this frame.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with truncated_refused(), picture(source, name) if dicom and is_dicom(source) else Image.open(file) as image:
            if frame:
                _seek(image, frame, name)
            yield image
    except VITaskError:
        raise
    except UnidentifiedImageError:
        raise VITaskError(f"image {str(name)!r} cannot be read ({_unknown(file)}") from None
    except Image.DecompressionBombError as error:
        raise VITaskError(f"image {str(name)!r} is too large to open safely ({error}); scale it down") from None
    except Exception as error:  # PIL raises what it likes on damaged files (OSError, SyntaxError, ValueError, ...)
        raise VITaskError(f"image {str(name)!r} cannot be read ({reason(error)}); replace or remove it") from None


def _unknown(file: io.BytesIO | Path) -> str:
    """What a file is that PIL does not know, and what to do."""
    data = file.getvalue() if isinstance(file, io.BytesIO) else read_bytes(file)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF that is damaged, or whose kind of pixels Pillow does not know); convert it to PNG, or remove it"
    if data[128:132] == b"DICM":
        return "a DICOM file, which `vitask data folder` and `vitask predict` read); write the data set with the former"
    return "not an image of a known format); replace or remove it"


def reason(error: BaseException) -> str:
    """Why PIL could not read a file, in its words where it has some."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _seek(image: Image.Image, frame: int, name: str | Path) -> None:
    if not 0 <= frame < frames(image):
        raise VITaskError(f"image {str(name)!r} has {frames(image)} frame(s), so no --frame {frame} (the first is 0)")
    image.seek(frame)


def decode(data: bytes, name: str | Path) -> Image.Image:
    """The RGB picture in the bytes of a file, the first one of several (which is logged once).

    Args:
        name: names the file in the error.

    Raises:
        VITaskError: if the bytes are not a whole image of a format PIL knows, or deep (see `to_rgb`).
    """
    with opened(data, name) as image:
        if frames(image) > 1:
            say_once(first_of_several(name, image))
        return to_rgb(image, name=name)


def first_of_several(name: str | Path, image: Image.Image) -> str:
    """What is said of a file of several pictures, of which nobody has chosen one."""
    return (
        f"image {str(name)!r} has {frames(image)} pages or frames, of which the first is seen; so it is with "
        "any others like it"
    )


def say_once(line: str, what: str = "frames") -> None:
    """A warning, the first of its kind in this process alone."""
    if what not in _said:
        _said.add(what)
        logger.warning("%s", line)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        VITaskError: if the file is missing or not readable.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise VITaskError(f"image {str(path)!r} cannot be read ({error.strerror}); check the path") from None


def pixel_hash(image: Image.Image) -> str:
    """Hex SHA-256 of an RGB picture's size and pixels: the same for two files of one picture, whatever their format."""
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
