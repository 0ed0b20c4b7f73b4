"""One shared head over the classes of several tasks: which columns are whose, and each sample's loss and accuracy over
its own task's columns only.

Tasks with the same labels in the same order share their columns, as in the paper: the three organ sets of MedMNIST do,
which makes 70 columns for the twelve sets. A TSM's record says where each task's columns begin; in a record that does
not, all tasks stand side by side.

Shapes: B = batch, K_all = columns of the head, K = classes of one task.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitask_plugin.data.names import look, plain
from vitask_plugin.errors import VITaskError

# {task: {"choices": [str], "multi_label": bool, "first_column": int}}; without the last, behind the tasks before it.
Tasks = Mapping[str, Mapping[str, Any]]


def arranged(tasks: Tasks, *, separate: bool = False) -> dict[str, dict[str, Any]]:
    """The tasks of a new head with their `first_column`; one task alone needs none.

    Args:
        separate: every task has columns of its own, also where the labels are the same.
    """
    heads: dict[Any, int] = {}  # by labels as `plain` writes them: what differs in nothing that is seen is the same
    found, free = {}, 0
    for name, entry in tasks.items():
        head = name if separate else (tuple(map(plain, entry["choices"])), entry["multi_label"])
        first = heads.setdefault(head, free)
        free = max(free, first + len(entry["choices"]))
        found[name] = {**entry, "first_column": first} if len(tasks) > 1 else dict(entry)
    return found


def sharing(tasks: Tasks) -> list[list[str]]:
    """The groups of two or more tasks that have the same columns."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in tasks:
        own = columns(tasks, name)
        groups.setdefault((own.start, own.stop), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def nearly_sharing(tasks: Tasks) -> list[list[str]]:
    """The groups of tasks whose labels look the same, but in another order or spelling, so that they do not share."""
    groups: dict[Any, list[str]] = {}
    for name, entry in tasks.items():
        groups.setdefault((tuple(sorted(map(look, entry["choices"]))), entry["multi_label"]), []).append(name)
    return [names for names in groups.values() if len({columns(tasks, name).start for name in names}) > 1]


def class_count(tasks: Tasks) -> int:
    """K_all."""
    return max((own.stop for own in _layout(tasks).values()), default=0)


def columns(tasks: Tasks, task: str) -> slice:
    """The columns of `task` in the head.

    Raises:
        VITaskError: if `task` is not among them.
    """
    if task not in tasks:
        raise VITaskError(f"the TSM knows no task {task!r}; it was made for {', '.join(tasks)}")
    return _layout(tasks)[task]


def _layout(tasks: Tasks) -> dict[str, slice]:
    found, free = {}, 0
    for name, entry in tasks.items():
        first = entry.get("first_column", free)
        found[name] = slice(first, first + len(entry["choices"]))
        free = max(free, found[name].stop)
    return found


def target_row(tasks: Tasks, task: str, label: int | list[int]) -> Tensor:
    """[K_all] float32: 1 in the columns of the sample's classes, 0 elsewhere."""
    row = torch.zeros(class_count(tasks))
    start = columns(tasks, task).start
    for index in label if isinstance(label, list) else [label]:
        row[start + index] = 1
    return row


def _by_task(task: Tensor, tasks: Tasks) -> Iterator[tuple[Tensor, slice, bool]]:
    """(rows of the batch, columns of the head, multi-label?) of each task that occurs in the batch."""
    for number, (name, entry) in enumerate(tasks.items()):
        rows = (task == number).nonzero().squeeze(1)
        if len(rows):
            yield rows, columns(tasks, name), entry["multi_label"]


def joint_loss(
    logits: Tensor,
    targets: Tensor,
    task: Tensor,
    tasks: Tasks,
    *,
    smoothing: float = 0.0,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each sample's loss over the classes of its own task; other tasks' logits get a gradient of exactly zero.

    Multi-class and ordinal: cross-entropy. Multi-label: binary cross-entropy, mean over the task's classes. Tasks are
    not re-weighted.

    Args:
        logits: [B, K_all]. targets: [B, K_all], rows of `target_row` or mixtures of them. task: [B] int64, position in
            `tasks`.
        smoothing: share of a target that is spread over the task's classes; of a multi-label one, over yes and no.
        weights: of having and of lacking a class, [T, K_all] each (T = tasks; see `class_weights`); None = 1.

    Returns:
        [B] float32, in nats.
    """
    losses = logits.new_zeros(len(logits), dtype=torch.float32)
    for rows, own, multi_label in _by_task(task, tasks):
        given, wanted = logits[rows, own].float(), targets[rows, own].float()
        having, lacking = (None, None) if weights is None else (part[task[rows[0]], own] for part in weights)
        if multi_label:
            aim = wanted if not smoothing else wanted * (1 - smoothing) + smoothing / 2
            loss = F.binary_cross_entropy_with_logits(given, aim, reduction="none")
            if having is not None:
                loss = loss * (wanted * having + (1 - wanted) * lacking)
            loss = loss.mean(dim=1)
        else:
            loss = F.cross_entropy(given, wanted, reduction="none", label_smoothing=smoothing)
            if having is not None:
                loss = loss * (wanted * having).sum(dim=1)
        losses = losses.index_put((rows,), loss)
    return losses


def correctness(logits: Tensor, targets: Tensor, task: Tensor, tasks: Tasks) -> Tensor:
    """[B] float32, whose mean is the accuracy: 1 where the task's most likely class is the right one; of a multi-label
    sample the share of its task's classes that are right at a probability of 0.5 (medmnist's definition)."""
    scores = logits.new_zeros(len(logits), dtype=torch.float32)
    for rows, own, multi_label in _by_task(task, tasks):
        given, wanted = logits[rows, own], targets[rows, own]
        if multi_label:
            scores[rows] = ((given > 0) == (wanted > 0.5)).float().mean(dim=1)
        else:
            scores[rows] = (given.argmax(dim=1) == wanted.argmax(dim=1)).float()
    return scores
