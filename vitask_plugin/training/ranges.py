"""Numbers of upstream's flags with which a run would end late in somebody else's traceback, or train nothing."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from vitask_plugin.errors import VITaskError


def _count(value: float) -> bool:
    return value >= 1


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _fraction(value: float) -> bool:
    return 0 <= value < 1


_COUNT = (_count, "1 or more")
_NOT_NEGATIVE = (_not_negative, "0 or more")
_POSITIVE = (_positive, "more than 0")
_FRACTION = (_fraction, "0 or more and less than 1")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "model_max_length": _COUNT,
    "max_steps": (lambda value: value == -1 or value >= 1, "1 or more, or -1 for none"),
    "learning_rate": _NOT_NEGATIVE,
    "mm_projector_lr": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "max_grad_norm": (lambda value: not math.isnan(value), "a number (0 or less: none)"),
    "adam_beta1": _FRACTION,
    "adam_beta2": _FRACTION,
    "adam_epsilon": _POSITIVE,
    "lora_r": _COUNT,
    "lora_alpha": _POSITIVE,
    "lora_dropout": _FRACTION,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
}


def check(parsed: Namespace) -> None:
    """Refuses a number outside of what its flag can be.

    Args:
        parsed: upstream's flags with their defaults, typed; those that this version lacks are passed over.

    Raises:
        VITaskError: naming the flag, its value, and the range.
    """
    for name, (allows, words) in RANGES.items():
        value: Any = getattr(parsed, name, None)
        if value is not None and not allows(value):
            raise _outside(name, value, words)
    if parsed.max_steps == -1 and not _positive(parsed.num_train_epochs):
        raise VITaskError(
            f"--num_train_epochs is {parsed.num_train_epochs}, which trains nothing; give a number that is more than "
            "0, or --max_steps"
        )


def check_warmup(typed: Mapping[str, str]) -> None:
    """Refuses a --warmup_ratio that is none, or all of the run: transformers 5 would take it for a number of steps.

    Args:
        typed: the command line as `{flag: value}`; parsed, the ratio is --warmup_steps there.

    Raises:
        VITaskError: naming the flag, its value, and the range.
    """
    name, (allows, words) = "warmup_ratio", _FRACTION
    if name in typed and not allows(float(typed[name])):
        raise _outside(name, float(typed[name]), words)


def _outside(name: str, value: float, words: str) -> VITaskError:
    return VITaskError(f"--{name} is {value}; give a number that is {words}")
