"""How good a classifier is on labelled images: loss and accuracy of each task, over its own classes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitask_plugin.tsm.joint import Tasks, correctness, joint_loss
from vitask_plugin.tsm.samples import batches


@torch.no_grad()
def validate(
    classify: Callable[[Tensor], Tensor], loader: DataLoader, tasks: Tasks, device: torch.device
) -> dict[str, Any]:
    """`val_loss` (nats) and `val_accuracy`, means over the tasks that occur, and `val_accuracy_by_task`.

    Args:
        classify: pixels [B, 3, S, S] -> logits [B, K_all], in evaluation mode.
    """
    losses, scores, numbers = [], [], []
    for batch in batches(loader, device, "validation"):
        logits = classify(batch.pixels)
        losses.append(joint_loss(logits, batch.targets, batch.task, tasks))
        scores.append(correctness(logits, batch.targets, batch.task, tasks))
        numbers.append(batch.task)
    loss, score, number = torch.cat(losses), torch.cat(scores), torch.cat(numbers)
    present = {name: number == position for position, name in enumerate(tasks) if (number == position).any()}
    accuracy = {name: score[rows].mean().item() for name, rows in present.items()}
    return {
        "val_loss": sum(loss[rows].mean().item() for rows in present.values()) / len(present),
        "val_accuracy": sum(accuracy.values()) / len(accuracy),
        "val_accuracy_by_task": accuracy,
    }
