"""How the files of a data set become 8-bit pictures: one window, one frame and one largest side for all of them."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from vitask_plugin.data.images import deep_values, frames, has_deep_colour, is_deep, opened, read_bytes, to_rgb
from vitask_plugin.data.telltales import Telltales
from vitask_plugin.data.window import PERCENTILES, ValueRange, Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.options import check_number

logger = logging.getLogger(__name__)


class Pixels:
    """Reads image files, after a look at all of them.

    Args:
        files: (path, name for messages, whether it is a training image, its class names) of every image of the set.
        window: for deep pixels; None = the `PERCENTILES` of the training images.
        frame: which page or frame of files that have several, from 0; None = the first, with a warning.
        max_side: a longer side is scaled down to it (Lanczos); None = never.

    Attributes:
        window: used for deep pixels, None where there are none.

    Raises:
        VITaskError: naming the file, if one is no image, or deep and no training image tells the window.
    """

    def __init__(
        self,
        files: Iterable[tuple[Path, str, bool, Sequence[str]]],
        *,
        window: Window | None = None,
        frame: int | None = None,
        max_side: int | None = None,
    ) -> None:
        if max_side is not None:
            check_number("--max-side", max_side, 1)
        if frame is not None:
            check_number("--frame", frame, 0)
        self.frame, self.max_side = frame, max_side
        self.deep: list[tuple[Path, str, bool]] = []
        self._several: list[str] = []
        self._deep_colour: list[str] = []
        self._total = 0
        self._telltales = Telltales()
        for path, name, training, labels in files:
            self._look(path, name, training, labels)
        self.window = self._window(window)
        self._say()
        self._telltales.say()

    def _look(self, path: Path, name: str, training: bool, labels: Sequence[str]) -> None:
        """At the header alone."""
        self._total += 1
        try:
            with opened(path, path, self.frame or 0) as image:
                self._telltales.see(image, labels)
                if frames(image) > 1:
                    self._several.append(f"{name} ({frames(image)})")
                if is_deep(image):
                    self.deep.append((path, name, training))
                elif has_deep_colour(image):
                    self._deep_colour.append(name)
        except VITaskError as error:
            raise VITaskError(f"{name}: {error}") from None

    def _window(self, given: Window | None) -> Window | None:
        if not self.deep:
            return None
        self._source = "as given"
        if given is not None:
            return given
        self._source = "percentiles {} and {} of the training images, else give --window".format(*PERCENTILES)
        training = [path for path, _, is_training in self.deep if is_training]
        if not training:
            raise VITaskError(
                f"{self.deep[0][1]}: holds deep pixels, and no training image of this set does, which could tell what "
                "is black and white; give --window-from with the labels.json of the training set, or --window LOW HIGH"
            )
        values = ValueRange(len(training))
        for path in training:
            with opened(path, path, self.frame or 0) as image:
                image.load()
                values.add(deep_values(image))
        window = values.window()
        if window is None:
            raise VITaskError(
                f"{self.deep[0][1]}: all {len(training)} training images with deep pixels hold one and the same value "
                "or none that is finite, so there is nothing to see; check the files"
            )
        return window

    def _say(self) -> None:
        if self.deep:
            others = self._total - len(self.deep)
            mixed = f"; the other {others} are 8-bit and stay as they are, so check that both kinds look alike"
            logger.warning(
                "%d of %d images hold more than 8 bits; the window %s (%s) becomes 0 to 255 in all of them%s",
                *(len(self.deep), self._total, self.window, self._source, mixed if others else ""),
            )
        if self._deep_colour:
            logger.warning(
                "%d of %d images hold 16 bits per colour, of which the upper 8 are kept, the first of them %s",
                *(len(self._deep_colour), self._total, self._deep_colour[0]),
            )
        if self._several and self.frame is None:
            logger.warning(
                "%d of %d image files have several pages or frames, of which the first is taken (--frame 0); the first "
                "of them is %s",
                *(len(self._several), self._total, self._several[0]),
            )

    def record(self) -> dict[str, Any]:
        """What was done to the pixels, for `labels.json`; empty where nothing was."""
        found: dict[str, Any] = {}
        if self.window is not None:
            found["window"] = [self.window.low, self.window.high]
        if self._several:
            found["frame"] = self.frame or 0
        if self.max_side is not None:
            found["max_side"] = self.max_side
        return found

    def read(self, path: Path) -> tuple[Image.Image, bytes | None]:
        """An image's RGB picture, and the bytes of its file where it is a JPEG of just this picture.

        Raises:
            VITaskError: if the file is missing or damaged.
        """
        data = read_bytes(path)
        with opened(data, path, self.frame or 0) as image:
            kept = _is_plain_jpeg(image)
            image.load()
            picture = to_rgb(image, self.window, path)
        if self.max_side is not None and max(picture.size) > self.max_side:
            picture.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
            kept = False
        return picture, data if kept else None


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether any reader gives the pixels that `to_rgb` gives: grey or RGB, and not turned by a tag."""
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.mode in ("L", "RGB") and upright
