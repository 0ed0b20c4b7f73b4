"""The temperature of a TSM: one number by which its logits are divided so that its probabilities are as right as they
are sure, fitted on the validation data (Guo et al., 2017). It changes no class, and nothing is computed with it unless
asked for (`TSM.probabilities`).

Shapes: n = images, K = classes of one task.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vitask_plugin.calibration_error import calibration_error
from vitask_plugin.tsm.joint import Tasks, columns, joint_loss
from vitask_plugin.tsm.validation import Answers

LOWEST, HIGHEST = 0.05, 20.0  # where every image is right, any lower temperature is better still


def fitted(found: Answers, tasks: Tasks) -> dict[str, Any]:
    """What a TSM's record says: `value`, and `nll` (nats) and `ece` before and after, means over the tasks.

    The loss is convex in 1 / temperature, so that halving the range by the sign of its slope finds the one minimum.
    """
    low, high = math.log(1 / HIGHEST), math.log(1 / LOWEST)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(found, tasks, math.exp(middle)) <= 0 else (low, middle)
    value = math.exp(-(low + high) / 2)
    return {
        "value": value,
        "images": len(found.task),
        "nll": {"before": _loss(found, tasks, torch.tensor(1.0)).item(), "after": _at(found, tasks, value)},
        "ece": {"before": ece(found, tasks, 1.0), "after": ece(found, tasks, value)},
    }


def _at(found: Answers, tasks: Tasks, temperature: float) -> float:
    return _loss(found, tasks, torch.tensor(1 / temperature)).item()


def _loss(found: Answers, tasks: Tasks, factor: Tensor) -> Tensor:
    losses = joint_loss(found.logits.float() * factor, found.targets, found.task, tasks).double()
    means = [losses[rows].mean() for _, rows in found.by_task(tasks)]
    return torch.stack(means).mean()


def _slope(found: Answers, tasks: Tasks, factor: float) -> float:
    with torch.enable_grad():
        at = torch.tensor(factor, requires_grad=True)
        return torch.autograd.grad(_loss(found, tasks, at), at)[0].item()


def ece(found: Answers, tasks: Tasks, temperature: float) -> float:
    """Expected calibration error.

    Of the likeliest class, or of each class of a multi-label task; the mean over the tasks.
    """
    errors = []
    for name, rows in found.by_task(tasks):
        own = columns(tasks, name)
        logits, targets = found.logits[rows, own].double() / temperature, found.targets[rows, own].double()
        if tasks[name]["multi_label"]:
            errors.append(calibration_error(logits.sigmoid().numpy(), targets.numpy()))
        else:
            confidence, chosen = logits.softmax(dim=1).max(dim=1)
            right = targets.gather(1, chosen[:, None]).squeeze(1)
            errors.append(calibration_error(confidence.numpy(), right.numpy()))
    return sum(errors) / len(errors)
