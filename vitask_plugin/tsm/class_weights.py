"""`--class-weights balanced`: how much a class counts in the loss, so that a rare one counts as much as a common one.

Shapes: T = tasks, K_all = columns of the head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitask_plugin.tsm.joint import Tasks, class_count, columns, target_row
from vitask_plugin.tsm.samples import LabelledImage


class ClassWeights(NamedTuple):
    """Weights of having and of lacking a class, by position of the task: both [T, K_all], 0 beyond its columns."""

    positive: Tensor
    negative: Tensor


def balanced(images: Sequence[LabelledImage], tasks: Tasks) -> ClassWeights:
    """As scikit-learn's `balanced`: n images over (K classes x images of the class), mean 1 over a task's images.

    Of a multi-label task each class is balanced against its absence.
    """
    positive, negative = torch.zeros(2, len(tasks), class_count(tasks))
    for number, (name, entry) in enumerate(tasks.items()):
        own = columns(tasks, name)
        labels = (image.block["label"] for image in images if image.block["task"] == name)
        rows = torch.stack([target_row(tasks, name, label) for label in labels])[:, own]
        having, count = rows.sum(0), len(rows)
        sides = 2 if entry["multi_label"] else int((having > 0).sum())  # a class that never occurs weighs nothing
        positive[number, own] = torch.where(having > 0, count / (sides * having.clamp(min=1)), 0)
        if entry["multi_label"]:
            lacking = count - having
            negative[number, own] = torch.where(lacking > 0, count / (2 * lacking.clamp(min=1)), 0)
    return ClassWeights(positive, negative)
