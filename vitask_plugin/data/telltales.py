"""What tells an image's class without a look at the picture: one class all deep, all JPEG, all grey or all of one size,
and the others not. A model that is trained on such a set learns which hospital or program an image comes from.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

from PIL import Image

from vitask_plugin.data.deep import is_deep
from vitask_plugin.data.leftovers import listed

logger = logging.getLogger(__name__)
MOST, FEW = 0.9, 0.1  # shares of a class's images that nearly all, and hardly any, are
LEAST = 3  # images with and without a property; fewer can be so by chance
ENOUGH = 20  # images of a class, to be compared with another where a third one has both kinds of file
_GREY = ("1", "L", "LA", "La", "I", "F")


class Telltales:
    """Takes the files of a set one by one, as they are before anything is done to them."""

    def __init__(self) -> None:
        self._images: Counter[str] = Counter()  # by class
        self._having: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # property and value -> by class

    def see(self, image: Image.Image, labels: Sequence[str]) -> None:
        """Takes an image, of which the header is enough, and its class names."""
        grey = image.mode in _GREY or image.mode.startswith("I;")
        traits = {
            "depth": "more than 8 bits" if is_deep(image) else "8 bits",
            "format": str(image.format),
            "mode": "grey" if grey else "colour",
            "size": f"{image.width}x{image.height} pixels",
        }
        self._images.update(labels)
        for trait in traits.items():
            self._having[trait].update(labels)

    def say(self) -> None:
        """One warning for each property that tells classes apart."""
        said = set()
        for (trait, value), counts in self._having.items():
            shares = {name: counts[name] / total for name, total in self._images.items()}
            having = [name for name, share in shares.items() if share >= MOST]
            lacking = [name for name, share in shares.items() if share <= FEW]
            if len(having) + len(lacking) < len(shares):
                having, lacking = ([one for one in names if self._images[one] >= ENOUGH] for names in (having, lacking))
            # Of a property with two values, the second says the same.
            if trait in said or not having or not lacking:
                continue
            numbers = [[sum(counter[name] for name in names) for counter in (counts, self._images)]
                       for names in (having, lacking)]  # fmt: skip
            if numbers[0][0] < LEAST or numbers[1][1] - numbers[1][0] < LEAST:
                continue
            said.add(trait)
            logger.warning(
                "the %s of a file tells its class: %s in %d of %d images of %s, and in %d of %d of %s; a model can be "
                "right without a look at what they show, so no figure of this set can be believed; make them alike, "
                "or take images of all classes from each source",
                *(trait, value, *numbers[0], listed(map(repr, having)), *numbers[1], listed(map(repr, lacking))),
            )
