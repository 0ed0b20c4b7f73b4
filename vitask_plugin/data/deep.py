"""Pixels of more than 8 bits, grey or in colour, as their file holds them.

Of 16 bits per colour PIL decodes the upper 8 alone. Told that a value's two bytes lie the other way round, it decodes
the lower 8: so two readings of a file give all of them.
"""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError

_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF
_SIGNED, _WHITE_IS_ZERO, _SEPARATE = 2, 0, 2  # their values
_GREY = ("1", "L", "I", "F")
_DEEP_COLOUR = re.compile(r"([A-Za-z]+);16([BLN])")  # PIL's names of how bytes lie: BGR;16 is 16 bits a pixel
_OTHER_WAY_ROUND = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True)
class DeepPixels:
    """What a file holds.

    Attributes:
        mode: PIL's mode, and the bits per colour where PIL keeps fewer.
        values: [H, W] or [H, W, 3], numbers of any type.
        alpha: [H, W] from 0, transparent, to 1; None = nothing is transparent.
        negative: low values are bright.
        orientation: what is left to be turned, as in EXIF.
        own: how the file itself says that the values are to be seen, as uint8 of their shape; None: it does not.
    """

    mode: str
    values: np.ndarray
    alpha: np.ndarray | None = None
    negative: bool = False
    orientation: int = 1
    own: Callable[[np.ndarray], np.ndarray] | None = None

    def seen(self) -> np.ndarray:
        """The values [N] or [N, 3] of what is not transparent."""
        return self.values if self.alpha is None else self.values[self.alpha > 0]

    def to_8_bits(self, window: Window | None) -> Image.Image:
        """As grey or RGB, not turned yet; what is transparent is black. Without a window as the file itself says."""
        if window is not None:
            pixels = window.apply(self.values, negative=self.negative)
        else:
            pixels = 255 - self.own(self.values) if self.negative else self.own(self.values)
        if self.alpha is not None:
            alpha = self.alpha.reshape(*self.alpha.shape, *[1] * (pixels.ndim - 2))
            pixels = (pixels * alpha).round().astype(np.uint8)
        return Image.fromarray(pixels)


def is_deep(image: Image.Image) -> bool:
    """Whether a colour of a file holds more than 0 to 255: 16 or 32 bits, floating point, or signed bytes.

    A PNG in colour tells so only as long as it is not loaded.
    """
    return _is_deep_grey(image) or _bits_per_colour(image) > 8


def is_windowed(image: Image.Image) -> bool:
    """Whether an opened file itself says how its deep pixels are to be seen, as DICOM files do."""
    return getattr(image, "windowed", False)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;") or _has_signed_bytes(image)


def _has_signed_bytes(image: Image.Image) -> bool:
    return image.mode == "L" and _SIGNED in tuple(_tags(image).get(_SAMPLE_FORMAT, ()))


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})  # a TIFF's


def _bits_per_colour(image: Image.Image) -> int:
    if image.format == "JPEG2000" and image.mode not in _GREY:
        return _bits_of_jpeg2000(image)
    for tile in getattr(image, "tile", ()):
        codec, arguments = tile.codec_name, tile.args
        if codec in ("ppm", "ppm_plain") and image.mode == "RGB" and arguments[1] > 255:
            return 16
        if codec == "SGI16" or (codec == "sgi_rle" and arguments[2] == 2) or _deep_layout(arguments):
            return 16
    return 8 if image.mode in _GREY else max(_tags(image).get(_BITS, (8,)))


def _deep_layout(arguments: Any) -> re.Match | None:
    layout = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""  # None where PIL needs none
    return _DEEP_COLOUR.fullmatch(str(layout))


def _bits_of_jpeg2000(image: Image.Image) -> int:
    if image.fp is None:
        return 8
    place = image.fp.tell()
    image.fp.seek(0)
    _, found, size = image.fp.read(1 << 16).partition(b"\xff\x4f\xff\x51")  # start of codestream, marker of sizes
    image.fp.seek(place)
    colours = size[38 : 38 + 3 * int.from_bytes(size[36:38], "big") : 3] if found else b""
    return max(((colour & 0x7F) + 1 for colour in colours), default=8)


