"""One prefix, many continuations: the packed layout, its mask, and which positions predict a response token.

A document is a prefix (system text and image tokens) and its continuations (plain, exemplar-prompted, negative).
Attention is causal, so the prefix is the same under every continuation and is computed once:

    branch     0            1                 2                     3
    row        prefix_i  |  instr_i resp_i |  e_i instr_i resp_i |  instr_k resp_k
    position   0 .. P-1  |  P ..           |  P ..               |  P ..

`run_packed` is the fast engine; `run_branches`, one plain causal forward per continuation, is its reference.

Shapes: R rows, L positions of a row, D hidden width, P prefix length, C continuation length, n labelled positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100
PAD_DOCUMENT = -1

# (inputs_embeds [R, L, D], attention_mask, position_ids [R, L]) -> hidden states [R, L, D]
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Continuation:
    """What follows a prefix.

    Attributes:
        embeds: [C, D] input embeddings; an exemplar-prompted one starts with the exemplar tokens.
        labels: [C] int64 token ids, `IGNORE` where no loss is taken (instruction, exemplar).
    """

    embeds: Tensor
    labels: Tensor


@dataclass
class Document:
    """A prefix [P, D] (P may be 0) and the continuations that share it."""

    prefix: Tensor
    continuations: list[Continuation]


@dataclass
class Packed:
    """Documents laid out in rows, one document a row, padded on the right.

    Attributes:
        inputs_embeds: [R, L, D].
        position_ids: [R, L]; each continuation restarts at its prefix length; 0 on pads.
        document_ids: [R, L]; `PAD_DOCUMENT` on pads.
        branch_ids: [R, L]; 0 for a prefix, then 1, 2, ...
        predictors: per document, per continuation, [n] indices into the flattened [R * L] positions.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    document_ids: Tensor
    branch_ids: Tensor
    predictors: list[list[Tensor]]


def visible(
    query_document: Tensor,
    query_branch: Tensor,
    query_index: Tensor,
    key_document: Tensor,
    key_branch: Tensor,
    key_index: Tensor,
) -> Tensor:
    """The mask rule: a key is visible iff it is not later, in the same document, and in the prefix or the own branch.

    All arguments broadcast against each other; the result is boolean. Pads are one document of their own, so that no
    row of the mask is empty (an empty row would be NaN under softmax).
    """
    same_document = query_document == key_document
    prefix_or_own = (key_branch == 0) | (key_branch == query_branch)
    return (key_index <= query_index) & same_document & prefix_or_own


def additive_mask(document_ids: Tensor, branch_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule as a dense float mask [R, 1, L, L]: 0 where visible, the dtype's minimum elsewhere.

    Float and additive because a boolean mask is silently wrong under the `eager` attention of transformers.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    seen = visible(
        document_ids[:, :, None],
        branch_ids[:, :, None],
        index[:, None],
        document_ids[:, None, :],
        branch_ids[:, None, :],
        index[None, :],
    )
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def labelled(document: Document, continuation: Continuation) -> Tensor:
    """[n] indices into the continuation of the tokens that a position predicts.

    A continuation's first token is predicted by the prefix's last position; with an empty prefix nothing predicts it.
    """
    index = (continuation.labels != IGNORE).nonzero().squeeze(-1)
    return index if len(document.prefix) else index[index > 0]


def targets(document: Document, continuation: Continuation) -> Tensor:
    """[n] int64, the labels that `run_packed` and `run_branches` return a hidden state for, in the same order."""
    return continuation.labels[labelled(document, continuation)]


def pack(documents: list[Document]) -> Packed:
    """Lays every document out in a row of its own."""
    embeds, positions, document_ids, branch_ids, lengths = [], [], [], [], []
    local_predictors: list[list[Tensor]] = []
    for number, document in enumerate(documents):
        device = document.prefix.device
        prefix_length = len(document.prefix)
        parts = [document.prefix, *(continuation.embeds for continuation in document.continuations)]
        sizes = [len(part) for part in parts]
        embeds.append(torch.cat(parts))
        lengths.append(len(embeds[-1]))
        starts = [0] + [prefix_length] * len(document.continuations)
        positions.append(
            torch.cat(
                [torch.arange(start, start + size, device=device) for start, size in zip(starts, sizes, strict=True)]
            )
        )
        document_ids.append(torch.full((lengths[-1],), number, device=device))
        branch_ids.append(
            torch.repeat_interleave(torch.arange(len(parts), device=device), torch.tensor(sizes, device=device))
        )
        here, offset = [], prefix_length
        for continuation in document.continuations:
            index = labelled(document, continuation)
            here.append(torch.where(index == 0, prefix_length - 1, offset + index - 1))
            offset += len(continuation.embeds)
        local_predictors.append(here)
    width = max(lengths)
    return Packed(
        inputs_embeds=pad_sequence(embeds, batch_first=True),
        position_ids=pad_sequence(positions, batch_first=True),
        document_ids=pad_sequence(document_ids, batch_first=True, padding_value=PAD_DOCUMENT),
        branch_ids=pad_sequence(branch_ids, batch_first=True),
        predictors=[[row * width + index for index in here] for row, here in enumerate(local_predictors)],
    )


def run_packed(decoder: Decoder, documents: list[Document]) -> list[list[Tensor]]:
    """One forward for all branches of all documents.

    Args:
        decoder: called once with an additive float mask [R, 1, L, L].

    Returns:
        Per document, per continuation, the hidden states [n, D] that predict its labelled tokens (see `targets`).
    """
    packed = pack(documents)
    mask = additive_mask(packed.document_ids, packed.branch_ids, packed.inputs_embeds.dtype)
    hidden = decoder(packed.inputs_embeds, mask, packed.position_ids).flatten(0, 1)
    return [[hidden[index] for index in row] for row in packed.predictors]


def run_branches(decoder: Decoder, documents: list[Document]) -> list[list[Tensor]]:
    """The reference: branch by branch, one plain causal forward over prefix + continuation, padded on the right.

    Args:
        decoder: called once per branch with a 0/1 mask [R, L].

    Returns:
        As `run_packed`.
    """
    states: list[list[Tensor]] = [[] for _ in documents]
    for branch in range(max(len(document.continuations) for document in documents)):
        rows = [row for row, document in enumerate(documents) if branch < len(document.continuations)]
        sequences = [torch.cat([documents[row].prefix, documents[row].continuations[branch].embeds]) for row in rows]
        inputs_embeds = pad_sequence(sequences, batch_first=True)
        index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(len(rows), -1)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=inputs_embeds.device)
        hidden = decoder(inputs_embeds, (index < lengths[:, None]).long(), index)
        for place, row in enumerate(rows):
            document = documents[row]
            predictors = len(document.prefix) + labelled(document, document.continuations[branch]) - 1
            states[row].append(hidden[place, predictors])
    return states


RUN = {"packed": run_packed, "branches": run_branches}
