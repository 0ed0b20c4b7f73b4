"""One image file under two labels of one task: one of them is wrong, and whatever is learnt from it."""

import logging
from collections.abc import Iterable

from vitask_plugin.data.instructions import Label

logger = logging.getLogger(__name__)


def say_contradictions(labelled: Iterable[tuple[str, str, Label]], where: str) -> int:
    """Warns of the images that have another label the first time they are named; returns how many there are.

    Args:
        labelled: (task, path of the image, label) of each sample.
        where: what was read, to open the sentence.
    """
    first: dict[str, dict[str, Label]] = {}  # by task: one tuple per image would be slow to make, with a million
    found: dict[tuple[str, str], Label] = {}
    for task, image, label in labelled:
        known = first.setdefault(task, {}).setdefault(image, label)
        if known != label and _in_order(known) != _in_order(label):
            found.setdefault((task, image), label)
    if found:
        task, image = place = next(iter(found))
        logger.warning(
            "%s: %d image(s) have two labels of one task, so one of the two is wrong; the first is %r of task %r, with "
            "the labels %s and %s",
            *(where, len(found), image, task, first[task][image], found[place]),
        )
    return len(found)


def _in_order(label: Label) -> Label:
    return sorted(label) if isinstance(label, list) else label
