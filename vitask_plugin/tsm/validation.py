"""How well a classifier does on the validation data, task by task.

Shapes: n = images, B = batch, S = image side, K_all = classes of all tasks side by side in the head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitask_plugin.tsm.joint import Tasks, columns, correctness, joint_loss
from vitask_plugin.tsm.samples import batches


class Answers(NamedTuple):
    """What a classifier says of the validation images, on the CPU.

    Attributes:
        logits, targets: [n, K_all]. task: [n] int64, position in the tasks.
        loss: [n] in nats. score: [n], see `joint.correctness`.
    """

    logits: Tensor
    targets: Tensor
    task: Tensor
    loss: Tensor
    score: Tensor

    def by_task(self, tasks: Tasks) -> Iterator[tuple[str, Tensor]]:
        """(name, [n] which rows) of each task that occurs."""
        for position, name in enumerate(tasks):
            rows = self.task == position
            if rows.any():
                yield name, rows


@torch.no_grad()
def answers(classify: Callable[[Tensor], Tensor], loader: DataLoader, tasks: Tasks, device: torch.device) -> Answers:
    """See `validate`."""
    found = []
    for batch in batches(loader, device, "validation"):
        logits = classify(batch.pixels)
        loss = joint_loss(logits, batch.targets, batch.task, tasks)
        score = correctness(logits, batch.targets, batch.task, tasks)
        found.append(Answers(*(part.cpu() for part in (logits, batch.targets, batch.task, loss, score))))
    return joined(found)


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of several parts of the data as one."""
    return Answers(*(torch.cat(part) for part in zip(*parts, strict=True)))


def figures(found: Answers, tasks: Tasks) -> dict[str, Any]:
    """See `validate`."""
    present = dict(found.by_task(tasks))
    accuracy = {name: found.score[rows].mean().item() for name, rows in present.items()}
    areas = [area for name, rows in present.items() if (area := _area(found, rows, tasks, name)) is not None]
    return {
        "val_loss": sum(found.loss[rows].mean().item() for rows in present.values()) / len(present),
        "val_accuracy": sum(accuracy.values()) / len(accuracy),
        "val_accuracy_by_task": accuracy,
        "val_auc": sum(areas) / len(areas) if areas else None,
    }


def validate(
    classify: Callable[[Tensor], Tensor], loader: DataLoader, tasks: Tasks, device: torch.device
) -> dict[str, Any]:
    """`val_loss` (nats), `val_accuracy` and `val_auc`, means over the tasks that occur, and `val_accuracy_by_task`.

    The AUC of a task is the mean over its classes of one against the rest, as in medmnist; None where no class has
    both sides.

    Args:
        classify: pixels [B, 3, S, S] -> logits [B, K_all], in evaluation mode.
    """
    return figures(answers(classify, loader, tasks, device), tasks)


def _area(found: Answers, rows: Tensor, tasks: Tasks, name: str) -> float | None:
    from sklearn.metrics import roc_auc_score

    own = columns(tasks, name)
    logits, targets = found.logits[rows, own].double(), found.targets[rows, own].numpy() > 0.5
    # A sigmoid keeps the order, and large logits apart that it would round to 1.
    values = (logits if tasks[name]["multi_label"] else logits.softmax(dim=1)).numpy()
    if not math.isfinite(values.sum()):
        return None
    sided = [k for k in range(targets.shape[1]) if 0 < targets[:, k].sum() < len(targets)]
    return float(np.mean([roc_auc_score(targets[:, k], values[:, k]) for k in sided])) if sided else None
