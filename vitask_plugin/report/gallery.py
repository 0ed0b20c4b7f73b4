"""Images that were answered wrong, with what each run answered.

No image is in lmms-eval's log, only the name of the data file, the split and its row: without that file there
are none.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitask_plugin.data.class_names import NO_FINDING
from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.data.medmnist import root
from vitask_plugin.data.names import same_names
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside
from vitask_plugin.report.page import Grid, Sample, Section
from vitask_plugin.report.results import Answer, Data, TaskResult, label_names
from vitask_plugin.report.runs import Run

Judged = Sequence[tuple[Run, TaskResult]]


class NoImages(Exception):
    """Why images cannot be shown, as the end of a sentence."""


def errors(judged: Judged, scored: Judged, limit: int) -> Section:
    """The `limit` images that most runs have wrong; of those, first the ones whose label was the least likely.

    Args:
        judged: of each run the task whose answers are shown.
        scored: of each run that has one the task that scores labels.
    """
    wrong: dict[int, int] = {}
    for _, result in judged:
        for index, answer in result.answers.items():
            wrong[index] = wrong.get(index, 0) + (answer.prediction != answer.label)
    doubt = _doubt(scored)
    missed = [index for index in wrong if wrong[index]]
    order = sorted(missed, key=lambda index: (-wrong[index], doubt.get(index, 0.0), index))
    heading = "Errors"
    if not order:
        return Section(heading, [], ["No run has a wrong answer."])
    data = judged[0][1].data
    shown = order[:limit]
    try:
        images = _images(data, {index: _answer(judged, index).label for index in shown})
    except NoImages as error:
        return Section(heading, [], [f"{len(order)} images were answered wrong by at least one run; {error}"])
    samples = [
        Sample(
            images[index],
            label_names(_answer(judged, index).label, data.choices, NO_FINDING),
            {run.name: _words(result.answers[index], data) for run, result in judged if index in result.answers},
            _name(data, index, _answer(judged, index)),
        )
        for index in shown
    ]
    note = (
        f"{len(shown)} of the {len(order)} images that at least one run answered wrong, those that most runs miss first"
    )
    note += "; among equals, those whose label was the least likely." if doubt else "."
    return Section(heading, [Grid(samples, 11)], [note])


def _doubt(scored: Judged) -> dict[int, float]:
    """{image: mean over the runs of the probability of its label}; multi-label: of the least likely of its labels."""
    found: dict[int, list[float]] = {}
    for _, result in scored:
        for index, answer in result.answers.items():
            labels = answer.label if isinstance(answer.label, list) else [answer.label]
            if labels:
                found.setdefault(index, []).append(min(answer.probabilities[label] for label in labels))
    return {index: sum(values) / len(values) for index, values in found.items()}


def _answer(judged: Judged, index: int) -> Answer:
    return next(result.answers[index] for _, result in judged if index in result.answers)


def _name(data: Data, index: int, answer: Answer) -> str:
    """Which image it is: by its number, and as its owner calls it where that is known."""
    group = f", group {answer.group}" if answer.group else ""
    return f"{data.split} image {index}" + (f": {answer.source}" if answer.source else "") + group


def _words(answer: Answer, data: Data) -> str:
    mark = "✓" if answer.prediction == answer.label else "✗"
    if answer.text:
        return f"{mark} {answer.text}"
    return f"{mark} {label_names(answer.prediction, data.choices, NO_FINDING)}"


def _images(data: Data, labels: Mapping[int, int | list[int]]) -> dict[int, Image.Image]:
    """{row: image} of the split that was judged.

    Raises:
        NoImages: with a sentence, if the file is absent, damaged, or holds other labels than those that were judged.
    """
    if "/" in data.file:
        return _folder_images(data, labels)
    path = root() / Path(data.file).name
    if not path.is_file():
        raise NoImages(f"they are not shown, because {str(path)!r} does not exist (MEDMNIST_ROOT names its folder).")
    try:
        with np.load(path) as file:
            images, rows = file[f"{data.split}_images"], file[f"{data.split}_labels"]
        for index, label in labels.items():
            found = np.flatnonzero(rows[index]).tolist() if data.multi_label else int(rows[index, 0])
            if found != label:
                raise NoImages(f"they are not shown, because {str(path)!r} holds other labels than those judged.")
        return {index: Image.fromarray(images[index]) for index in labels}
    except (OSError, ValueError, KeyError, IndexError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise NoImages(f"they are not shown, because {str(path)!r} cannot be read ({error}).") from None


def _folder_images(data: Data, labels: Mapping[int, int | list[int]]) -> dict[int, Image.Image]:
    """The same of one's own folder: `data.file` is "aptos/test.json", $VITASK_FOLDER a folder "aptos", or several as
    in $PATH; of a set among several "all/aptos/test.json", and it is a folder "all".

    Raises:
        NoImages: as `_images`.
    """
    name, _, file = data.file.partition("/")
    given = os.environ.get("VITASK_FOLDER", "")
    paths = [given] if os.path.isdir(given) else filter(None, given.split(os.pathsep))
    folder = next((path for path in map(Path.resolve, map(Path, paths)) if path.name == name), None)
    if folder is None:
        raise NoImages(
            f"they are not shown, because images of one's own folder need VITASK_FOLDER, and "
            f"it names no folder {name!r}."
        )
    try:
        path = inside(folder, file)  # a results file comes from anywhere
    except VITaskError as error:
        raise NoImages(f"they are not shown ({error}).") from None
    try:
        samples = [sample for sample in read_samples(path) if "vitask" in sample]
        for index, label in labels.items():
            block = samples[index]["vitask"]
            if block["label"] != label or not same_names(block["choices"], data.choices):
                raise NoImages(f"they are not shown, because {str(path)!r} holds other labels than those judged.")
        images = {index: inside(path.parent / "images", samples[index]["image"]) for index in labels}
        return {index: decode(read_bytes(image), image) for index, image in images.items()}
    except (VITaskError, OSError, IndexError, KeyError) as error:
        raise NoImages(f"they are not shown, because {str(path)!r} cannot be read ({error}).") from None
