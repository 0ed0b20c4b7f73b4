"""In which order the samples come, and whose image is whose negative: the same however a step is split."""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from vitask_plugin.method.balance import Balance
from vitask_plugin.method.negatives import LARGEST_BATCH, NO_INSTRUCTION, Negatives, grouped, negatives_of


class Contrasted(NamedTuple):
    """What the sampler asks the data set for.

    Attributes:
        index: of the sample in the data set.
        negative: of the sample whose image is its negative; -1 for a sample without a `vitask` block.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a pair for
    negative: int


class Epoch:
    """Which epoch it is: a sampler goes by it, and whoever knows tells it.

    Attributes:
        number: from 0.
    """

    number = 0


class SeededByEpoch(Sampler[int]):
    """Another sampler, its draws made from seed and epoch alone.

    Upstream's, by length and modality, draws from torch's global generator, which a resumed run has in another state.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Epoch) -> None:
        self.sampler, self.seed, self._epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.number = epoch

    def __iter__(self) -> Iterator[int]:
        seed = random.Random(str((self.seed, self._epoch.number))).getrandbits(63)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return iter([*self.sampler])


class ContrastiveSampler(Sampler[Contrasted]):
    """Deals the data set out in optimizer steps, and gives each sample its negative.

    The samples of one question are shuffled and cut into blocks of 2, 4, 8 or 16, and the blocks of each question are
    spread evenly over the epoch: a step is mixed as the data set is. Within a step, blocks stand where batches of 2, 4,
    8, ... samples do not cut them.

    A negative is drawn from the smallest aligned block of 2, 4, 8, ... samples of the step that holds any, and from the
    data set where the step holds none. Nothing of the order depends on an answer, so any two samples that may be a
    sample's negative are as likely to be it: the draw is the paper's, uniform among all that may, and a batch mostly
    holds the negatives it needs, which makes them cheap. Where a block of up to 16 has one answer, its samples share
    one draw from beyond it, so that a batch pays for one image more, not for one a sample.

    Order and negatives depend on seed, epoch, data and `global_batch_size` alone. Ranks are dealt consecutive batches
    in turn, so a step is the same whatever the processes, the batch per device, the accumulation and the workers. The
    only short step is the last one.

    Args:
        negatives: who may be whose negative, of all samples.
        global_batch_size: samples of one optimizer step: batch per device x processes x accumulation.
        text_only: the samples without an image.
        by_modality: give text-only samples, which are far shorter, steps of their own (upstream's
            --group_by_modality_length).
        epoch: that of whoever is told the epoch in its place.
        balance: what an epoch consists of; None = every sample once. A negative that a step does not hold is drawn
            from the data set as it is.
    """

    def __init__(
        self,
        negatives: Negatives,
        global_batch_size: int,
        seed: int,
        *,
        text_only: Collection[int] = (),
        by_modality: bool = False,
        epoch: Epoch | None = None,
        balance: Balance | None = None,
    ) -> None:
        self.negatives = negatives
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = Epoch() if epoch is None else epoch
        self._short = frozenset(text_only) if by_modality else frozenset()
        self._balance = balance
        self._deal(range(len(negatives.groups)))

    def _deal(self, indices: Iterable[int]) -> None:
        """Takes the samples of an epoch."""
        indices = list(indices)
        self._apart = [index for index in indices if index in self._short]
        mixed = [index for index in indices if index not in self._short]
        self._mixed, self._groups = len(mixed), grouped(mixed, self.negatives.groups)

    def __len__(self) -> int:
        return len(self.negatives.groups)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.number = epoch

    def __iter__(self) -> Iterator[Contrasted]:
        draw = random.Random(str((self.seed, self._epoch.number)))
        if self._balance is not None:
            self._deal(self._balance.epoch(draw))
        for step in self._steps(draw):
            yield from self.contrast(step, draw)

    def _steps(self, draw: random.Random) -> list[list[int]]:
        """The samples of each step, in their order."""
        apart = draw.sample(self._apart, len(self._apart))
        whole, left = self._cut(self._spread(draw))
        text, text_left = self._cut([[index] for index in apart])
        rest, last = self._cut([*left, *text_left])
        steps = [*whole, *text, *rest]
        draw.shuffle(steps)
        return [_aligned(step, draw) for step in [*steps, last]]

    def _spread(self, draw: random.Random) -> list[list[int]]:
        """All blocks; those of one question as far from each other as they can be."""
        placed: list[tuple[float, list[int]]] = []
        for group, members in self._groups.items():
            members = draw.sample(members, len(members))
            size = 1 if group == NO_INSTRUCTION else self._block_size(len(members))
            blocks = [members[start : start + size] for start in range(0, len(members), size)]
            first = draw.random()
            placed += [((first + number) / len(blocks), block) for number, block in enumerate(blocks)]
        placed.sort(key=lambda entry: entry[0])
        return [block for _, block in placed]

    def _block_size(self, count: int) -> int:
        """The largest power of 2 of which every step can hold one block of a question with `count` samples, or 2."""
        in_a_step = count * self.global_batch_size // self._mixed
        return min(LARGEST_BATCH, 1 << (max(2, in_a_step).bit_length() - 1))

    def _cut(self, blocks: Iterable[list[int]]) -> tuple[list[list[list[int]]], list[list[int]]]:
        """Whole steps, as blocks, and the blocks left. A block that does not fit into a step goes on in the next."""
        whole: list[list[list[int]]] = []
        step: list[list[int]] = []
        room = self.global_batch_size
        for block in blocks:
            while len(block) >= room:
                whole.append([*step, block[:room]])
                step, block, room = [], block[room:], self.global_batch_size
            if block:
                step.append(block)
                room -= len(block)
        return whole, step

    def contrast(self, step: Sequence[int], draw: random.Random) -> list[Contrasted]:
        """The samples of a step, in its order, each with its negative."""
        return [*map(Contrasted, step, negatives_of(step, self.negatives, draw))]


def _aligned(blocks: list[list[int]], draw: random.Random) -> list[int]:
    """The samples of a step in random order, but blocks of 2, 4, 8, ... behind a multiple of their size.

    A block of another size is cut into such ones. Blocks are joined two by two, from the smallest on; the odd one of
    each size comes last.
    """
    by_size: dict[int, list[list[int]]] = {2**power: [] for power in range(LARGEST_BATCH.bit_length())}
    for block in blocks:
        while block:
            size = 2 ** (len(block).bit_length() - 1)
            by_size[size].append(block[:size])
            block = block[size:]
    joined: list[list[int]] = []
    odd: list[list[int]] = []
    for size, found in by_size.items():
        joined += found
        draw.shuffle(joined)
        if size < LARGEST_BATCH:
            if len(joined) % 2:
                odd.append(joined.pop())
            joined = [[*one, *other] for one, other in zip(joined[::2], joined[1::2], strict=True)]
    return [*chain.from_iterable([*joined, *reversed(odd)])]
