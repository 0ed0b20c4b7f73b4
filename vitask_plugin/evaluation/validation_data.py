"""A data file as what is asked about each of its images, and whether the images are fit to learn from: no test images,
none that were trained on."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitask_plugin.data.instructions import question_text, read_samples
from vitask_plugin.data.preparation import seen_in
from vitask_plugin.data.shared_files import shared_files
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside, sha256_file
from vitask_plugin.tsm.folds import units_of
from vitask_plugin.tsm.overlap import shared_groups
from vitask_plugin.tsm.samples import LabelledImage, read_labelled


@dataclass(frozen=True)
class TaskImages:
    """The samples of one task.

    Attributes:
        task, classes, multi_label: of their `vitask` blocks.
        question: that all of them ask, without the image token.
        images: N of them. pixels: what was done to them (see `data.preparation`), None where nobody knows.
    """

    task: str
    classes: tuple[str, ...]
    multi_label: bool
    question: str
    images: list[LabelledImage]
    pixels: dict[str, Any] | None

    @property
    def targets(self) -> np.ndarray:
        """Labels, int64 [N]; of several labels zeros and ones [N, K]."""
        labels = [image.block["label"] for image in self.images]
        if not self.multi_label:
            return np.array(labels, np.int64)
        return np.array([[int(k in label) for k in range(len(self.classes))] for label in labels], np.int64)

    def units(self) -> list[Hashable]:
        """Which images stay together: those of one group, and those with the same bytes."""
        found = units_of(self.images, [sha256_file(image.path) for image in self.images])
        numbers: list[Hashable] = [0] * len(self.images)
        for number, unit in enumerate(found):
            for index in unit:
                numbers[index] = number
        return numbers


def read_tasks(data: str | Path, image_folder: str | Path, wanted: str | None = None) -> list[TaskImages]:
    """The tasks of a LLaVA JSON file.

    Args:
        wanted: the only task to take; None = all.

    Raises:
        VITaskError: no such task, an image that is missing, or samples of one task that ask different questions.
    """
    images = read_labelled([data], [image_folder], training=False)
    samples = [sample for sample in read_samples(data) if "vitask" in sample]
    seen = seen_in(samples, image_folder, data).images or {}
    found: dict[str, TaskImages] = {}
    for sample, image in zip(samples, images, strict=True):
        block = sample["vitask"]
        question = question_text(sample["conversations"][0]["value"])
        if block["task"] not in found:
            kind = {"multi_label": isinstance(block["label"], list), "question": question, "images": []}
            pixels = seen.get(block["task"], {}).get("pixels")
            found[block["task"]] = TaskImages(block["task"], tuple(block["choices"]), **kind, pixels=pixels)
        own = found[block["task"]]
        if question != own.question:
            raise VITaskError(
                f"data file {str(data)!r}, sample {sample.get('id')!r} asks {question!r}, and others of task "
                f"{own.task!r} ask {own.question!r}; label scores depend on the question, so give one file for each"
            )
        own.images.append(image)
    if wanted is not None and wanted not in found:
        raise VITaskError(f"data file {str(data)!r} has no task {wanted!r}; give --task {' or '.join(found)}")
    return [one for one in found.values() if wanted in (None, one.task)]


def check_apart(one: tuple[str, Sequence[LabelledImage]], other: tuple[str, Sequence[LabelledImage]]) -> None:
    """Refuses images or groups that two data files share.

    Args:
        one, other: what the file is called in the sentence, and its images.

    Raises:
        VITaskError: naming the first that both have.
    """
    (name, images), (known, others) = one, other
    groups = shared_groups([image.block for image in others], [image.block for image in images])
    pairs = shared_files([image.path for image in others], [image.path for image in images])
    if groups is None and not pairs:
        return
    first = "" if not pairs else f"{len(pairs)} images, the first being {str(pairs[0][0])!r}"
    raise VITaskError(
        f"{name} and {known} share {first or 'groups: ' + str(groups)}; split the data, so that no image and no group "
        "is in both"
    )


def compared_with_training(
    record: Mapping[str, Any] | None, data: str | Path, image_folder: str | Path, images: Sequence[LabelledImage]
) -> str:
    """What is known of the images having been trained on, in a sentence without places, which may be passed on. The
    checkpoint's record has the hash of its training file: where a file beside `data` has that hash, its images and
    groups are compared.

    Raises:
        VITaskError: some were trained on.
    """
    digest = ((record or {}).get("run") or {}).get("data")
    if digest is None:
        return "the checkpoint does not tell what it was trained on, so nothing was compared with that"
    for path in sorted(Path(data).resolve().parent.glob("*.json")):
        if sha256_file(path) != digest:
            continue
        if path == Path(data).resolve():
            raise VITaskError(
                f"data file {str(data)!r} is what the checkpoint was trained on, where it is too sure of itself; give "
                "validation data"
            )
        check_apart(
            (f"data file {str(data)!r}", images), (f"the training data {str(path)!r}", _there(path, image_folder))
        )
        return f"no image and no group of it is in the training data {path.name!r}"
    return "the training data is not beside it, so nothing was compared with that"


def _there(path: Path, folder: str | Path) -> list[LabelledImage]:
    """The images of a data file that are in the folder."""
    labelled = [sample for sample in read_samples(path) if "vitask" in sample]
    found = [LabelledImage(inside(folder, sample["image"]), sample["vitask"], path) for sample in labelled]
    return [image for image in found if image.path.is_file()]
