"""Numbers on a command line: what is out of range is refused in one way, as `VITaskError` that names the option."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vitask_plugin.errors import VITaskError

LARGEST = 2**31 - 1  # of a count: what torch and numpy take anywhere
LARGEST_REAL = sys.float_info.max
LARGEST_SEED = 2**32 - 1  # numpy's


def check_number(option: str, value: float, low: float, high: float = LARGEST, *, above: bool = False) -> None:
    """Refuses a number outside `low` to `high`; `above`: `low` itself too.

    Raises:
        VITaskError: naming option, value and what it must be.
    """
    expected = None
    if not (value > low if above else value >= low):  # NaN is neither
        expected = ("positive" if low == 0 else f"above {low}") if above else f"at least {low}"
    elif value > high:
        expected = "finite" if high == LARGEST_REAL else f"at most {high}"
    if expected:
        raise VITaskError(f"{option} is {value}; it must be {expected}")


def at_least(low: float, high: float = LARGEST, *, above: bool = False) -> type[argparse.Action]:
    """The `action=` of an option whose numbers `check_number` looks at, one or several."""

    class Store(argparse.Action):
        def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
        ) -> None:
            for value in values if isinstance(values, Sequence) else [values]:
                check_number(option or self.dest, value, low, high, above=above)
            setattr(namespace, self.dest, values)

    return Store


COUNT = at_least(1)
COUNT_OR_NONE = at_least(0)
SEED = at_least(0, LARGEST_SEED)
POSITIVE = at_least(0, LARGEST_REAL, above=True)
FINITE = at_least(-LARGEST_REAL, LARGEST_REAL)
