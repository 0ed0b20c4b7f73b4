"""The optimizer and the learning rate of each step: timm's, by timm's names."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import nn
from torch.nn.utils import skip_init
from torch.optim import Optimizer

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.settings import Settings


class Schedule(Protocol):
    """Sets the learning rate of step `step` (from 0); knows nothing of the steps before."""

    def __call__(self, step: int) -> None: ...


def check_optimizer(settings: Settings) -> None:
    """Refuses, before any work, an optimizer that timm does not have or that does more than a step.

    Raises:
        VITaskError: saying which.
    """
    probe = skip_init(nn.Linear, 2, 2)  # whose start draws nothing
    optimizer = make_optimizer(probe, replace(settings, layer_decay=None))
    if getattr(optimizer, "is_second_order", False):
        raise VITaskError(f"--opt {settings.opt} needs second derivatives, which are not computed here; give another")


def make_optimizer(network: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer of timm, its weights in groups by decay and by layer.

    Raises:
        VITaskError: unknown, or not to be had with these settings here.
    """
    from timm.optim import create_optimizer_v2

    decay = {} if settings.layer_decay is None else {"layer_decay": settings.layer_decay}
    try:
        return create_optimizer_v2(
            network, opt=settings.opt, lr=settings.rate, weight_decay=settings.weight_decay, **decay
        )
    except Exception as error:  # also of one that needs another package, or of a network without groups of layers
        advice = "give another" if settings.layer_decay is None else "give another, or leave --layer-decay out"
        raise VITaskError(
            f"timm cannot make the optimizer --opt {settings.opt} ({str(error) or type(error).__name__}); {advice}"
        ) from error


def make_schedule(optimizer: Optimizer, settings: Settings, steps: int) -> Schedule:
    """The schedule of an optimizer; a group's `lr_scale` (of the layer decay) is a factor on top.

    Args:
        steps: of an epoch.
    """
    wanted = ("sched", "warmup_epochs", "min_lr", "decay_epochs", "decay_rate")
    if all(getattr(settings, name) is None for name in wanted):
        return partial(_set_rates, optimizer, settings.rate, settings.epochs * steps)
    from timm.scheduler import create_scheduler_v2

    given = {name: getattr(settings, name) for name in wanted if getattr(settings, name) is not None}
    warm_up = settings.warmup_epochs or 0
    if warm_up > settings.epochs:
        raise VITaskError(f"--warmup-epochs {warm_up} is longer than --epochs {settings.epochs}; give fewer")
    given |= {"warmup_epochs": warm_up, "warmup_lr": settings.rate / 1000}
    if settings.decay_rate is None and settings.sched == "poly":
        given["decay_rate"] = 0.9  # timm's default is a factor of the step schedule, and no power
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=settings.epochs, step_on_epochs=False, updates_per_epoch=steps, **given
    )
    return schedule.step_update


def _set_rates(optimizer: Any, rate: float, steps: int, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * rate_factor(step, steps=steps) * group.get("lr_scale", 1.0)


def rate_factor(step: int, *, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps`: a linear warm-up over a tenth, then a cosine to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