def read(image: Image.Image, name: str | Path) -> DeepPixels:
    """The pixels of an opened file for which `is_deep`; it must not be loaded yet if it is in colour.

    Args:
        name: names the file in the error.

    Raises:
        VITaskError: more than 8 bits per colour, which PIL does not tell.
    """
    if hasattr(image, "deep_pixels"):  # DICOM
        return image.deep_pixels()
    if not _is_deep_grey(image):
        return _in_colour(image, name)
    image.load()
    values, key = np.asarray(image), image.info.get("transparency")
    if _has_signed_bytes(image):
        values = values.view(np.int8)
    elif image.mode == "I" and _tags(image).get(_BITS) == (32,) and _SIGNED not in _tags(image).get(_SAMPLE_FORMAT, ()):
        values = values.view(np.uint32)
    return DeepPixels(
        image.mode,
        values,
        values != key if isinstance(key, int) else None,
        # PIL turns 8-bit ones round, and takes what says nothing for one.
        negative=image.format == "TIFF" and _tags(image).get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO,
        orientation=image.getexif().get(ExifTags.Base.Orientation, 1),
    )


def _in_colour(image: Image.Image, name: str | Path) -> DeepPixels:
    layouts = {_layout(image, tile) for tile in image.tile}
    if len(layouts) != 1 or None in layouts:
        raise VITaskError(
            f"image {str(name)!r} holds more than 8 bits per colour in a way that cannot be read here ({image.format}, "
            f"mode {image.mode}); convert it to PNG with 16 bits per colour, or all images to 8 bits in the same way"
        )
    kind, order = layouts.pop()
    if kind == "LA":
        both = _decoded(image, "RGBA")  # PIL knows one order for it
        upper, lower = both[..., ::2], both[..., 1::2]
    else:
        stored = "RGBA" if kind == "RGBa" else kind  # PIL would divide by alpha, of each half by itself
        upper, lower = (_decoded(image, f"{stored};16{one}") for one in (order, _OTHER_WAY_ROUND[order]))
    values, alpha = upper.astype(np.uint16) << 8 | lower, None
    if kind in ("LA", "RGBA", "RGBa"):
        values, alpha = values[..., :-1], values[..., -1] / 65535
    if kind == "RGBa":
        values = (values / np.where(alpha > 0, alpha, 1)[..., None]).clip(0, 65535).round().astype(np.uint16)
    if kind == "CMYK":
        light = 65535.0 - values
        values = (light[..., :3] * light[..., 3:] / 65535).round().astype(np.uint16)
    if isinstance(key := image.info.get("transparency"), tuple):
        alpha = (values != np.array(key)).any(axis=-1)
    return DeepPixels(f"{image.mode}, 16 bits per colour", values[..., 0] if kind == "LA" else values, alpha)


def _layout(image: Image.Image, tile: Any) -> tuple[str, str] | None:
    """(what a pixel holds, order of the two bytes) in a part of a file, None where PIL cannot be asked for both."""
    if tile.codec_name == "ppm":
        return image.mode, "B"
    if _tags(image).get(_PLANES) == _SEPARATE:
        return None  # PIL takes each colour from the bytes of another, or chooses by itself
    found = _deep_layout(tile.args)
    return (found[1], found[2]) if found else None


def _decoded(image: Image.Image, layout: str) -> np.ndarray:
    """The picture [H, W, C] uint8, upright, if its bytes lie as `layout` says."""
    image.fp.seek(0)
    with Image.open(io.BytesIO(image.fp.read()), formats=[image.format]) as again:
        if frame := image.tell():
            again.seek(frame)
        again.tile = [_laid_out(tile, layout) for tile in again.tile]
        again.load()  # which turns a TIFF
        return np.asarray(ImageOps.exif_transpose(again))


def _laid_out(tile: Any, layout: str) -> Any:
    if tile.codec_name == "ppm":
        return tile._replace(codec_name="raw", args=(layout, 0, 1))
    return tile._replace(args=layout if isinstance(tile.args, str) else (layout, *tile.args[1:]))
