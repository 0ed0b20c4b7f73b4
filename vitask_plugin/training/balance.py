"""--vitask_class_balance and --vitask_set_temperature: what a sample's set and class are, and what each one gets."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.class_names import NO_FINDING
from vitask_plugin.method.balance import Balance

GENERAL = "data without a task"


def balance_of(samples: Sequence[Mapping[str, Any]], vitask: VITaskArguments) -> Balance | None:
    """How often each sample is drawn, None where every one is drawn once an epoch.

    A set is a task. An image of several labels counts as one of the rarest of them, and one without any as a class of
    its own.
    """
    if not vitask.balances:
        return None
    blocks = [sample.get("vitask") for sample in samples]
    often = Counter((block["task"], label) for block in blocks if block for label in _labels(block))
    classes = [None if block is None else _class(block, often) for block in blocks]
    tasks = [None if block is None else block["task"] for block in blocks]
    power, temperature = vitask.vitask_class_balance, vitask.vitask_set_temperature
    return Balance(tasks, classes, power=power, temperature=temperature)


def _labels(block: Mapping[str, Any]) -> list[int]:
    return block["label"] if isinstance(block["label"], list) else [block["label"]]


def _class(block: Mapping[str, Any], often: Mapping[tuple[str, int], int]) -> str:
    rarest = min(_labels(block), key=lambda label: (often[block["task"], label], label), default=None)
    return NO_FINDING if rarest is None else block["choices"][rarest]


def lines(balance: Balance) -> Iterator[str]:
    """What each set and class gets in an epoch, a line for each set."""
    for name in dict.fromkeys(one.set for one in balance.classes):
        own = [one for one in balance.classes if one.set == name]
        there, drawn = sum(len(one.members) for one in own), sum(one.draws for one in own)
        if name is None:
            yield f"an epoch holds {GENERAL} as it is: {there} samples"
        else:
            parts = ", ".join(f"{one.name} {_number(one.draws)} for {len(one.members)}" for one in own)
            yield f"an epoch draws {_number(drawn)} samples for the {there} of {name}: {parts}"


def _number(draws: float) -> str:
    return f"{draws:.0f}" if draws >= 10 else f"{draws:.1f}"
