"""One prefix, many continuations: which positions a decoder computes, and which of them predict a response token.

A document is a prefix (system text and image tokens) and its continuations (plain, exemplar-prompted, negative).
Attention is causal, so the prefix is the same under every continuation and is computed once. A negative continuation
asks what the plain one of the same image asks: it shares the instruction too, and only its response is laid out:

    row        prefix_i  |  instr_i resp_i |  resp_k        |  e_i instr_i resp_i
    position   0 .. P-1  |  P ..           |  P + shared .. |  P ..

Tokens that predict nothing (the last of a response) are left out. Everything here is int64 index arithmetic on the
CPU, fit for a DataLoader worker: positions are named by their place in a pool of embeddings, which the model makes.

`Packed` is the fast layout; `Separate`, one plain causal forward per continuation, is its reference. They return the
same states in the same order.

Shapes: N positions in the pool, D hidden width, R rows, L positions of a row, P prefix length, C continuation length,
n labelled tokens of all continuations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.method import attention

IGNORE = -100

NOWHERE = -1
COUNTED = -2


@dataclass
class Rows:
    """What one forward of the decoder computes.

    Attributes:
        source: [R, L] places in the pool of embeddings; 0 on pads.
        position_ids: [R, L] index of each token in the sequence that it would stand in alone; 0 on pads.
        behind: [R, L] of a token of a continuation, the place of its prefix's last token; `NOWHERE` of all others;
            `COUNTED` of all tokens of a document that stands as the batch's own rows do not.
        until: [R, L] who sees it, see `attention.visible`.
        valid: [R, L], 0 on pads, else 1, where a row is one plain causal sequence; else None.
    """

    source: Tensor
    position_ids: Tensor
    behind: Tensor
    until: Tensor
    valid: Tensor | None = None

    def embedded(self, pool: Tensor) -> Tensor:
        """[R, L, D] of a pool [N, D]."""
        return embedding(self.source, pool)

    def mask(self, backend: str | None, dtype: torch.dtype) -> Any:
        """For a causal decoder: the padding mask of plain sequences, else the rule as the backend takes it."""
        return attention.mask(backend, attention.Rule(self.until), dtype) if self.valid is None else self.valid


# Rows -> hidden states [R, L, D]
Decoder = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Continuation:
    """What follows a prefix.

    Attributes:
        tokens: [C] int64, places in the pool; an exemplar-prompted one starts with the exemplar tokens.
        labels: [C] int64 token ids, `IGNORE` where no loss is taken (instruction, exemplar).
        shared: how many of its first tokens equal those of the continuation `leader` of the document, and are computed
            there; of a leader itself, which is its own, nothing is.
    """

    tokens: Tensor
    labels: Tensor
    shared: int = 0
    leader: int = 0


@dataclass
class Document:
    """A prefix [P] of places in the pool (P may be 0) and the continuations that share it.

    Attributes:
        counted: its prefix is put together anew, and its tokens stand where their index says, whatever the model said
            of the row that they were taken from.
    """

    prefix: Tensor
    continuations: list[Continuation]
    counted: bool = False


@dataclass
class Prompts:
    """What stands before the answers of a batch.

    Attributes:
        pool: [N, D] embeddings that the documents point into, or what a host keeps beside them, by the same places.
        documents: one per sample; prefix, and the text after it as the one continuation.
    """

    pool: Any
    documents: list[Document]


def labelled(document: Document, continuation: Continuation) -> Tensor:
    """[n] indices into the continuation of the tokens that a position predicts.

    A continuation's first token is predicted by the prefix's last position; with an empty prefix nothing predicts it.
    """
    index = (continuation.labels != IGNORE).nonzero().squeeze(-1)
    return index if len(document.prefix) else index[index > 0]


def targets(document: Document, continuation: Continuation) -> Tensor:
    """[n] int64, the labels that a layout returns a state for, in the same order."""
    return continuation.labels[labelled(document, continuation)]


def all_targets(documents: Sequence[Document]) -> Tensor:
    """[n] int64, the targets of every continuation of every document, in the order of a layout's states."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return torch.cat([nothing, *(targets(one, part) for one in documents for part in one.continuations)])


