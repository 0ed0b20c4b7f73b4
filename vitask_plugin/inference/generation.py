"""Free text after prompts: what several of them share is computed once, then transformers' `generate` goes on.

The prompts are laid out as the branches of training are (`branches.Packed`), one forward fills a key-value cache with
all of them, and each prompt takes its part of it: that of the prefix, shared, and that of its own text. Where a shared
prefix is not right for a model, each prompt has a row of its own.

Shapes: A prompts, N positions of a prompt but its last, padded on the left, R rows of the layout, L positions of a row,
H heads of keys and values, D hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vitask_plugin.method.branches import (
    NOWHERE,
    Continuation,
    Document,
    Layout,
    Packed,
    Prompts,
    Rows,
    behind_of,
    labelled,
)


@dataclass(frozen=True)
class Begun:
    """Prompts that a model has read but for the last token of each.

    Attributes:
        cache: keys and values of N positions of each prompt, each repeated for every beam.
        places: [A, N + 1] in the pool; 0 on pads. mask: [A, N + 1], 0 on pads, else 1.
    """

    cache: DynamicCache
    places: Tensor
    mask: Tensor


@torch.no_grad()
def begin(model: Any, prompts: Prompts, cache: DynamicCache, *, num_beams: int = 1, shares: bool = True) -> Begun:
    """Fills an empty cache with the prompts; in float32 as each prompt alone would.

    Args:
        model: of any host; has `vitask_states`.
        prompts: documents with the same prefix (the same places in the pool) share it, if the model `shares`.
    """
    device = prompts.pool.device
    whole = [torch.cat([one.prefix, one.continuations[0].tokens]) for one in prompts.documents]
    mask = _left_padded([torch.ones_like(one) for one in whole]).to(device)
    # A beam search repeats its inputs itself, but not the cache.
    if shares:
        documents, order = _by_prefix(prompts.documents)
        past = _read_shared(model, Prompts(prompts.pool, documents), cache)
        places = _left_padded([past[number] for number in order]).repeat_interleave(num_beams, dim=0).to(device)
        for layer in cache.layers:
            layer.keys, layer.values = _taken(layer.keys, places), _taken(layer.values, places)
    else:
        rows = _Alone.of(prompts.documents).to(device)
        model.vitask_states(rows, prompts.pool, past_key_values=cache, use_cache=True)
        # Not `batch_repeat_interleave`, which layers of linear attention lack.
        cache.reorder_cache(torch.arange(len(whole), device=device).repeat_interleave(num_beams))
    return Begun(cache, _left_padded(whole).to(device), mask)


def generate(
    model: Any,
    prompts: Prompts,
    continue_generation: Callable[..., Tensor],
    *,
    num_beams: int = 1,
    **kwargs: Any,
) -> Tensor:
    """Generated token ids [A, new tokens], in the order of the prompts; in float32 those of each prompt alone.

    Args:
        model: has `vitask_states`, and takes its positions from the mask. prompts: with a pool [N, D].
        continue_generation: transformers' `generate` of the model.
        num_beams, kwargs: of `generate`.
    """
    begun = begin(model, prompts, DynamicCache(), num_beams=num_beams)
    return continue_generation(
        inputs_embeds=prompts.pool[begun.places],
        attention_mask=begun.mask,
        past_key_values=begun.cache,
        use_cache=True,
        num_beams=num_beams,
        **kwargs,
    )


def _by_prefix(documents: list[Document]) -> tuple[list[Document], list[int]]:
    """The same prompts with one document per prefix, and which of its prompts each given one has become."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, document in enumerate(documents):
        groups.setdefault(tuple(document.prefix.tolist()), []).append(number)
    shared = [
        replace(documents[numbers[0]], continuations=[documents[number].continuations[0] for number in numbers])
        for numbers in groups.values()
    ]
    sequence = [number for numbers in groups.values() for number in numbers]
    return shared, sorted(range(len(sequence)), key=sequence.__getitem__)


def _read_shared(model: Any, prompts: Prompts, cache: DynamicCache) -> list[Tensor]:
    """Fills a cache with keys and values [R, H, L, D / heads] of everything but the last token of each prompt, which
    `generate` computes, and says for each prompt where in the flattened [R * L] positions its own lie.
    """
    # With every token labelled, the layout says where what precedes each token lies.
    documents = [
        replace(one, continuations=[Continuation(part.tokens, part.tokens) for part in one.continuations])
        for one in prompts.documents
    ]
    layout = Packed.of(documents)
    model.vitask_states(layout.to(prompts.pool.device), prompts.pool, past_key_values=cache, use_cache=True)
    lengths = [len(labelled(one, part)) for one in documents for part in one.continuations]
    prefixes = [len(one.prefix) for one in documents for _ in one.continuations]
    past = []
    for before, prefix in zip(layout.predictors.split(lengths), prefixes, strict=True):
        first = int(before[0])  # with a prefix: the last position of it
        past.append(torch.cat([torch.arange(first + 1 - prefix, first), before]) if prefix else before)
    return past


@dataclass
class _Alone(Layout):
    """Each prompt but its last token in a row of its own, padded on the left: [A, N] each, see `Rows`."""

    source: Tensor
    position_ids: Tensor
    behind: Tensor
    until: Tensor
    valid: Tensor

    @classmethod
    def of(cls, documents: list[Document]) -> "_Alone":
        source, index, behind = [], [], []
        for one in documents:
            tokens = torch.cat([one.prefix, one.continuations[0].tokens])[:-1]
            own = len(tokens) - len(one.prefix)
            source.append(tokens)
            index.append(torch.arange(len(tokens)))
            behind.append(behind_of(one, own))
        valid = _left_padded([torch.ones_like(tokens) for tokens in source])
        # Every token sees what is before it in its row; a pad itself alone.
        until = torch.where(valid.bool(), valid.shape[1], torch.arange(1, valid.shape[1] + 1))
        behind = pad_sequence(behind, batch_first=True, padding_value=NOWHERE, padding_side="left")
        return cls(_left_padded(source), _left_padded(index), behind, until, valid)

    @property
    def positions(self) -> int:
        return self.source.numel()

    def states(self, decoder: Callable[[Rows], Tensor]) -> Tensor:
        """[A, N, D]."""
        return decoder(Rows(self.source, self.position_ids, self.behind, self.until, self.valid))


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """[R, H, L, width] -> [A, H, N, width], the flattened [R * L] positions `places` [A, N]."""
    return states.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)


def _left_padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_side="left")
