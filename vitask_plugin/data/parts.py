"""What `vitask data merge` puts together: data sets and general data, read, checked, and under names of their own."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitask_plugin.data.dataset import SPLITS
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.data.label_file import LABELS_FILE, check_sample, read_labels
from vitask_plugin.data.preparation import recorded
from vitask_plugin.data.shared_files import shared_files
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, inside

IMAGES = "images"
Samples = dict[str, list[dict[str, Any]]]  # by split


@dataclass(frozen=True)
class Part:
    """What is merged: a data set with its label set, or general data without one.

    Attributes:
        name: of the part; no other one of the folder has it.
        images: its image folder, None = text only. samples: as merged, by split.
        folder: of a data set. labels: its label set.
    """

    name: str
    images: Path | None
    samples: Samples
    folder: Path | None = None
    labels: dict[str, Any] = field(default_factory=dict)

    def paths(self, split: str) -> list[Path]:
        """The image files of a split."""
        samples = [sample for sample in self.samples.get(split, ()) if "image" in sample]
        return [self.images / sample["image"].partition("/")[2] for sample in samples]

    def summary(self) -> str:
        """One line on how many samples it has."""
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in self.samples.items())
        return f"{self.name}: {counts} samples" + (f" of {self.labels['task']}" if self.labels else ", general data")


def read_parts(
    folders: Sequence[str | Path], also: Sequence[str | Path] = (), also_images: Sequence[str | Path] = ()
) -> list[Part]:
    """The parts in the order given; see `merge.merge` for what they are.

    Raises:
        VITaskError: something is no data set or no general data, a name is there twice, an image is missing, or two do
            not go together.
    """
    if also_images and len(also_images) not in {min(1, len(also)), len(also)}:
        raise VITaskError(
            f"{len(also)} files of general data but {len(also_images)} image folders; give one for all or one for each"
        )
    places: dict[str, str] = {}
    for given in (*folders, *also):
        _check_new(str(given), places)
    parts = [_data_set(Path(folder)) for folder in folders]
    _check_together(parts)
    roots = list(also_images) if len(also_images) == len(also) else [*also_images] * len(also) or [None] * len(also)
    return parts + [_general(Path(path), root) for path, root in zip(also, roots, strict=True)]


def check_apart(parts: Sequence[Part]) -> None:
    """Refuses images of one data set's training or validation that another one judges by. Those of one set were
    compared when it was written.

    Raises:
        VITaskError: naming the first.
    """
    for learnt, judged in (("train", "val"), ("train", "test"), ("val", "test")):
        for part in parts:
            others = [path for other in parts if other is not part for path in other.paths(learnt)]
            pairs = shared_files(others, part.paths(judged))
            if pairs:
                first, other = map(str, pairs[0])
                raise VITaskError(
                    f"{len(pairs)} {judged} image(s) of {str(part.folder)!r} are {learnt} images of another data set, "
                    f"the first being {first!r}, which holds what {other!r} does; leave them out of one of the two, or "
                    "go on with --allow-duplicates (in a recipe: allow_duplicates_between_sets)"
                )


def _check_new(given: str, places: dict[str, str]) -> None:
    """`places`: {name: path} of those before."""
    name = _name(given)
    again = [other for other in places.values() if os.path.realpath(other) == os.path.realpath(given)]
    if again:
        raise VITaskError(f"{given!r} is given twice ({again[0]!r}); name each data set once")
    if name in places:
        raise VITaskError(
            f"{places[name]!r} and {given!r} would both be called {name!r}, and the name tells their images apart; "
            "rename one of them"
        )
    if name == IMAGES:
        raise VITaskError(f"{given!r} would be called {IMAGES!r}, as the folder of all images is; rename it")
    places[name] = given


def _name(given: str) -> str:
    """What a part is called: its folder's or file's name, in letters, digits and `_`."""
    stem = Path(os.path.abspath(given))
    name = re.sub(r"\W+", "_", stem.stem if stem.suffix == ".json" else stem.name).strip("_")
    if not name:
        raise VITaskError(f"{given!r} has no letter in its name to call the data set by; rename it")
    return name


def _data_set(folder: Path) -> Part:
    name = _name(str(folder))
    check_folder(folder, "data set")
    labels = read_labels(folder, f"{str(folder)!r} is no folder of `vitask data`: its label set")
    check_folder(folder / IMAGES, "image folder")
    samples: Samples = {}
    for split in SPLITS:
        path = folder / f"{split}.json"
        if path.is_file():
            samples[split] = list(_named(name, path, folder / IMAGES, labels))
    return Part(name, folder / IMAGES, samples, folder, labels)


def _general(path: Path, images: str | Path | None) -> Part:
    name = _name(str(path))
    if images is not None:
        check_folder(images, "--also-images")
    rows = list(_named(name, path, None if images is None else Path(images), None))
    return Part(name, None if images is None else Path(images), {"train": rows})


def _named(name: str, path: Path, images: Path | None, labels: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The samples of a file under names that no other part has: of sample, image and group."""
    blocks: dict[int, dict[str, Any]] = {}  # one for all samples that share theirs
    for number, sample in enumerate(read_samples(path)):
        where = f"{str(path)!r}, sample {sample.get('id', number)!r}"
        found = {**sample, "id": f"{name}/{sample.get('id', number)}"}
        if "vitask" in sample:
            if labels is None:
                raise VITaskError(
                    f"{where} has a 'vitask' block, so it is no general data; give the folder of its data set instead"
                )
            check_sample(sample, labels, path)
            block = sample["vitask"]
            if "group" in block:
                block = blocks.setdefault(id(block), {**block, "group": f"{name}/{block['group']}"})
            found["vitask"] = block
        if "image" in sample:
            found["image"] = _image(name, sample["image"], images, where)
        yield found


