"""How many grey levels a data set's pictures keep: with one colour there is nothing to see, with a few not much."""

import logging
import statistics
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
FEW = 32  # grey levels of 256


@dataclass
class Levels:
    """Grey levels of the pictures seen so far."""

    _used: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), bool))
    _counts: list[int] = field(default_factory=list)
    _flat: list[str] = field(default_factory=list)  # names of pictures of one colour

    def see(self, image: Image.Image, name: str) -> None:
        """Counts the levels of an RGB picture: of its richest channel."""
        used = np.array(image.histogram()).reshape(3, 256) > 0
        self._used |= used
        self._counts.append(int(used.sum(axis=1).max()))
        if self._counts[-1] == 1:
            self._flat.append(name)

    def check(self, where: str) -> None:
        """Refuses a set of one colour, and warns where pictures are of one colour or most keep few levels.

        Args:
            where: opens the sentence.

        Raises:
            VITaskError: all pictures are of one and the same colour.
        """
        if not self._counts:
            return
        if (self._used.sum(axis=1) == 1).all():
            colour = tuple(self._used.argmax(axis=1).tolist())
            raise VITaskError(
                f"{where}: all {len(self._counts)} images are of one colour, RGB {colour}, so there is nothing to see; "
                "check the files, and --window if it was given"
            )
        if self._flat:
            logger.warning(
                "%s: %d of %d images are of one colour throughout, the first of them %s",
                *(where, len(self._flat), len(self._counts), self._flat[0]),
            )
        few = sum(1 < count < FEW for count in self._counts)
        if 2 * few > len(self._counts):
            logger.warning(
                "%s: %d of %d images keep fewer than %d of 256 grey levels (median %d); if the files hold more, check "
                "--window",
                *(where, few, len(self._counts), FEW, statistics.median_low(self._counts)),
            )
