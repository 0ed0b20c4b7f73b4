"""What a checkpoint is asked about an image: its own record says it, or the label set of a data set does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import answers_of, instruction, kind_of, label_sets
from vitask_plugin.data.label_file import LABELS_FILE, sets_in
from vitask_plugin.data.labels_format import LABELS
from vitask_plugin.data.preparation import recorded
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json

Record = Mapping[str, Any] | None  # of a checkpoint; None: it is not VITask's


@dataclass(frozen=True)
class Question:
    """One task in words.

    Attributes:
        choices: class names in the order of their ids. text: without an image token.
        kind: `medmnist`'s word. pixels: how its images were prepared for training, see `preparation.recorded`.
    """

    task: str
    choices: tuple[str, ...]
    text: str
    kind: str
    pixels: Mapping[str, Any] | None = None

    @property
    def answers(self) -> list[str]:
        """Those whose likelihood is looked at, as in lmms-eval's `_score` tasks."""
        return answers_of(self.choices, multi_label=self.kind == MULTI_LABEL)


def question_of(record: Record, checkpoint: str | Path, task: str | None, labels: str | Path | None) -> Question:
    """What to ask.

    Args:
        task: None = the only one there is. labels: a data set's folder or its labels.json, in place of the record.

    Raises:
        VITaskError: no such task, several and none named, or nothing says in which words it was asked.
    """
    if labels is not None:
        return _of_labels(Path(labels), task)
    known = (record or {}).get("tasks", {})
    if not known:
        raise VITaskError(
            f"checkpoint {str(checkpoint)!r} does not record which labels it was trained on; give --labels with the "
            f"{LABELS_FILE} of its data"
        )
    task = _chosen(task, known, f"checkpoint {str(checkpoint)!r} was trained on")
    choices, pixels = tuple(known[task]), (record.get("images") or {}).get(task, {}).get("pixels")
    asked = record.get("questions", {}).get(task)
    if asked is not None:
        kind = kind_of(choices, multi_label=asked["multi_label"])
        return Question(task, choices, asked["text"], kind, pixels)
    published = label_sets().get(task)
    if published is None or published.choices != choices:
        raise VITaskError(
            f"checkpoint {str(checkpoint)!r} is of a version that did not record how task {task!r} was asked; give "
            f"--labels with the {LABELS_FILE} of its data"
        )
    text = instruction(published.modality, choices, multi_label=published.multi_label)
    return Question(task, choices, text, published.kind, pixels)


def _chosen(task: str | None, known: Mapping[str, Any], who: str) -> str:
    if task is None and len(known) > 1:
        raise VITaskError(f"{who} {len(known)} tasks; give --task with one of {', '.join(known)}")
    if task is not None and task not in known:
        raise VITaskError(f"{who} {', '.join(map(repr, known))}, not on task {task!r}; give one of them")
    return next(iter(known)) if task is None else task


def _of_labels(place: Path, task: str | None) -> Question:
    path = place / LABELS_FILE if place.is_dir() else place
    found = read_json(path, "--labels")
    sets = list(sets_in(found).values()) or [found]
    for one in sets:
        LABELS.check(one, f"--labels {str(path)!r}")
    by_task = {one["task"]: one for one in sets}
    labels = by_task[_chosen(task, by_task, f"--labels {str(path)!r} is of")]
    choices, several = tuple(labels["choices"]), labels["type"] == MULTI_LABEL
    text = instruction(labels["modality"], choices, multi_label=several)
    return Question(labels["task"], choices, text, labels["type"], recorded(labels, path))
