"""Whose image may be whose negative, and the paper's draw: uniform among all that may."""

import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence

NO_INSTRUCTION = -1  # a sample without a `vitask` block: trained as upstream would, no exemplar, no negative
LARGEST_BATCH = 16  # samples; batches per device are rarely larger
TRIES = 64  # draws before all that may be drawn are listed


def grouped(indices: Iterable[int], ids: Sequence[int]) -> dict[int, list[int]]:
    """id -> the indices that have it, in their order."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(ids[index], []).append(index)
    return groups


class Negatives:
    """Which samples may lend a sample their image as its negative.

    It has the same instruction, another label and another response. Where no sample has, because a question is asked of
    one sample or of one label alone, it has the same task instead of the same instruction: a *relaxed* negative.

    Args (one item per sample, equal ids iff the things are equal):
        instruction_ids: of the questions; `NO_INSTRUCTION` where no negative is wanted.
        label_ids: of the labels. response_ids: of the answers.
        task_ids: of the tasks; any value without an instruction.

    Attributes:
        groups: per sample, its instruction; of a relaxed one a number below -1, one for all relaxed ones of a task.
        relaxed: the samples with relaxed negatives.
        unmatched: those of them whose whole task has nobody; they cannot be drawn for.
    """

    def __init__(
        self,
        *,
        instruction_ids: Sequence[int],
        label_ids: Sequence[int],
        response_ids: Sequence[int],
        task_ids: Sequence[int],
    ) -> None:
        self.answers = list(zip(label_ids, response_ids, strict=True))
        asked = [index for index, instruction in enumerate(instruction_ids) if instruction != NO_INSTRUCTION]
        by_label = sorted(asked, key=lambda index: label_ids[index])
        by_instruction, by_task = grouped(by_label, instruction_ids), grouped(by_label, task_ids)
        self.relaxed = self._lonely(by_instruction)
        self.unmatched = sorted(self.relaxed & self._lonely(by_task))
        self.groups = list(instruction_ids)
        self._members = by_instruction
        for index in self.relaxed:
            self.groups[index] = -2 - task_ids[index]
            self._members[self.groups[index]] = by_task[task_ids[index]]
        self._labels = {group: [label_ids[index] for index in members] for group, members in self._members.items()}
        self._listed: dict[tuple[int, tuple[int, int]], list[int]] = {}
        sizes = Counter(self.groups)
        self._beyond = {group for group, members in self._members.items() if len(members) > sizes[group]}

    @classmethod
    def of_nobody(cls, count: int) -> "Negatives":
        """Of `count` samples of which none wants one."""
        nothing = [0] * count
        return cls(instruction_ids=[NO_INSTRUCTION] * count, label_ids=nothing, response_ids=nothing, task_ids=nothing)

    def contrast(self, one: int, other: int) -> bool:
        """Whether two samples of a group can be each other's negative."""
        return all(own != its for own, its in zip(self.answers[one], self.answers[other], strict=True))

    def beyond(self, index: int) -> bool:
        """Whether samples of other groups may be its negative too."""
        return self.groups[index] in self._beyond

    def drawn(self, index: int, draw: random.Random) -> int:
        """One of all that may be its negative, each as likely."""
        group, (label, _) = self.groups[index], self.answers[index]
        members, labels = self._members[group], self._labels[group]
        start, stop = bisect_left(labels, label), bisect_right(labels, label)
        for _ in range(TRIES):
            place = draw.randrange(len(members) - (stop - start))
            found = members[place if place < start else place + stop - start]
            if self.contrast(index, found):
                return found
        # Nearly all other labels have the same response.
        key = (group, self.answers[index])
        if key not in self._listed:
            self._listed[key] = [other for other in members if self.contrast(index, other)]
        return draw.choice(self._listed[key])

    def _lonely(self, groups: dict[int, list[int]]) -> set[int]:
        """The samples that nobody in their group can be the negative of."""
        found: set[int] = set()
        for members in groups.values():
            both = Counter(self.answers[index] for index in members)
            labels = Counter(self.answers[index][0] for index in members)
            responses = Counter(self.answers[index][1] for index in members)
            found.update(
                index
                for index in members
                if labels[self.answers[index][0]] + responses[self.answers[index][1]] - both[self.answers[index]]
                == len(members)
            )
        return found


def negatives_of(step: Sequence[int], negatives: Negatives, draw: random.Random) -> list[int]:
    """For each sample of an optimizer step the one whose image is its negative; -1: none is wanted.

    It is drawn from the smallest aligned block of 2, 4, 8, ... samples of the step that holds any, each of them as
    likely, and from the data set where the step holds none. Samples of one answer in a block of up to `LARGEST_BATCH`
    that holds no other answer share one draw from beyond it, so that a batch pays for one image more, not for one a
    sample. Where the samples of a question stand in random order, every draw is uniform among all that may be drawn:
    which of them stands nearest is chance.
    """
    return _Step(step, negatives, draw).found


class _Step:
    """The negatives of one step; a *party* is the places of samples of one group and answer that share theirs."""

    def __init__(self, step: Sequence[int], negatives: Negatives, draw: random.Random) -> None:
        self.step, self._negatives, self._draw = step, negatives, draw
        self._places = grouped(range(len(step)), [negatives.groups[index] for index in step])
        self.found = [-1] * len(step)
        # Of those that have them in other groups too, first of all which group it is.
        self._drawn = {
            place: negatives.drawn(index, draw) for place, index in enumerate(step) if negatives.beyond(index)
        }
        for party in self._waiting(0, 2 ** len(step).bit_length()):
            place = party[0]
            other = self._drawn[place] if place in self._drawn else negatives.drawn(step[place], draw)
            self._settle(party, other)

    def _waiting(self, start: int, size: int) -> list[list[int]]:
        """The parties of a block that find no negative in it; the others are given theirs."""
        if size == 1:
            return self._alone(start) if start < len(self.step) else []
        middle, stop = start + size // 2, start + size
        left, right = self._waiting(start, size // 2), self._waiting(middle, size // 2)
        waiting = [*self._unmet(left, middle, stop), *self._unmet(right, start, middle)]
        return self._joined(waiting) if size <= LARGEST_BATCH else waiting

    def _alone(self, place: int) -> list[list[int]]:
        group = self._negatives.groups[self.step[place]]
        if group == NO_INSTRUCTION:
            return []
        other = self._drawn.get(place)
        if other is None or self._negatives.groups[other] == group:
            return [[place]]
        self._settle([place], other)
        return []

    def _unmet(self, parties: list[list[int]], start: int, stop: int) -> list[list[int]]:
        """Draws for each party from the places of a block; those left for which it holds nobody."""
        left = []
        for party in parties:
            own = self.step[party[0]]
            places = self._places[self._negatives.groups[own]]
            near = (self.step[place] for place in places[bisect_left(places, start) : bisect_left(places, stop)])
            eligible = [other for other in near if self._negatives.contrast(own, other)]
            if eligible:
                self._settle(party, self._draw.choice(eligible))
            else:
                left.append(party)
        return left

    def _joined(self, parties: list[list[int]]) -> list[list[int]]:
        alike: dict[tuple[int, tuple[int, int]], list[int]] = {}
        for party in parties:
            own = self.step[party[0]]
            alike.setdefault((self._negatives.groups[own], self._negatives.answers[own]), []).extend(party)
        return [*alike.values()]

    def _settle(self, party: list[int], negative: int) -> None:
        for place in party:
            self.found[place] = negative