def common(left: Sequence[int] | Tensor, right: Sequence[int] | Tensor) -> int:
    """How many first items two sequences share."""
    length = min(len(left), len(right))
    differ = torch.as_tensor(left[:length]).ne(torch.as_tensor(right[:length])).nonzero()
    return int(differ[0]) if len(differ) else length


@dataclass
class Layout:
    """What all layouts have: `of` builds one on the CPU, `to` moves its tensors, `states` runs the decoder."""

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Layout":
        raise NotImplementedError

    def states(self, decoder: Decoder) -> Tensor:
        """The hidden states that predict the labelled tokens, document by document, continuation by continuation.

        Returns:
            [n, D], in the order of `all_targets`.
        """
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """How many positions the decoder computes, pads included."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> "Layout":
        """As `Tensor.to`; what moves a batch to its device looks for this method."""
        return replace(self, **{part.name: _moved(getattr(self, part.name), args, kwargs) for part in fields(self)})


def _moved(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_moved(item, args, kwargs) for item in value]
    return value.to(*args, **kwargs) if isinstance(value, Tensor | Layout) else value


@dataclass
class Packed(Layout):
    """All branches of all documents in one forward. Rows are filled first fit with whole documents, padded right.

    Attributes:
        source: [R, L] places in the pool; 0 on pads.
        position_ids: [R, L]; each continuation goes on from its prefix; 0 on pads.
        behind: [R, L], see `Rows`.
        until: [R, L], one past the last position of the row that may see this one (see `attention.visible`); a pad
            sees and is seen by itself alone, so that no row of the mask is empty (which would be NaN under softmax).
        predictors: [n] indices into the flattened [R * L] positions.
    """

    source: Tensor
    position_ids: Tensor
    behind: Tensor
    until: Tensor
    predictors: Tensor

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Packed":
        lines = [_line(document) for document in documents]
        rows = _first_fit([len(line.source) for line in lines])
        width = max(1, *(sum(len(lines[number].source) for number in row) for row in rows))
        source, positions = torch.zeros(2, len(rows), width, dtype=torch.int64)
        behind = torch.full_like(source, NOWHERE)
        until = torch.arange(1, width + 1).repeat(len(rows), 1)
        predictors: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(lines)
        for place, row in enumerate(rows):
            start = 0
            for number in row:
                line = lines[number]
                here = slice(start, start + len(line.source))
                source[place, here] = line.source
                positions[place, here] = line.position_ids
                behind[place, here] = line.behind
                until[place, here] = start + line.until
                predictors[number] = place * width + start + line.predictors
                start = here.stop
        return cls(source, positions, behind, until, torch.cat(predictors))

    @property
    def positions(self) -> int:
        return self.source.numel()

    def states(self, decoder: Decoder) -> Tensor:
        hidden = decoder(Rows(self.source, self.position_ids, self.behind, self.until))
        return hidden.flatten(0, 1)[self.predictors]


@dataclass
class _Line:
    """One document, laid out: [L] each, and [n] predictors as indices into it."""

    source: Tensor
    position_ids: Tensor
    behind: Tensor
    until: Tensor
    predictors: Tensor


def behind_of(document: Document, length: int) -> Tensor:
    """[P + length]: of the prefix's own tokens nothing, of those behind it the place of its last one, see `Rows`."""
    prefix = document.prefix
    if document.counted:
        return torch.full((len(prefix) + length,), COUNTED)
    last = prefix[-1:].expand(length) if len(prefix) else torch.full((length,), NOWHERE)
    return torch.cat([torch.full_like(prefix, NOWHERE), last])


