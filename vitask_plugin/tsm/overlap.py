"""What the training and the validation data of a TSM have in common: image files, and groups such as patients.

A validation on what was trained on rewards the epoch that knows the training images best, and that epoch is kept.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vitask_plugin.data.contradictions import say_contradictions
from vitask_plugin.data.rows import group_key
from vitask_plugin.data.shared_files import shared_files
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.tsm.samples import LabelledImage

logger = logging.getLogger(__name__)


def check_overlap(images: Sequence[LabelledImage], val_images: Sequence[LabelledImage], allow_shared: bool) -> None:
    """Refuses groups, and warns of images, that are in the training data and in the validation data.

    Groups are compared within a task, by what their names look like; images by the bytes of their files. Warned of are
    also images with two labels of one task.

    Raises:
        VITaskError: naming a shared group, unless `allow_shared`.
    """
    for kind, found in {"training data": images, "validation data": val_images}.items():
        blocks = ((image.block["task"], os.path.realpath(image.path), image.block["label"]) for image in found)
        say_contradictions(blocks, kind)
    sentence = shared_groups([image.block for image in images], [image.block for image in val_images])
    if sentence is not None:
        if not allow_shared:
            raise VITaskError(
                f"{sentence}; split whole groups, as `vitask data folder --group` does, or go on with "
                "--allow-shared-groups"
            )
        logger.warning("%s", sentence)
    pairs = shared_files([image.path for image in images], [image.path for image in val_images])
    if pairs:
        first, other = pairs[0]
        same = "" if first == other else f", which holds what {str(other)!r} does"
        logger.warning(
            "%d of %d validation images are training images too, the first being %r%s: the validation accuracy, by "
            "which the epoch is chosen, is higher than it should be",
            *(len(pairs), len({image.path for image in val_images}), str(first), same),
        )


def check_other_files(images: Sequence[LabelledImage], val_images: Sequence[LabelledImage]) -> None:
    """Refuses a data file whose content is trained on too.

    Raises:
        VITaskError: naming both.
    """
    trained = {sha256_file(path): path for path in dict.fromkeys(image.source for image in images)}
    for path in dict.fromkeys(image.source for image in val_images):
        same = trained.get(sha256_file(path))
        if same is not None:
            raise VITaskError(
                f"--val {str(path)!r} is what is trained on (--data {str(same)!r}), and the epoch would be kept that "
                "knows it best by heart; give the val split"
            )


def shared_groups(training: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]]) -> str | None:
    """The beginning of a sentence on groups that both have, None where there are none.

    Args:
        training, validation: the `vitask` blocks of samples.
    """
    trained, validated = _groups(training), _groups(validation)
    shared = [key for key in validated if key in trained]
    if not shared:
        return None
    (task, _), (name, count) = shared[0], validated[shared[0]]
    return (
        f"{len(shared)} of {len(validated)} groups of the validation data are in the training data too, the first "
        f"being {name!r} of task {task!r} ({trained[shared[0]][1]} training images, {count} for validation)"
    )


def _groups(blocks: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[str, int]]:
    """`{(task, key of a group): (its name, number of images)}`."""
    found: dict[tuple[str, str], tuple[str, int]] = {}
    key_of = lru_cache(maxsize=None)(group_key)
    for block in blocks:
        group = block.get("group")
        if group is not None:
            key = block["task"], key_of(group)
            name, count = found.get(key, (group, 0))
            found[key] = name, count + 1
    return found
