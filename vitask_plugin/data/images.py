"""Images as this project sees them: readable, upright, 8-bit RGB; and a hash of what is in the picture."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vitask_plugin.errors import VITaskError

# Deep grey pictures (16-bit PNG or TIFF): PIL's own conversion to RGB would cut them off at 255.
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I")


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, turned as its EXIF tag says; 16-bit grey is scaled, what is transparent is black."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray((deep.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


@contextlib.contextmanager
def _truncated_refused() -> Iterator[None]:
    """lmms-eval lets PIL fill up truncated images for the whole process; here they are refused all the same."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode(data: bytes, name: str | Path) -> Image.Image:
    """The RGB picture in the bytes of a file; `name` names the file in the error.

    Raises:
        VITaskError: if the bytes are not a whole image of a format PIL knows.
    """
    try:
        with _truncated_refused(), Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise VITaskError(f"image {str(name)!r} is too large to open safely ({error}); scale it down") from None
    except Exception as error:  # PIL raises what it likes on damaged files (OSError, SyntaxError, ValueError, ...)
        known = not isinstance(error, UnidentifiedImageError)
        reason = (str(error) or type(error).__name__) if known else "not an image of a known format"
        raise VITaskError(f"image {str(name)!r} cannot be read ({reason}); replace or remove it") from None


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
