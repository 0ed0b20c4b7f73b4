"""Labelled pictures in, a checked data set on disk out: images, one LLaVA JSON per split, and the label set.

DIR/images/{train,val,test}/...   DIR/{train,val,test}.json   DIR/labels.json
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vitask_plugin.data.images import pixel_hash, to_rgb
from vitask_plugin.data.instructions import LabelSet, check_choices, response, sample
from vitask_plugin.data.levels import Levels
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, write_json

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
LABELS_FILE = "labels.json"
OUTPUT_FILES = (LABELS_FILE, "images", *(f"{split}.json" for split in SPLITS))


@dataclass(frozen=True)
class Picture:
    """One labelled image.

    Attributes:
        name: where it comes from, for messages.
        split: train, val or test.
        stem: name of the written file, without suffix; unique in its split.
        label: class index, or the sorted class indices of a multi-label image.
        image: the picture itself, None once it is written.
        jpeg: the bytes of its file, where they are to be written as they are; None = as PNG.
    """

    name: str
    split: str
    stem: str
    label: int | list[int]
    image: Image.Image | None
    jpeg: bytes | None = None


@dataclass
class _Duplicates:
    """The same picture in two splits: a test that is no test."""

    first: dict[str, Picture] = field(default_factory=dict)  # by pixel hash, without the image
    found: list[tuple[Picture, Picture]] = field(default_factory=list)

    def see(self, picture: Picture, pixels: Image.Image) -> None:
        light = replace(picture, image=None, jpeg=None)
        first = self.first.setdefault(pixel_hash(pixels), light)
        if first.split != picture.split:
            self.found.append((first, light))

    def sentence(self, choices: Sequence[str]) -> str:
        first, second = (
            f"{picture.split} ({picture.name}, labelled {response(choices, picture.label)[:-1]!r})"
            for picture in self.found[0]
        )
        more = f", and {len(self.found) - 1} more are like it" if len(self.found) > 1 else ""
        return f"the same image is in {first} and in {second}{more}"


def write_dataset(
    output: str | Path,
    labels: LabelSet,
    pictures: Iterable[Picture],
    *,
    complete: bool = True,
    total: int | None = None,
    allow_duplicates: bool = False,
    pixels: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes the data set; an older one in `output` is replaced at the end.

    Args:
        complete: whether the instructions list the label set.
        total: number of pictures, for the progress bar.
        allow_duplicates: go on if a picture is in two splits; the pairs are kept in `labels.json`.
        pixels: what was done to the pixels, kept in `labels.json` under this name.

    Returns:
        Number of images per split that has any.

    Raises:
        VITaskError: one class only, a class without a training image (unless all are for evaluation), a picture in
            two splits, or nothing to see in any picture. Nothing is left behind.
    """
    check_replaceable(output, OUTPUT_FILES)
    check_choices(labels.choices, f"data set {labels.task!r}")
    duplicates, levels = _Duplicates(), Levels()
    samples: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with atomic_directory(output) as directory:
        for picture in tqdm(pictures, desc=labels.task, total=total, unit="image", disable=None):
            seen = to_rgb(picture.image)
            duplicates.see(picture, seen)
            levels.see(seen, picture.name)
            path = _write(picture, directory / "images")
            samples[picture.split].append(
                sample(
                    identifier=f"{labels.task}-{picture.split}-{picture.stem}",
                    image=path,
                    modality=labels.modality,
                    task=labels.task,
                    choices=labels.choices,
                    label=picture.label,
                    complete=complete,
                )
            )
        levels.check(f"data set {labels.task!r}")
        _check_classes(labels, samples)
        if duplicates.found:
            sentence = duplicates.sentence(labels.choices)
            if not allow_duplicates:
                raise VITaskError(f"{sentence}; remove one of each pair, or go on with --allow-duplicates")
            logger.warning("%s", sentence)
        filled = {split: rows for split, rows in samples.items() if rows}
        for split, rows in filled.items():
            write_json(directory / f"{split}.json", rows)
        write_json(directory / LABELS_FILE, _labels_record(labels, duplicates) | ({"pixels": pixels} if pixels else {}))
    return {split: len(rows) for split, rows in filled.items()}


def _write(picture: Picture, folder: Path) -> str:
    """Writes the image; returns its path in the folder."""
    path = f"{picture.split}/{picture.stem}.{'jpg' if picture.jpeg else 'png'}"
    (folder / picture.split).mkdir(parents=True, exist_ok=True)
    if picture.jpeg:
        (folder / path).write_bytes(picture.jpeg)
    else:
        picture.image.save(folder / path)
    return path


def _check_classes(labels: LabelSet, samples: dict[str, list[dict[str, Any]]]) -> None:
    if not samples["train"]:
        return
    present: set[int] = set()
    for row in samples["train"]:
        label = row["vitask"]["label"]
        present.update(label if isinstance(label, list) else [label])
    empty = [name for index, name in enumerate(labels.choices) if index not in present]
    if empty:
        others = sum(
            labels.choices.index(empty[0]) in (label if isinstance(label, list) else [label])
            for split in ("val", "test")
            for label in (row["vitask"]["label"] for row in samples[split])
        )
        elsewhere = f" ({others} in val and test)" if others else ""
        raise VITaskError(
            f"data set {labels.task!r}: class {empty[0]!r} is empty, it has no training image{elsewhere}; "
            "add images of it or leave the class out"
        )


def _labels_record(labels: LabelSet, duplicates: _Duplicates) -> dict[str, Any]:
    record: dict[str, Any] = {
        "task": labels.task,
        "choices": list(labels.choices),
        "modality": labels.modality,
        "type": labels.kind,
    }
    if duplicates.found:
        record["duplicates"] = [{picture.split: picture.name for picture in pair} for pair in duplicates.found]
    return record


def summary(counts: dict[str, int], labels: LabelSet, output: str | Path) -> str:
    """One line on what was written."""
    images = ", ".join(f"{count} {split}" for split, count in counts.items())
    return f"{labels.task}: {images} images of {len(labels.choices)} classes in {output}"
