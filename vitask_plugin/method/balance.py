"""How often each sample is drawn in an epoch: rare classes oftener than they are there, small sets oftener too.

An epoch keeps its length. In it a set of n samples has a share that goes with n^(1 / temperature): 1 = as it is, larger
= more alike. In the set a class of n samples has one that goes with n * n^-power: 0 = as it is, 1 = all classes alike.
Samples of no set, which is general data, are drawn once an epoch, as ever.
"""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import fsum


@dataclass(frozen=True)
class Class:
    """The samples of one class of a set.

    Attributes:
        members: their indices. draws: how many of them an epoch draws, in the mean over epochs.
    """

    set: Hashable
    name: Hashable
    members: list[int]
    draws: float


class Balance:
    """The draws of each epoch.

    Args (one item per sample):
        sets: the set of each; None: of no set, but not all of them. classes: the class in its set.
        power: from 0 to 1. temperature: at least 1. See the module.

    Attributes:
        classes: of all sets, in the order of their first samples; those of no set are a class of set None.
    """

    def __init__(
        self, sets: Sequence[Hashable | None], classes: Sequence[Hashable], *, power: float, temperature: float
    ) -> None:
        self._length = len(sets)
        found: dict[Hashable, dict[Hashable, list[int]]] = {}
        for index, (own, name) in enumerate(zip(sets, classes, strict=True)):
            found.setdefault(own, {}).setdefault(name if own is not None else None, []).append(index)
        counts = {own: sum(map(len, parts.values())) for own, parts in found.items() if own is not None}
        wanted = _shares(counts, 1 / temperature)
        total = sum(counts.values())
        self.classes: list[Class] = []
        for own, parts in found.items():
            sizes = {name: len(members) for name, members in parts.items()}
            of_set = sizes[None] if own is None else total * wanted[own]
            shares = _shares(sizes, 1 - power)
            self.classes += [Class(own, name, members, of_set * shares[name]) for name, members in parts.items()]

    def epoch(self, draw: random.Random) -> list[int]:
        """The indices of one epoch, as many as there are samples, class by class.

        No sample of a class comes twice before all of it have come once, which is less chance than drawing each alone,
        with the same expectation.
        """
        asked = [one for one in self.classes if one.set is not None]
        drawn = [index for one in self.classes if one.set is None for index in one.members]
        offset = draw.random()
        # Where the running sum of all draws passes a whole number (plus an offset), a class gets one more.
        ends = [int(end + offset) for end in accumulate(one.draws for one in asked)]
        ends[-1] = self._length - len(drawn)  # the last sum is not exact
        for one, start, end in zip(asked, [0, *ends], ends, strict=False):
            rounds, rest = divmod(end - start, len(one.members))
            drawn += [*one.members * rounds, *draw.sample(one.members, rest)]
        return drawn


def _shares(counts: dict[Hashable, int], exponent: float) -> dict[Hashable, float]:
    """count^exponent of each, as shares of their sum."""
    weights = {name: count**exponent for name, count in counts.items()}
    total = fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
