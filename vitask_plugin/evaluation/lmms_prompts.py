"""What stands before the answers of a batch of queries: beginnings with images, which queries may share, and texts."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.lmms_exemplars import Query
from vitask_plugin.inference.scoring import with_text
from vitask_plugin.method.branches import IGNORE, Continuation, Prompts


def beginnings(queries: Sequence[Query], ids: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Which of the different beginnings each query has, and the query that each is of: its images are encoded once.

    Args:
        ids: of each query, the token ids up to what closes its images.
    """
    return _alike(
        [(query.pixels, query.task, query.prompted, *tokens) for query, tokens in zip(queries, ids, strict=True)]
    )


def continued(
    begun: Prompts,
    own: Sequence[int],
    texts: Sequence[Sequence[int]],
    embed: Callable[[Tensor], Tensor],
    limit: int | None,
    advice: str,
) -> Prompts:
    """The prompts of queries whose beginnings are in `begun`, each with its text behind.

    Args:
        own: of each query, the number of its beginning. texts: token ids. embed: token ids [n] -> embeddings [n, D].
        limit: positions that the model takes. advice: what else helps where that is too few.

    Raises:
        VITaskError: a prompt does not fit.
    """
    pool, places = with_text(begun.pool, texts, embed)
    documents = []
    for number, text in zip(own, places, strict=True):
        beginning = begun.documents[number]
        asked = torch.cat([beginning.continuations[0].tokens, text])
        if limit is not None and len(beginning.prefix) + len(asked) > limit:
            raise VITaskError(
                f"a prompt of {len(text)} tokens and its images ({len(beginning.prefix)}) are longer than the model's "
                f"{limit} tokens; shorten the question{advice}"
            )
        documents.append(replace(beginning, continuations=[Continuation(asked, torch.full_like(asked, IGNORE))]))
    return Prompts(pool, documents)


def _alike(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Which of the different keys each one is, and where each different key comes first."""
    numbers: dict[Hashable, int] = {}
    own = [numbers.setdefault(key, len(numbers)) for key in keys]
    return own, [own.index(number) for number in range(len(numbers))]
