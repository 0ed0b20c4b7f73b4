"""What is said of one image: the model without and with the exemplar, the TSM by itself, the nearest training images.

K_all = columns of the TSM's head, E = tokens of an image, F = their width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitask_plugin import Specialist
from vitask_plugin.data.comparison import looks, tasks_alike
from vitask_plugin.data.names import look
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.nearest import Neighbour, TrainingImages
from vitask_plugin.tsm.predicted import predicted_answer

NEIGHBOURS = 6
WITHOUT, WITH, TSM_ALONE = "without_exemplar", "with_exemplar", "tsm"


@dataclass(frozen=True)
class Opinion:
    """Of one of those that are asked.

    Attributes:
        label: what is read from the probabilities; several labels are joined by ", ".
        probabilities: by class. answer: in free text; the TSM has none.
    """

    label: str
    probabilities: Mapping[str, float]
    answer: str | None = None


@dataclass(frozen=True)
class Shown:
    """A neighbour with its picture, or why there is none."""

    neighbour: Neighbour
    picture: Image.Image | None
    error: str | None = None


@dataclass(frozen=True)
class Judged:
    """Everything about one image; with an `error` nothing else is there.

    Attributes:
        name: of the image's file. picture: as the models see it, RGB.
        opinions: of the model (`WITHOUT`, and `WITH` where there are exemplars) and of the TSM (`TSM_ALONE`).
        nearest: nearest first; None without features of training images.
    """

    name: str
    picture: Image.Image | None
    opinions: Mapping[str, Opinion]
    nearest: Sequence[Shown] | None = None
    error: str | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """All but the pictures, as JSON."""
        opinions = {who: asdict(opinion) for who, opinion in self.opinions.items()}
        nearest = self.nearest and [{**asdict(shown.neighbour), "error": shown.error} for shown in self.nearest]
        return {"name": self.name, "error": self.error, **opinions, "nearest": nearest}


class Judge:
    """Judges images one by one.

    Args:
        training: of the features of the specialist's TSM; None = no neighbours are shown.

    Raises:
        VITaskError: the TSM has no task with these labels, or the features are another TSM's.
    """

    def __init__(self, specialist: Specialist, training: TrainingImages | None = None) -> None:
        self.specialist, self.tsm, self.training = specialist, specialist.tsm, training
        if self.tsm is not None:
            self._own_task, self._places = _places(self.tsm, specialist.task, specialist.classes)
        if training is not None:
            training.store.check_tsm(self.tsm.hash)

    @property
    def title(self) -> str:
        """What the page is called."""
        return Path(self.specialist.folder).resolve().name

    @property
    def summary(self) -> str:
        """What is said below the title."""
        return f"{len(self.specialist.classes)} classes of {self.specialist.task}. For research, not for clinical use."

    def __call__(self, path: Path, name: str) -> Judged:
        """What is said of the image file at `path`, which is called `name` for people."""
        try:
            return self._judged(path, name)
        except VITaskError as error:
            return Judged(name, None, {}, error=str(error).replace(str(path), name))

    def _judged(self, path: Path, name: str) -> Judged:
        picture = self.specialist.picture(path)
        opinions, nearest = {WITHOUT: self._of_model(path, ep=False)}, None
        if self.specialist.has_exemplars:
            opinions[WITH] = self._of_model(path, ep=True)
        if self.tsm is not None:
            output = self.tsm(self.tsm.preprocess(picture)[None].to(self.tsm.device))
            opinions[TSM_ALONE] = self._of_tsm(output.logits)
            if self.training is not None:
                nearest = self._nearest(self.tsm.tokens(output, self.training.store.tokens)[0])
        return Judged(name, picture, opinions, nearest)

    def _of_model(self, path: Path, *, ep: bool) -> Opinion:
        (found,) = self.specialist.predict([path], ep=ep, answer=True)
        if found.error is not None:
            raise VITaskError(found.error)
        return Opinion(found.label, found.probabilities, found.answer)

    def _of_tsm(self, logits: torch.Tensor) -> Opinion:
        """Of logits [1, K_all], at the temperature that was fitted, if one was."""
        tasks, task = self.tsm.record["tasks"], self._own_task
        own = self.tsm.probabilities(logits, task, calibrated="temperature" in self.tsm.record)[0].tolist()
        probabilities = {name: own[place] for name, place in self._places.items()}
        spelled = {tasks[task]["choices"][place]: name for name, place in self._places.items()}
        said = predicted_answer(tasks, logits[0], task).removesuffix(".").split(", ")
        return Opinion(", ".join(spelled.get(one, one) for one in said), probabilities)

    def _nearest(self, tokens: torch.Tensor) -> list[Shown]:
        """Of the image's tokens [E, F]."""
        return [self._shown(neighbour) for neighbour in self.training.nearest(tokens, NEIGHBOURS)]

    def _shown(self, neighbour: Neighbour) -> Shown:
        try:
            return Shown(neighbour, self.training.picture(neighbour))
        except VITaskError:
            return Shown(neighbour, None, "its file is absent, damaged, or was changed since")


def _places(tsm: TSM, task: str, classes: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Which of the TSM's tasks has these labels, and where each of them stands among its own."""
    label_sets = {name: entry["choices"] for name, entry in tsm.record["tasks"].items()}
    for name in tasks_alike(label_sets, task, classes):
        if looks(label_sets[name]) == looks(classes):
            places = {look(own): place for place, own in enumerate(label_sets[name])}
            return name, {one: places[look(one)] for one in classes}
    known = "; ".join(f"{name} ({', '.join(names)})" for name, names in label_sets.items())
    raise VITaskError(
        f"the TSM has no task with the labels {', '.join(classes)} of task {task!r}, but {known}; give --tsm with the "
        "one of this task"
    )
