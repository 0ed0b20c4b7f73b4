"""A question about images as any host's model is asked it: its prompt, the exemplar behind the image, its answers.

In evaluation and in the validation rounds of a training run, so that both give the same numbers.

Shapes: B questions, R different rows before them, N places in the pool of embeddings, E exemplar tokens (padded), F TSM
feature width, D hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.data.images import pixel_hash
from vitask_plugin.errors import VITaskError
from vitask_plugin.inference.scoring import with_text
from vitask_plugin.method.branches import IGNORE, Continuation, Document, Prompts
from vitask_plugin.method.layout import Row


@dataclass(frozen=True)
class Query:
    """One prompt and its images, RGB; `task`: whose labels it asks for, if known; `prompted`: whether an exemplar
    stands behind its image, if there are exemplars."""

    context: str
    images: list[Image.Image]
    task: str | None = None
    prompted: bool = False

    @property
    def pixels(self) -> tuple[str, ...]:
        """Equal where both models, which see the same images, see nothing else."""
        return tuple(map(pixel_hash, self.images))


# What a query's exemplar is made of, None where it has none: [E, F] TSM features, or [E] token ids of the TSM's words.
Exemplars = Sequence[Tensor | None]


class Asker(ABC):
    """Puts questions to the model of a host."""

    @abstractmethod
    def scored(self, queries: Sequence[Query], answers: Sequence[Sequence[str]], exemplars: Exemplars) -> Prompts:
        """The prompts with one continuation per answer of each query, for `scoring.label_log_likelihoods`."""


def with_exemplars(
    pool: Any,
    rows: Sequence[Row],
    exemplars: Exemplars,
    embed: Callable[[Tensor], Tensor],
    *,
    replaces: bool,
) -> tuple[Any, list[Document], Tensor | None]:
    """What stands before the text of B questions.

    Args:
        pool: embeddings [N, D], or a host's own pool, which has `followed_by`. rows: of each question; may be repeated.
        embed: [B, E, F] features, or [B, E] token ids, to exemplar tokens [B, E, D].
        replaces: an exemplar stands in place of the image tokens, and not behind them.

    Returns:
        The pool with the exemplar tokens behind it; the documents; what was embedded, None if nothing was.
    """
    distinct: dict[int, Tensor] = {id(one): one for one in exemplars if one is not None}
    if not distinct:
        return pool, [Document(row.prefix, [row.plain]) for row in rows], None
    padded = pad_sequence(list(distinct.values()), batch_first=True)
    tokens, numbers = embed(padded), {key: number for number, key in enumerate(distinct)}
    documents = []
    for row, one in zip(rows, exemplars, strict=True):
        if one is None or not len(one):
            documents.append(Document(row.prefix, [row.plain]))
            continue
        places = len(pool) + numbers[id(one)] * padded.shape[1] + torch.arange(len(one))
        if replaces:
            documents.append(Document(row.replaced(places), [row.plain], counted=True))
        else:
            documents.append(Document(row.prefix, [row.prompted(places)]))
    behind = tokens.flatten(0, 1)
    longer = torch.cat([pool, behind.to(pool.dtype)]) if isinstance(pool, Tensor) else pool.followed_by(behind)
    return longer, documents, padded


def continued(
    pool: Any,
    begun: Sequence[Document],
    texts: Sequence[Sequence[int]],
    embed: Callable[[Tensor], Tensor],
    limit: int | None,
    advice: str = "",
) -> Prompts:
    """The prompts of B questions: what stands before each, and its text behind that.

    Args:
        begun: see `with_exemplars`. texts: token ids. embed: token ids [n] -> embeddings [n, D].
        limit: positions that the model takes. advice: what else helps where that is too few.

    Raises:
        VITaskError: a prompt does not fit.
    """
    pool, places = with_text(pool, texts, embed)
    documents = []
    for beginning, text in zip(begun, places, strict=True):
        asked = torch.cat([beginning.continuations[0].tokens, text])
        if limit is not None and len(beginning.prefix) + len(asked) > limit:
            raise VITaskError(
                f"a prompt of {len(text)} tokens and its images ({len(beginning.prefix)}) are longer than the model's "
                f"{limit} tokens; shorten the question{advice}"
            )
        documents.append(replace(beginning, continuations=[Continuation(asked, torch.full_like(asked, IGNORE))]))
    return Prompts(pool, documents)


def alike(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Which of the different keys each one is, and where each different key comes first."""
    numbers: dict[Hashable, int] = {}
    own = [numbers.setdefault(key, len(numbers)) for key in keys]
    return own, [own.index(number) for number in range(len(numbers))]
