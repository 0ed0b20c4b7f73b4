"""From a batch of token ids to its branches: where upstream's expansion puts each token, and which branch it is in.

It runs in the collator, on the CPU. The pool of embeddings that it points into is what the model makes of the batch:
upstream's expansion [R, W, D], flattened, then the exemplar tokens [B, E, D], flattened.

Shapes: B samples, R rows of the batch (the samples, then the images drawn from the data set as negatives), T tokens of
a row, W positions of a row after expansion, E exemplar tokens of a sample (padded), the rest as in `branches`.
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from torch import Tensor

from vitask_plugin.branches import LAYOUTS, Continuation, Document, Layout, common, labelled, targets

NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Row:
    """A row after upstream expanded its image tokens, cut behind the last of them.

    Attributes:
        prefix: [P] places in the pool; empty for a text-only row.
        is_image: [P] bool, which of them are image tokens.
        text: [C] places of what follows. ids, labels: [C] its token ids and labels (`IGNORE_INDEX`: no loss).
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
        last = int(self.is_image.nonzero()[-1])
        return torch.cat([self.prefix[:last][~self.is_image[:last]], exemplar])

    def prompted(self, exemplar: Tensor) -> Continuation:
        """Exemplar tokens [E], which carry no loss, then the text."""
        blank = self.labels.new_full((len(exemplar),), IGNORE_INDEX)
        return Continuation(torch.cat([exemplar, self.text]), torch.cat([blank, self.labels]))


def cut_row(start: int, ids: Tensor, is_image: Tensor, labels: Tensor) -> Row:
    """Cuts an expanded row.

    Args:
        start: place in the pool of its first position.
        ids: [positions] token ids; any value at image tokens. is_image: [positions] bool. labels: [positions].
    """
    places = start + torch.arange(len(ids))
    images = is_image.nonzero()
    cut = int(images[-1]) + 1 if len(images) else 0
    if (labels[:cut] != IGNORE_INDEX).any():
        cut = 0  # an answer before the image: general data only, which shares its prefix with nobody
    return Row(places[:cut], is_image[:cut], places[cut:], ids[cut:], labels[cut:])


def expanded_rows(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, image_tokens: int, limit: int
) -> tuple[list[Row], int]:
    """The rows as upstream's `prepare_inputs_labels_for_multimodal` lays them out, without running it, and W.

    Args:
        input_ids: [R, T]. attention_mask: [R, T] bool, False on pads.
        labels: [R, T]; those that are cut off become `IGNORE_INDEX`, so that the loss is not divided by them.
        image_tokens: tokens of one image.
        limit: upstream's `tokenizer_model_max_length`; what is behind it is cut.
    """
    pieces = []
    for number, valid in enumerate(attention_mask.bool()):
        ids, row_labels = input_ids[number, valid], labels[number, valid]
        repeats = torch.where(ids == IMAGE_TOKEN_INDEX, image_tokens, 1)
        source = torch.repeat_interleave(torch.arange(len(ids)), repeats)
        source, behind = source[:limit], source[limit:]
        labels[number, valid.nonzero().squeeze(-1)[behind]] = IGNORE_INDEX
        is_image = ids[source] == IMAGE_TOKEN_INDEX
        pieces.append((ids[source], is_image, row_labels[source].masked_fill(is_image, IGNORE_INDEX)))
    width = max(len(ids) for ids, *_ in pieces)
    return [cut_row(number * width, *piece) for number, piece in enumerate(pieces)], width


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
        unanswered: which samples of the batch have no response token left to learn.
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
        moved = {
            part.name: value.to(*args, **kwargs)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), Tensor | Layout)
        }
        return replace(self, **moved)


def branches_of(
    rows: list[Row],
    width: int,
    negatives: list[int],
    exemplar_lengths: list[int],
    answer_lengths: list[int],
    *,
    slots: int,
    replaces: bool,
    limit: int,
    engine: str,
) -> Branches:
    """Lays out a batch.

    Args:
        negatives: per sample, the row whose image is its negative; -1: none.
        exemplar_lengths: per sample, its exemplar tokens; 0: none. slots: E.
        answer_lengths: per sample, its response tokens before anything was cut.
        replaces: the exemplar stands in place of the image tokens.
        limit: each branch is cut where upstream would cut it, at this many positions.
    """
    samples = len(negatives)
    documents = [Document(row.prefix, [row.plain] if number < samples else []) for number, row in enumerate(rows)]
    asked = {number: rows[number].ids for number in range(samples)}  # text of each document's first continuation
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

    for sample, length in enumerate(exemplar_lengths):
        exemplar = len(rows) * width + sample * slots + torch.arange(length)
        if length and replaces:
            documents.append(Document(rows[sample].replaced(exemplar)[:limit], []))
            add("prompted", sample, len(documents) - 1, rows[sample].plain)
        elif length:
            add("prompted", sample, sample, rows[sample].prompted(exemplar))
    for sample, row in enumerate(negatives):
        if row >= 0:
            # The same question after the same image is laid out already: see `branches`.
            ids = rows[sample].ids
            add("negative", sample, row, replace(rows[sample].plain, shared=common(asked.setdefault(row, ids), ids)))

    states = _states_by_place(documents)
    plain = [states[places["plain"][sample]] for sample in range(samples)]
    starts = [0, *itertools.accumulate(len(own) for own in plain)]

    def paired(kind: str) -> tuple[Tensor, Tensor]:
        """States of a kind of branch, and the places in `plain` of the same tokens: a cut loses the last ones only."""
        own = {sample: states[place] for sample, place in places[kind].items()}
        same = [starts[sample] + torch.arange(len(found)) for sample, found in own.items()]
        return torch.cat([NOTHING, *own.values()]), torch.cat([NOTHING, *same])

    prompted, negative = paired("prompted"), paired("negative")
    unanswered = [sample for sample, own in enumerate(plain) if len(own) == 0]
    counts = {
        "samples": samples,
        "unanswered": len(unanswered),
        "branches": sum(map(len, places.values())),
        "cut_branches": sum(
            len(states[place]) < answer_lengths[sample] for kind in places.values() for sample, place in kind.items()
        ),
        "negatives": len(places["negative"]),
        "in_batch_negatives": sum(0 <= row < samples for row in negatives),
    }
    answers = torch.cat([NOTHING, *(targets(documents[sample], rows[sample].plain) for sample in range(samples))])
    layout = LAYOUTS[engine].of(documents)
    return Branches(layout, width, torch.cat([NOTHING, *plain]), answers, *prompted, *negative, counts, unanswered)


def _states_by_place(documents: list[Document]) -> dict[tuple[int, int], Tensor]:
    """(document, continuation) -> which of a layout's states are its own."""
    states, start = {}, 0
    for number, document in enumerate(documents):
        for part, continuation in enumerate(document.continuations):
            states[number, part] = start + torch.arange(len(labelled(document, continuation)))
            start += len(states[number, part])
    return states
