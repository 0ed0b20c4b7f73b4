"""In which order the samples come, and whose image is whose negative: the same however a step is split."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

NO_INSTRUCTION = -1  # a sample without a `vitask` block: trained as upstream would, no exemplar, no negative


class Contrasted(NamedTuple):
    """What the sampler asks the data set for.

    Attributes:
        index: of the sample in the data set.
        negative: of the sample whose image is its negative; -1 for a sample without a `vitask` block.
    """

    index: int
    negative: int


def grouped(indices: Iterable[int], ids: Sequence[int]) -> dict[int, list[int]]:
    """id -> the indices that have it, in their order."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(ids[index], []).append(index)
    return groups


class SeededByEpoch(Sampler[int]):
    """Another sampler, its draws made from seed and epoch alone.

    Upstream's, by length and modality, draws from torch's global generator, which a resumed run has in another state.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = random.Random(str((self.seed, self.epoch))).getrandbits(63)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return iter([*self.sampler])


class ContrastiveSampler(Sampler[Contrasted]):
    """Deals the data set out in chunks, one for each optimizer step, and gives each sample its negative.

    A chunk holds one instruction, and the answers to it are dealt out evenly, so that a chunk of an even number of
    samples has at least two of them where the data allow. Remainders of the groups and samples without a `vitask` block
    fill chunks of their own; the only short chunk is the last one.

    A negative has the same instruction and another answer. It is drawn at random, least used first, from the smallest
    aligned block of 2, 4, 8, ... samples of the chunk that has one, and from the data set where the whole chunk has
    none; each epoch draws anew, for a batch of one sample too. A batch that is such a block mostly holds the negatives
    it needs, which makes them cheap.

    Order and negatives depend on seed, epoch, data and `global_batch_size` alone. Ranks are dealt consecutive batches
    in turn, so a step is the same whatever the processes, the batch per device, the accumulation and the workers.

    Args:
        dataset: a `batch.VITaskDataset`.
        global_batch_size: samples of one optimizer step: batch per device x processes x accumulation.
        by_modality: let chunks of samples without a `vitask` block hold images first, then text-only ones, which are
            far shorter (upstream's --group_by_modality_length).
    """

    def __init__(self, dataset: Any, global_batch_size: int, seed: int, *, by_modality: bool = False) -> None:
        self.instruction_ids = dataset.instruction_ids
        self.response_ids = dataset.response_ids
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0
        self.text_only = {i for i, sample in enumerate(dataset.list_data_dict) if "image" not in sample}
        self.by_modality = by_modality
        # Instruction -> its samples, those of one answer side by side.
        by_response = sorted(range(len(self)), key=self.response_ids.__getitem__)
        self._groups = grouped(by_response, self.instruction_ids)

    def __len__(self) -> int:
        return len(self.instruction_ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Contrasted]:
        draw = random.Random(str((self.seed, self.epoch)))
        chunks, remainders, general = [], [], []
        for instruction, members in self._groups.items():
            members = draw.sample(members, len(members))
            if instruction == NO_INSTRUCTION:
                general = members
            else:
                whole, remainder = self._chunks(self._spread(members, draw))
                chunks += whole
                remainders.append(remainder)
        draw.shuffle(remainders)
        # Whole, so that a remainder's samples find negatives in it; odd ones last, since they shift what follows.
        remainders.sort(key=lambda remainder: len(remainder) % 2)
        if self.by_modality:
            general.sort(key=self.text_only.__contains__)
        whole, last = self._chunks([*chain.from_iterable(remainders), *general])
        chunks += whole
        draw.shuffle(chunks)
        for chunk in [*chunks, last]:
            yield from self.contrast(chunk, draw)

    def contrast(self, chunk: Sequence[int], draw: random.Random) -> list[Contrasted]:
        """The samples of a chunk, in its order, each with its negative."""
        found, used = [], [0] * len(chunk)
        for place, index in enumerate(chunk):
            negative = -1
            if self.instruction_ids[index] != NO_INSTRUCTION:
                eligible = self._nearest(chunk, place)
                if eligible:
                    least = min(used[other] for other in eligible)
                    other = draw.choice([other for other in eligible if used[other] == least])
                    used[other] += 1
                    negative = chunk[other]
                else:
                    negative = self._anywhere(index, draw)
            found.append(Contrasted(index, negative))
        return found

    def _nearest(self, chunk: Sequence[int], place: int) -> list[int]:
        """The places that may hold the negative of the one at `place`, all in the smallest block that has any."""
        own, size = chunk[place], 2
        while size < 2 * len(chunk):
            start = place - place % size
            found = [
                other
                for other in range(start, min(start + size, len(chunk)))
                if self.instruction_ids[chunk[other]] == self.instruction_ids[own]
                and self.response_ids[chunk[other]] != self.response_ids[own]
            ]
            if found:
                return found
            size *= 2
        return []

    def _anywhere(self, index: int, draw: random.Random) -> int:
        """Any sample of the data set with the same instruction and another answer; `_check_negatives` saw one."""
        members = self._groups[self.instruction_ids[index]]
        own, answer_of = self.response_ids[index], self.response_ids.__getitem__
        start, stop = bisect_left(members, own, key=answer_of), bisect_right(members, own, key=answer_of)
        place = draw.randrange(len(members) - (stop - start))
        return members[place if place < start else place + stop - start]

    def _chunks(self, members: list[int]) -> tuple[list[list[int]], list[int]]:
        """Whole chunks, and what is left."""
        size = self.global_batch_size
        full = len(members) - len(members) % size
        return [members[start : start + size] for start in range(0, full, size)], members[full:]

    def _spread(self, members: list[int], draw: random.Random) -> list[int]:
        """The samples of one instruction as pairs of two answers, dealt out evenly among the pairs of one.

        Args:
            members: in random order.
        """
        mixed, left = self._paired(members)
        draw.shuffle(mixed)
        alike = [left[place : place + 2] for place in range(0, len(left) - 1, 2)]
        count, total = len(mixed), len(mixed) + len(alike)
        start = draw.randrange(total) if total else 0  # so that no chunk is the first to get a rare answer
        spread: list[int] = []
        for place in range(start, start + total):
            due = place * count // total < (place + 1) * count // total
            spread += (mixed if due else alike).pop()
        return [*spread, *left[len(left) // 2 * 2 :]]

    def _paired(self, members: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """As many pairs of two answers as there can be, and the samples left, which have one answer."""
        mixed, left = [], []
        for index in members:
            if left and self.response_ids[left[-1]] != self.response_ids[index]:
                mixed.append((left.pop(), index))
            else:
                left.append(index)
        # Two that are left and a pair without their answer make two pairs.
        for place in range(len(mixed)):
            if len(left) < 2:
                break
            pair = mixed[place]
            if self.response_ids[left[0]] not in (self.response_ids[index] for index in pair):
                mixed[place] = (left.pop(), pair[0])
                mixed.append((left.pop(), pair[1]))
        return mixed, left
