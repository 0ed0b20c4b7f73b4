"""From the rows of a batch to its branches: which token is in which branch, and which states predict an answer.

It runs in the collator, on the CPU. The pool of embeddings that it points into is what the model makes of the batch:
the rows with their image tokens expanded [R, W, D], flattened, then the exemplar tokens [B, E, D], flattened.

Shapes: B samples, R rows of the batch (the samples, then the images drawn from the data set as negatives), W positions
of a row, E exemplar tokens of a sample (padded), the rest as in `branches`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vitask_plugin.method.branches import IGNORE, LAYOUTS, Continuation, Document, Layout, common, labelled, targets

NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Row:
    """A row with its image tokens expanded, cut where the prefix ends: behind the last image.

    Attributes:
        prefix: [P] places in the pool; empty for a text-only row.
        is_image: [P] bool, which of them are image tokens.
        text: [C] places of what follows. ids, labels: [C] its token ids and labels (`IGNORE`: no loss).
    """

    prefix: Tensor
    is_image: Tensor
    text: Tensor
    ids: Tensor
    labels: Tensor

    @property
    def plain(self) -> Continuation:
        return Continuation(self.text, self.labels)

    def replaced(self, exemplar: Tensor) -> Tensor:
        """The prefix with the exemplar's places [E] in place of the image tokens (the paper's `replace` control)."""
        first = int(self.is_image.nonzero()[0])
        before, behind = self.prefix[:first], self.prefix[first:][~self.is_image[first:]]
        return torch.cat([before, exemplar, behind])

    def prompted(self, exemplar: Tensor) -> Continuation:
        """Exemplar tokens [E], which carry no loss, then the text."""
        blank = self.labels.new_full((len(exemplar),), IGNORE)
        return Continuation(torch.cat([exemplar, self.text]), torch.cat([blank, self.labels]))


def cut_row(start: int, ids: Tensor, is_image: Tensor, labels: Tensor, end: int | None = None) -> Row:
    """Cuts an expanded row.

    Args:
        start: place in the pool of its first position.
        ids: [positions] token ids; any value at image tokens. is_image: [positions] bool. labels: [positions].
        end: where its prefix ends; None: behind the last image token.
    """
    places = start + torch.arange(len(ids))
    images = is_image.nonzero()
    behind = int(images[-1]) + 1 if len(images) else 0
    cut = behind if end is None else end
    if (labels[:cut] != IGNORE).any():
        cut = 0  # an answer before the image: general data only, which shares its prefix with nobody
    return Row(places[:cut], is_image[:cut], places[cut:], ids[cut:], labels[cut:])


@dataclass
class Branches:
    """What the model computes for a batch, and how its terms are read from that.

    Attributes:
        layout: its N states are those of all labelled tokens of all branches.
        width: W, the length of upstream's expansion that the layout is built on.
        plain: [n] which states predict the samples' response tokens. answers: [n] those tokens.
        prompted: [m] states of the exemplar-prompted branches. prompted_as: [m] the same tokens' places in `plain`.
        negative: [c] states given the negative image. negative_as: [c] their places in `plain`.
        counts: for the log, by name.
        unanswered: numbers of the samples that have no response token left to learn.
    """

    layout: Layout
    width: int
    plain: Tensor
    answers: Tensor
    prompted: Tensor
    prompted_as: Tensor
    negative: Tensor
    negative_as: Tensor
    counts: dict[str, int]
    unanswered: list[int]

    def to(self, *args: Any, **kwargs: Any) -> "Branches":
        """As `Tensor.to`."""
        moved: dict[str, Any] = {
            part.name: value.to(*args, **kwargs)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), Tensor | Layout)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Asked:
    """What is wanted of a sample of the batch.

    Attributes:
        number: of the sample in the data set. answer: its response tokens before anything was cut.
        exemplar: its exemplar tokens; 0: none.
        negative: the row whose image is its negative; -1: none. relaxed: it is of another question.
    """

    number: int
    answer: int
    exemplar: int = 0
    negative: int = -1
    relaxed: bool = False


def branches_of(
    rows: Sequence[Row],
    asked: Sequence[Asked],
    *,
    width: int,
    slots: int,
    replaces: bool,
    limit: int,
    engine: str,
) -> Branches:
    """Lays out a batch.

    Args:
        rows: of the samples, then of other images. asked: per sample. width: W. slots: E.
        replaces: the exemplar stands in place of the image tokens.
        limit: each branch is cut where the host would cut it, at this many positions.
    """
    samples = len(asked)
    documents = [Document(row.prefix, [row.plain] if number < samples else []) for number, row in enumerate(rows)]
    texts = {number: rows[number].ids for number in range(samples)}  # of each document's first continuation
    places: dict[str, dict[int, tuple[int, int]]] = {
        "plain": {number: (number, 0) for number in range(samples)},
        "prompted": {},
        "negative": {},
    }

    def add(kind: str, sample: int, document: int, continuation: Continuation) -> None:
        kept = max(0, limit - len(documents[document].prefix))
        part = replace(continuation, tokens=continuation.tokens[:kept], labels=continuation.labels[:kept])
        places[kind][sample] = (document, len(documents[document].continuations))
        documents[document].continuations.append(part)

    for sample, wanted in enumerate(asked):
        exemplar = len(rows) * width + sample * slots + torch.arange(wanted.exemplar)
        if wanted.exemplar and replaces:
            documents.append(Document(rows[sample].replaced(exemplar)[:limit], [], counted=True))
            add("prompted", sample, len(documents) - 1, rows[sample].plain)
        elif wanted.exemplar:
            add("prompted", sample, sample, rows[sample].prompted(exemplar))
    for sample, wanted in enumerate(asked):
        if wanted.negative >= 0:
            # The same question after the same image is laid out already: see `branches`.
            ids = rows[sample].ids
            shared = common(texts.setdefault(wanted.negative, ids), ids)
            add("negative", sample, wanted.negative, replace(rows[sample].plain, shared=shared))

    states = _states_by_place(documents)
    plain = [states[places["plain"][sample]] for sample in range(samples)]
    starts = [0, *itertools.accumulate(len(own) for own in plain)]

    def paired(kind: str) -> tuple[Tensor, Tensor]:
        """States of a kind of branch, and the places in `plain` of the same tokens: a cut loses the last ones only."""
        own = {sample: states[place] for sample, place in places[kind].items()}
        same = [starts[sample] + torch.arange(len(found)) for sample, found in own.items()]
        return torch.cat([NOTHING, *own.values()]), torch.cat([NOTHING, *same])

    prompted, negative = paired("prompted"), paired("negative")
    unanswered = [wanted.number for wanted, own in zip(asked, plain, strict=True) if len(own) == 0]
    counts = {
        "samples": samples,
        "unanswered": len(unanswered),
        "branches": sum(map(len, places.values())),
        "cut_branches": sum(
            len(states[place]) < asked[sample].answer for kind in places.values() for sample, place in kind.items()
        ),
        "negatives": len(places["negative"]),
        "in_batch_negatives": sum(0 <= wanted.negative < samples for wanted in asked),
        "relaxed_negatives": sum(wanted.relaxed for wanted in asked),
    }
    answers = torch.cat([NOTHING, *(targets(documents[sample], rows[sample].plain) for sample in range(samples))])
    layout = LAYOUTS["packed" if engine == "auto" else engine].of(documents)
    return Branches(layout, width, torch.cat([NOTHING, *plain]), answers, *prompted, *negative, counts, unanswered)


def _states_by_place(documents: list[Document]) -> dict[tuple[int, int], Tensor]:
    """(document, continuation) -> which of a layout's states are its own."""
    states, start = {}, 0
    for number, document in enumerate(documents):
        for part, continuation in enumerate(document.continuations):
            states[number, part] = start + torch.arange(len(labelled(document, continuation)))
            start += len(states[number, part])
    return states
