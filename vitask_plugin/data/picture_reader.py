"""An image file as the picture that a model sees, prepared as its data set was: for training and afterwards alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from vitask_plugin.data.images import first_of_several, frames, opened, read_bytes, say_once, to_rgb
from vitask_plugin.data.jpeg import picture_alone
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError


@dataclass(frozen=True)
class PictureReader:
    """How files become 8-bit RGB pictures.

    Attributes:
        window: for deep pixels; None = what a DICOM file itself says, and other deep ones are refused.
        of_8_bits: whether it is for 8-bit pictures too.
        frame: page or frame of files that have several, from 0; None = the first, with a warning.
        max_side: a longer side is scaled down to it (Lanczos); None = never.
    """

    window: Window | None = None
    of_8_bits: bool = False
    frame: int | None = None
    max_side: int | None = None

    @classmethod
    def of(cls, pixels: Mapping[str, Any] | None) -> "PictureReader":
        """As a data set was written. `pixels`: see `preparation.recorded`; None or empty = nothing was done."""
        pixels = pixels or {}
        window = Window(*pixels["window"]) if "window" in pixels else None
        return cls(window, pixels.get("of_8_bits", False), pixels.get("frame"), pixels.get("max_side"))

    def read(self, path: Path) -> tuple[Image.Image, bytes | None]:
        """An image's RGB picture, and where its file is a JPEG of just this picture, such a file without metadata.

        Raises:
            VITaskError: if the file is missing or damaged, or deep without a window.
        """
        data = read_bytes(path)
        with opened(data, path, self.frame or 0, dicom=True) as image:
            if self.frame is None and frames(image) > 1:
                say_once(first_of_several(path, image))
            kept = _is_plain_jpeg(image) and not self.of_8_bits
            picture = to_rgb(image, self.window, path, of_8_bits=self.of_8_bits)
        kept = kept and not self.is_large(picture)
        return self._scaled(picture), picture_alone(data) if kept else None

    def see(self, picture: Image.Image | np.ndarray, name: str) -> Image.Image:
        """The RGB picture of one that is in memory already; an array is [H, W] or [H, W, 3].

        Raises:
            VITaskError: no picture, or deep without a window.
        """
        try:
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(_plain(np.asarray(picture)))
            seen = to_rgb(image, self.window, name, of_8_bits=self.of_8_bits)
        except VITaskError:
            raise
        except (TypeError, ValueError, OSError, SyntaxError) as error:
            shape = getattr(picture, "shape", None)
            raise VITaskError(
                f"image {name!r} is no picture ({type(picture).__name__} {shape if shape else ''}: {error}); give a "
                "path, a PIL image, or an array [H, W] or [H, W, 3]"
            ) from None
        return self._scaled(seen)

    def is_large(self, image: Image.Image) -> bool:
        return self.max_side is not None and max(image.size) > self.max_side

    def _scaled(self, picture: Image.Image) -> Image.Image:
        if self.is_large(picture):
            picture.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        return picture


def _plain(values: np.ndarray) -> np.ndarray:
    """In a type that PIL has a mode for: [H, W] of other numbers as float32, which holds any of 16 bits."""
    if values.ndim not in (2, 3):
        raise TypeError("it has no height and width")
    if values.ndim == 2 and values.dtype != np.uint8:
        return values.astype(np.float32)
    return values


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether any reader gives the pixels that `to_rgb` gives: grey or RGB, and not turned by a tag."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False  # before a look at EXIF, for which PIL loads a PNG
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
