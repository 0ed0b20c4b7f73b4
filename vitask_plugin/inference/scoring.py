"""How likely is each label? One prefix (image, exemplar, instruction), one continuation per label, one forward.

The same layouts as in training (`branches`), so K labels cost about one forward instead of K.

K labels, D hidden width, N places in the pool of embeddings, n labelled tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitask_plugin.method.branches import (
    IGNORE,
    Continuation,
    Document,
    Layout,
    Packed,
    Prompts,
    all_targets,
    common,
    targets,
)

# Tokens whose logits [n, V] are in memory at one time.
LOGITS_AT_ONCE = 1024


class LabelScores(NamedTuple):
    """Of one document.

    Attributes:
        log_likelihoods: [K] float32, summed over the tokens of each label, end token included (nats).
        greedy: [K] bool, whether every token of the label is the most likely one.
        tokens: [K] int64, how many tokens each label has, end token included.
    """

    log_likelihoods: Tensor
    greedy: Tensor
    tokens: Tensor


def with_text(pool: Any, texts: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]) -> tuple[Any, list[Tensor]]:
    """The pool of N places with the embeddings of more token ids behind it, and the places of each text in it.

    Args:
        pool: embeddings [N, D], or a host's own pool, which has `followed_by`.
        embed: token ids int64 [n] -> embeddings [n, D].
    """
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64, device=pool.device)
    places = len(pool) + torch.arange(len(ids))
    found = embed(ids)
    longer = torch.cat([pool, found.to(pool.dtype)]) if isinstance(pool, Tensor) else pool.followed_by(found)
    return longer, list(places.split([len(text) for text in texts]))


def label_prompts(
    prompts: Prompts,
    prompt_ids: Sequence[Sequence[int]],
    answered_ids: Sequence[Sequence[Sequence[int]]],
    embed: Callable[[Tensor], Tensor],
) -> Prompts:
    """The prompts with one continuation per label, each token of which is scored.

    Args:
        prompts: B samples, the prompt up to where the answer starts.
        prompt_ids: per sample, the prompt's token ids; what all its answers begin with alike may be left out of both.
        answered_ids: per sample and label, the token ids of prompt, label and end token, tokenized as one text (as in
            training). If that changes the prompt's last tokens, the label starts where the ids part.
        embed: token ids int64 [n] -> embeddings [n, D].
    """
    starts = [
        min(common(prompt, answer) for answer in answered)
        for prompt, answered in zip(prompt_ids, answered_ids, strict=True)
    ]
    labels = [answer[start:] for start, answered in zip(starts, answered_ids, strict=True) for answer in answered]
    pool, places = with_text(prompts.pool, labels, embed)
    scored = iter(zip(places, labels, strict=True))
    documents = []
    for document, prompt, answered, start in zip(prompts.documents, prompt_ids, answered_ids, starts, strict=True):
        question = document.continuations[0].tokens
        question = question[: len(question) - (len(prompt) - start)]
        own = [next(scored) for _ in answered]
        documents.append(replace(document, continuations=[_scored(question, place, label) for place, label in own]))
    return Prompts(pool, documents)


def _scored(question: Tensor, place: Tensor, label: Sequence[int]) -> Continuation:
    """The question, which all labels of a document share, and a label."""
    blank = torch.full_like(question, IGNORE)
    return Continuation(
        torch.cat([question, place]), torch.cat([blank, torch.tensor(label, dtype=torch.int64)]), len(question)
    )


def joined(documents: Sequence[Document]) -> tuple[list[Document], list[tuple[int, slice]]]:
    """Documents with one prefix (the same places in the pool) as one, so that it is computed once.

    Returns:
        The documents, and for each given one which of them it has become, and which of its continuations are its own.
    """
    numbers: dict[tuple[int, ...], int] = {}
    found: list[Document] = []
    places = []
    for one in documents:
        key = tuple(one.prefix.tolist()) or (-1 - len(found),)  # without a prefix there is nothing to share
        number = numbers.setdefault(key, len(found))
        if number == len(found):
            found.append(replace(one, continuations=[]))
        before = found[number].continuations
        places.append((number, slice(len(before), len(before) + len(one.continuations))))
        moved = [replace(part, leader=len(before) + part.leader) for part in one.continuations]
        found[number] = replace(found[number], continuations=[*before, *moved])
    return found, places


@torch.no_grad()
def label_log_likelihoods(
    model: Any, prompts: Prompts, layout: type[Layout] = Packed, most: Callable[[int], int] = int
) -> list[LabelScores]:
    """Exact log-likelihoods of all labels of all documents (see `label_prompts`), in one forward if packed.

    Args:
        model: of any host; has `vitask_states` and `lm_head`.
        most: of the number of labelled tokens here, the largest number on any process that does the same: the head is
            called as often on each, which ZeRO-3 needs.
    """
    documents, device = prompts.documents, prompts.pool.device
    states = model.vitask_states(layout.of(documents).to(device), prompts.pool)
    tokens = all_targets(documents).to(device)
    parts = max(1, -(-most(len(tokens)) // LOGITS_AT_ONCE))
    likely, greedy = [], []
    for some, wanted in zip(states.tensor_split(parts), tokens.tensor_split(parts), strict=True):
        logits = model.lm_head(some).float()
        likely.append(logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(dim=-1))
        greedy.append(logits.argmax(dim=-1) == wanted)
    lengths = [[len(targets(document, label)) for label in document.continuations] for document in documents]
    flat = [length for row in lengths for length in row]
    label_likely = torch.stack([part.sum() for part in torch.cat(likely).split(flat)])
    label_greedy = torch.stack([part.all() for part in torch.cat(greedy).split(flat)])
    labels = [len(row) for row in lengths]
    found = zip(label_likely.split(labels), label_greedy.split(labels), lengths, strict=True)
    return [LabelScores(own, best, torch.tensor(length)) for own, best, length in found]
