"""How the files of a data set become 8-bit pictures: one window, one frame and one largest side for all of them."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vitask_plugin.data import deep
from vitask_plugin.data.images import frames, opened
from vitask_plugin.data.picture_reader import PictureReader
from vitask_plugin.data.telltales import Telltales
from vitask_plugin.data.window import PERCENTILES, ValueRange, Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.options import check_number

logger = logging.getLogger(__name__)


class Pixels:
    """Reads image files, after a look at all of them.

    Args:
        files: (path, name for messages, whether it is a training image, its class names) of every image of the set.
        window: for deep pixels, or where there are none, for all; None = the `PERCENTILES` of the training images with
            deep pixels, of all colours together.
        of_8_bits: whether a window is for 8-bit pictures too; None = where there are no deep ones.
        frame: which page or frame of files that have several, from 0; None = the first, with a warning.
        max_side: a longer side is scaled down to it (Lanczos); None = never.

    Attributes:
        window: used for deep pixels, or for all; None where there is none.

    Raises:
        VITaskError: naming the file, if one is no image, or deep and no training image tells the window.
    """

    def __init__(
        self,
        files: Iterable[tuple[Path, str, bool, Sequence[str]]],
        *,
        window: Window | None = None,
        of_8_bits: bool | None = None,
        frame: int | None = None,
        max_side: int | None = None,
    ) -> None:
        if max_side is not None:
            check_number("--max-side", max_side, 1)
        if frame is not None:
            check_number("--frame", frame, 0)
        self.frame, self.max_side = frame, max_side
        self.deep: list[tuple[Path, str, bool]] = []
        self._windowed = 0  # of the deep ones
        self._several: list[str] = []
        self._scaled = False  # any of them
        self._total = 0
        self._telltales = Telltales()
        for path, name, training, labels in files:
            self._look(path, name, training, labels)
        self.window = self._window(window)
        self._of_8_bits = self.window is not None and (not self.deep if of_8_bits is None else of_8_bits)
        self._reader = PictureReader(self.window, self._of_8_bits, frame or 0, max_side)
        self._say()
        self._telltales.say()

    def _look(self, path: Path, name: str, training: bool, labels: Sequence[str]) -> None:
        """At the header alone."""
        self._total += 1
        try:
            with opened(path, path, self.frame or 0, dicom=True) as image:
                self._telltales.see(image, labels)
                self._scaled |= self.max_side is not None and max(image.size) > self.max_side
                if frames(image) > 1:
                    self._several.append(f"{name} ({frames(image)})")
                if deep.is_deep(image):
                    self.deep.append((path, name, training))
                    self._windowed += deep.is_windowed(image)
        except VITaskError as error:
            raise VITaskError(f"{name}: {error}") from None

    def _window(self, given: Window | None) -> Window | None:
        self._source = "as given"
        if given is not None or self._windowed == len(self.deep):
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
            with opened(path, path, self.frame or 0, dicom=True) as image:
                values.add(deep.read(image, path).seen())
        window = values.window()
        if window is None:
            raise VITaskError(
                f"{self.deep[0][1]}: all {len(training)} training images with deep pixels hold one and the same value "
                "or none that is finite, so there is nothing to see; check the files"
            )
        return window

    def _say(self) -> None:
        if self.deep and self.window is None:
            logger.warning(
                "%d of %d images hold more than 8 bits, and are seen as each of these DICOM files itself says (its VOI "
                "lookup table or window); --window LOW HIGH gives all of them one window",
                *(len(self.deep), self._total),
            )
        elif self.deep:
            others = self._total - len(self.deep)
            mixed = f"; the other {others} are 8-bit and stay as they are, so check that both kinds look alike"
            mixed = mixed if others and not self._of_8_bits else ""
            logger.warning(
                "%d of %d images hold more than 8 bits; the window %s (%s) becomes 0 to 255 in all of them%s",
                *(len(self.deep), self._total, self.window, self._source, mixed),
            )
        elif self.window is not None and not self._of_8_bits:
            logger.warning(
                "none of %d images holds more than 8 bits, so they stay as they are, like any 8-bit ones of the set "
                "whose window was given; check that they look like its other images",
                self._total,
            )
        elif self.window is not None:
            logger.warning(
                "none of %d images holds more than 8 bits; the window %s (%s) becomes 0 to 255 in all of them",
                *(self._total, self.window, self._source),
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
            if len(self.deep) < self._total:
                found["of_8_bits"] = self._of_8_bits
        if self._several:
            found["frame"] = self.frame or 0
        if self._scaled:
            found["max_side"] = self.max_side
        return found

    def read(self, path: Path) -> tuple[Image.Image, bytes | None]:
        """See `PictureReader.read`."""
        return self._reader.read(path)