def _image(name: str, image: str, images: Path | None, where: str) -> str:
    if images is None:
        raise VITaskError(f"{where} has the image {image!r}; say with --also-images in which folder it is")
    try:
        there = os.path.isfile(inside(images, image))
    except VITaskError as error:
        raise VITaskError(f"{where}: {error}") from None
    if not there:
        raise VITaskError(f"{where}: image {image!r} is not in the image folder {str(images)!r}; check the folder")
    return f"{name}/{image}"


def _check_together(parts: Sequence[Part]) -> None:
    """Refuses data sets of one task with other labels or other pixels, and a class without a training image."""
    first: dict[str, Part] = {}
    for part in parts:
        task = part.labels["task"]
        other = first.setdefault(task, part)
        for key in ("choices", "type"):
            if other.labels[key] != part.labels[key]:
                raise VITaskError(
                    f"data sets {other.name!r} and {part.name!r} are both of task {task!r}, with the {key} "
                    f"{other.labels[key]!r} and {part.labels[key]!r}; write one of them again with --task NAME, or "
                    "both with the same --labels"
                )
        pixels = [recorded(one.labels, one.folder / LABELS_FILE) for one in (other, part)]
        if pixels[0] != pixels[1]:
            raise VITaskError(
                f"data sets {other.name!r} and {part.name!r} are both of task {task!r}, and their pixels were prepared "
                f"otherwise, {pixels[0]!r} and {pixels[1]!r}; write one of them again like the other (--window-from)"
            )
    for task, one in first.items():
        _check_classes(task, one.labels["choices"], [part for part in parts if part.labels["task"] == task])


def _check_classes(task: str, choices: Sequence[str], parts: Sequence[Part]) -> None:
    taught = {index for part in parts for index in _classes(part.samples.get("train", []))}
    missing = [index for index in range(len(choices)) if index not in taught]
    if not missing:
        return
    others = [
        split for split in SPLITS[1:] if any(missing[0] in _classes(part.samples.get(split, [])) for part in parts)
    ]
    where = f", but {' and '.join(others)} have it" if others else ""
    names = " and ".join(repr(part.name) for part in parts)
    raise VITaskError(
        f"data set {names}, task {task!r}: no training image has the class {choices[missing[0]]!r}{where}; add some, "
        "or judge the set by itself (VITASK_FOLDER)"
    )


def _classes(samples: Sequence[dict[str, Any]]) -> set[int]:
    labels = (sample["vitask"]["label"] for sample in samples if "vitask" in sample)
    return {index for label in labels for index in (label if isinstance(label, list) else [label])}
