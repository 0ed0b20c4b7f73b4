"""How many grey levels a data set's pictures keep: with one colour there is nothing to see, with a few not much."""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vitask_plugin.data.sizes import spread
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
FEW = 32  # grey levels of 256
LOOKED_AT = 32  # images of a set that is trained on


def check_levels(
    images: Sequence[str | Path], read: Callable[[str | Path], Image.Image], where: str, *, refuse: bool
) -> None:
    """`Levels.check` of `LOOKED_AT` images, evenly spread; of all of them where these are of one colour.

    Args:
        images: their names. read: the RGB picture of one.

    Raises:
        VITaskError: an image that cannot be read; all images of one colour, if `refuse`.
    """
    levels, chosen = Levels(), spread(len(images), LOOKED_AT)
    for index in chosen:
        levels.see(read(images[index]), repr(str(images[index])))
    if levels.of_one_colour:
        for index in sorted(set(range(len(images))).difference(chosen)):
            levels.see(read(images[index]), repr(str(images[index])))
            if not levels.of_one_colour:
                break
    levels.check(where, refuse=refuse)


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

    @property
    def of_one_colour(self) -> bool:
        """Whether all pictures are of one and the same colour."""
        return bool((self._used.sum(axis=1) == 1).all())

    def check(self, where: str, *, refuse: bool = True) -> None:
        """Refuses a set of one colour, and warns where pictures are of one colour or most keep few levels.

        Args:
            where: opens the sentence.
            refuse: else a set of one colour is warned about too.

        Raises:
            VITaskError: all pictures are of one and the same colour, if `refuse`.
        """
        if self.of_one_colour:
            colour = tuple(self._used.argmax(axis=1).tolist())
            sentence = (
                f"{where}: all {len(self._counts)} images are of one colour, RGB {colour}, so there is nothing to see; "
                "check the files, and --window if it was given"
            )
            if refuse:
                raise VITaskError(sentence)
            logger.warning("%s", sentence)
            return
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
