"""An optimizer and a schedule that a DeepSpeed configuration names, under which a run keeps its own learning rates.

With `"optimizer"` in its configuration DeepSpeed builds the optimizer itself, over one group of all weights: the rates
of projector and connector, and which weights do not decay, would be lost. With `"scheduler"` it takes the place of
`--lr_scheduler_type`, and gives all groups one rate.
"""

from typing import Any

import torch

from vitask_plugin.errors import VITaskError

OPTIMIZER, SCHEDULER = "optimizer", "scheduler"
# What transformers compares with the run's flags, so that it says no more than they do.
_COMPARED = {"lr", "betas", "eps", "weight_decay"}
_ADAMW = ("adam", "adamw")  # DeepSpeed takes its Adam for AdamW too
_WITH_PEAK = ("WarmupLR", "WarmupDecayLR")  # schedules that rise to a rate they are given
_SCALING = ("WarmupCosineLR",)  # that scale each group's own


def check_matches(config: Any) -> None:
    """Refuses settings that say something else than the run's flags.

    Args:
        config: transformers' `HfTrainerDeepSpeedConfig`, after it has read the flags.

    Raises:
        VITaskError: with the first one.
    """
    if config.mismatches:
        raise VITaskError(
            f"the DeepSpeed configuration and the flags differ: {config.mismatches[0].removeprefix('- ')} "
            '(ds: the configuration, hf: the flag); set it to "auto" in the configuration'
        )


def take_over(config: dict[str, Any]) -> str | None:
    """Takes `"optimizer"` out of a configuration if the run's own is the same one; the line that says so.

    Args:
        config: a DeepSpeed configuration, changed in place.

    Raises:
        VITaskError: another optimizer, whose parameter groups would not be the run's.
    """
    section = config.get(OPTIMIZER)
    if section is None:
        return None
    name, more = str(section.get("type")), section.get("params", {}).keys() - _COMPARED
    if name.lower() not in _ADAMW or more:
        extra = f" with {', '.join(sorted(more))}" if more else ""
        raise VITaskError(
            f'the DeepSpeed configuration has an "{OPTIMIZER}" of its own, {name}{extra}, under which all weights have '
            "one learning rate; take it out, and choose by --optim"
        )
    del config[OPTIMIZER]
    return f"DeepSpeed's \"{OPTIMIZER}\" says what the flags say; the run's own is used, which has its parameter groups"


def keep_rates(config: dict[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """Lets a schedule that the configuration names rise to each group's own rate; the line that says it is used.

    Args:
        config: a DeepSpeed configuration, changed in place. optimizer: the run's, with its groups.

    Raises:
        VITaskError: a schedule that gives all groups one rate, where they have several.
    """
    section = config.get(SCHEDULER)
    if section is None:
        return None
    # DeepSpeed drops empty groups before it makes the schedule.
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    name = section.get("type")
    if name in _WITH_PEAK:
        section.setdefault("params", {})["warmup_max_lr"] = rates
    elif name not in _SCALING and len(set(rates)) > 1:
        raise VITaskError(
            f'the DeepSpeed configuration has a "{SCHEDULER}" of its own, {name}, which gives all weights one learning '
            "rate; take it out, and choose by --lr_scheduler_type, or give --vitask_connector_lr 0 and no "
            "--mm_projector_lr"
        )
    return f"learning rates follow {name} of the DeepSpeed configuration, and not --lr_scheduler_type"
