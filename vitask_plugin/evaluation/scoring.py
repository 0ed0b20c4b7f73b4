"""How likely is each label? One prefix (image, exemplar, instruction), one continuation per label, one forward.

The same layout and engine as in training (`branches`), so K labels cost about one forward instead of K.

K labels, D hidden width, n tokens of a label, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitask_plugin.branches import Continuation, Document, targets


class LabelScores(NamedTuple):
    """Of one document.

    Attributes:
        log_likelihoods: [K] float32, summed over the tokens of each label, end token included (nats).
        greedy: [K] bool, whether every token of the label is the most likely one.
    """

    log_likelihoods: Tensor
    greedy: Tensor


def label_document(
    prompt: Document,
    prompt_ids: Sequence[int],
    answered_ids: Sequence[Sequence[int]],
    embed: Callable[[Tensor], Tensor],
) -> Document:
    """A document with one continuation per label, each token of which is scored.

    Args:
        prompt: prefix and one continuation, the prompt up to where the answer starts.
        prompt_ids: the prompt's token ids.
        answered_ids: per label, the token ids of prompt, label and end token, tokenized as one text (as in training).
            If that changes the prompt's last tokens, the label starts where the ids part.
        embed: token ids int64 [n] -> embeddings [n, D].
    """
    question = prompt.continuations[0].embeds
    shared = min(_common(prompt_ids, ids) for ids in answered_ids)
    kept = len(question) - (len(prompt_ids) - shared)
    labels = [torch.tensor(ids[shared:], device=question.device) for ids in answered_ids]
    return Document(
        torch.cat([prompt.prefix, question[:kept]]),
        [Continuation(embed(ids).to(question.dtype), ids) for ids in labels],
    )


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first items two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


@torch.no_grad()
def label_log_likelihoods(model: Any, documents: list[Document]) -> list[LabelScores]:
    """Exact log-likelihoods of all labels of all documents (see `label_document`) in one forward.

    Args:
        model: has `vitask_label_logits(documents) -> list[list[Tensor [n, V]]]`.
    """
    return [
        _scores([_token_log_likelihoods(row, targets(document, label)) for row, label in pairs])
        for document, rows in zip(documents, model.vitask_label_logits(documents), strict=True)
        if (pairs := list(zip(rows, document.continuations, strict=True)))
    ]


def _token_log_likelihoods(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    likely = logits.float().log_softmax(dim=-1)
    return likely.gather(-1, tokens[:, None]).squeeze(-1).sum(), (logits.argmax(dim=-1) == tokens).all()


def _scores(labels: list[tuple[Tensor, Tensor]]) -> LabelScores:
    return LabelScores(*(torch.stack(values) for values in zip(*labels, strict=True)))
