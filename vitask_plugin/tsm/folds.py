"""Which training image is in which fold: whole groups where the data has some, else class by class.

Images with the same bytes, and images of one group of a task, are in one fold, or the others would know them.

Shapes: U = units (images that stay together), C = classes of all tasks.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vitask_plugin.data.rows import group_key
from vitask_plugin.data.splits import split_groups
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.tsm.samples import LabelledImage


@dataclass(frozen=True)
class Folds:
    """The fold of each training image.

    Attributes:
        numbers: of the images, in their order, from 0. hashes: hex SHA-256 of their files.
        count: of the folds. by: `group` or `class`.
    """

    numbers: list[int]
    hashes: list[str]
    count: int
    by: str

    def without(self, fold: int, images: Sequence[LabelledImage]) -> list[LabelledImage]:
        """The images that are not in a fold."""
        return [image for image, number in zip(images, self.numbers, strict=True) if number != fold]


def assigned(images: Sequence[LabelledImage], count: int, seed: int) -> Folds:
    """`count` folds of nearly one size, in which the classes have nearly the same shares.

    Raises:
        VITaskError: too few images or groups, at all or of a class.
    """
    hash_of = lru_cache(maxsize=None)(sha256_file)
    hashes = [hash_of(image.path) for image in tqdm(images, "Reading images", leave=False, disable=None)]
    units = units_of(images, hashes)
    grouped = any(image.block.get("group") is not None for image in images)
    what = "groups of images" if grouped else "different images"
    if len(units) < count:
        raise VITaskError(f"the training data has {len(units)} {what}, too few for --folds {count}; give fewer folds")
    classes: dict[Hashable, int] = {}
    held = []  # the classes of each unit's images
    for unit in units:
        names = (name for index in unit for name in _classes(images[index].block))
        held.append(sorted(classes.setdefault(name, len(classes)) for name in names))
    counts = np.zeros((len(units), len(classes) + 1), np.int64)  # last: images, of whatever class
    for number, unit in enumerate(units):
        np.add.at(counts[number], held[number], 1)
        counts[number, -1] = len(unit)
    generator = np.random.default_rng(seed)
    shares = np.full(count, 1 / count)
    chosen = split_groups(counts, shares, generator) if grouped else _dealt(held, count, generator)
    _check(counts, chosen, count, classes, images, what)
    numbers = [0] * len(images)
    for unit, fold in zip(units, chosen.tolist(), strict=True):
        for index in unit:
            numbers[index] = fold
    return Folds(numbers, hashes, count, "group" if grouped else "class")


def _classes(block: dict[str, Any]) -> Iterator[tuple[str, int]]:
    label = block["label"]
    yield from ((block["task"], one) for one in (label if isinstance(label, list) else [label]))


def units_of(images: Sequence[LabelledImage], hashes: Sequence[str]) -> list[list[int]]:
    """The images that stay together, as their positions."""
    parent = list(range(len(images)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[Hashable, int] = {}
    key_of = lru_cache(maxsize=None)(group_key)
    for index, image in enumerate(images):
        group = image.block.get("group")
        keys = [hashes[index]] + ([] if group is None else [(image.block["task"], key_of(group))])
        for key in keys:
            ours, theirs = root(index), root(first.setdefault(key, index))
            parent[max(ours, theirs)] = min(ours, theirs)
    units: dict[int, list[int]] = defaultdict(list)
    for index in range(len(images)):
        units[root(index)].append(index)
    return list(units.values())


def _dealt(held: Sequence[Sequence[int]], count: int, generator: np.random.Generator) -> np.ndarray:
    """The fold of each unit, [U] int64: units of the same classes are shuffled and dealt in turn."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, classes in enumerate(held):
        alike[tuple(classes)].append(number)
    order = [number for numbers in alike.values() for number in generator.permutation(numbers)]
    chosen = np.zeros(len(held), np.int64)
    chosen[order] = np.arange(len(held)) % count
    return chosen


def _check(
    counts: np.ndarray,
    chosen: np.ndarray,
    count: int,
    classes: dict[Any, int],
    images: Sequence[LabelledImage],
    what: str,
) -> None:
    """Refuses a fold that is empty, or outside of which a class of single labels has no image left."""
    blocks = {image.block["task"]: image.block for image in images}
    total = counts.sum(0)
    for fold in range(count):
        inside = counts[chosen == fold].sum(0)
        if not inside[-1]:
            raise VITaskError(f"--folds {count} leaves a fold without images; give fewer folds")
        for (task, label), column in classes.items():
            if total[column] == inside[column] and not isinstance(blocks[task]["label"], list):
                having = int((counts[:, column] > 0).sum())
                raise VITaskError(
                    f"class {blocks[task]['choices'][label]!r} of task {task!r} has {having} {what}, all in one fold, "
                    "so that the network without it would not know the class; add some, or leave --folds out"
                )


def files_of(images: Sequence[LabelledImage]) -> list[Path]:
    """The different files of some images, in their order."""
    return list(dict.fromkeys(image.path for image in images))