def _line(document: Document) -> _Line:
    prefix, parts = len(document.prefix), document.continuations
    wanted = [labelled(document, part) for part in parts]
    # Up to the last predictor; a leader also as far as others lean on it.
    lengths = [int(index[-1]) if len(index) else 0 for index in wanted]
    leaders = [part.leader for part in parts]
    shared = [
        0 if number == leader else min(part.shared, lengths[number])
        for number, (part, leader) in enumerate(zip(parts, leaders, strict=True))
    ]
    for number, leader in enumerate(leaders):
        lengths[leader] = max(lengths[leader], shared[number])
    # Behind a leader come those that share most of it, so that what sees a shared token is one stretch.
    order = sorted(range(len(parts)), key=lambda number: (leaders[number], number != leaders[number], -shared[number]))
    starts, end = [0] * len(parts), prefix
    for number in order:
        starts[number] = end
        end += lengths[number] - shared[number]

    sources, positions = [document.prefix], [torch.arange(prefix)]
    untils = [torch.full((prefix,), end)]
    of_leader: dict[int, Tensor] = {}
    for number in order:
        own = slice(shared[number], lengths[number])
        sources.append(parts[number].tokens[own])
        positions.append(torch.arange(prefix + own.start, prefix + own.stop))
        stop = starts[number] + own.stop - own.start
        untils.append(torch.full((own.stop - own.start,), stop))
        of_leader.setdefault(leaders[number], untils[-1])[: shared[number]] = stop

    predictors = []
    for number, (leader, index) in enumerate(zip(leaders, wanted, strict=True)):
        before = index - 1
        place = torch.where(before < shared[number], starts[leader] + before, starts[number] + before - shared[number])
        predictors.append(torch.where(before < 0, prefix - 1, place))
    nothing = torch.zeros(0, dtype=torch.int64)
    source = torch.cat(sources)
    behind = behind_of(document, len(source) - prefix)
    return _Line(source, torch.cat(positions), behind, torch.cat(untils), torch.cat([nothing, *predictors]))


def _first_fit(lengths: Sequence[int]) -> list[list[int]]:
    """Documents by row: longest first, each into the first row with room; no row is longer than the longest one."""
    longest = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, left in enumerate(room) if left >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(longest)
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


@dataclass
class Separate(Layout):
    """The reference: one plain causal forward over prefix + continuation for each branch number, padded right.

    Attributes:
        sources, position_ids, behind, masks: per branch number, [R, L] each, see `Rows`; masks are 0 on pads, else 1.
        predictors: per branch number, indices into its flattened [R * L] positions.
        order: [n] where in the concatenated states of all branch numbers each returned state lies.
    """

    sources: list[Tensor]
    position_ids: list[Tensor]
    behind: list[Tensor]
    masks: list[Tensor]
    predictors: list[Tensor]
    order: Tensor

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Separate":
        layout = cls([], [], [], [], [], torch.zeros(0, dtype=torch.int64))
        keys: list[tuple[int, int, int]] = []  # (document, branch, token) of each state
        for branch in range(max(len(document.continuations) for document in documents)):
            numbers = [number for number, document in enumerate(documents) if branch < len(document.continuations)]
            sequences = [
                torch.cat([documents[number].prefix, documents[number].continuations[branch].tokens])
                for number in numbers
            ]
            source = pad_sequence(sequences, batch_first=True)
            behind = [
                behind_of(documents[number], len(documents[number].continuations[branch].tokens)) for number in numbers
            ]
            index = torch.arange(source.shape[1]).expand(len(numbers), -1)
            lengths = torch.tensor([len(sequence) for sequence in sequences])
            predictors = []
            for place, number in enumerate(numbers):
                document = documents[number]
                here = labelled(document, document.continuations[branch])
                predictors.append(place * source.shape[1] + len(document.prefix) + here - 1)
                keys += [(number, branch, token) for token in range(len(here))]
            layout.sources.append(source)
            layout.position_ids.append(index)
            layout.behind.append(pad_sequence(behind, batch_first=True, padding_value=NOWHERE))
            layout.masks.append((index < lengths[:, None]).long())
            layout.predictors.append(torch.cat(predictors))
        layout.order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
        return layout

    @property
    def positions(self) -> int:
        return sum(source.numel() for source in self.sources)

    def states(self, decoder: Decoder) -> Tensor:
        states = []
        for source, positions, behind, valid, predictors in zip(
            self.sources, self.position_ids, self.behind, self.masks, self.predictors, strict=True
        ):
            # Every token sees what is before it; a pad itself alone.
            until = torch.where(valid.bool(), valid.sum(dim=1, keepdim=True), positions + 1)
            states.append(decoder(Rows(source, positions, behind, until, valid)).flatten(0, 1)[predictors])
        return torch.cat(states)[self.order]


LAYOUTS: dict[str, type[Layout]] = {"packed": Packed, "branches": Separate}
