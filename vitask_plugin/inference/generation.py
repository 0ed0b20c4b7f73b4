"""Free text after prompts: what several of them share is computed once, then transformers' `generate` goes on.

The prompts are laid out as the branches of training are (`branches.Packed`), one forward fills a key-value cache with
all of them, and each prompt takes its part of it: that of the prefix, shared, and that of its own text.

Shapes: A prompts, N positions of a prompt but its last, padded on the left, R rows of the layout, L positions of a row,
H heads of keys and values, D hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vitask_plugin.method.branches import Continuation, Document, Packed, Prompts, Rows, labelled


@torch.no_grad()
def generate(model: Any, prompts: Prompts, continue_generation: Any, *, num_beams: int = 1, **kwargs: Any) -> Tensor:
    """Generated token ids [A, new tokens], in the order of the prompts; in float32 those of each prompt alone.

    Args:
        model: a `VITaskLlavaLlamaForCausalLM`.
        prompts: documents with the same prefix (the same places in the pool) share it.
        continue_generation: transformers' `generate` of the model.
        num_beams, kwargs: of `generate`.
    """
    device = prompts.pool.device
    shared, order = _by_prefix(prompts.documents)
    cache, past = _prefill(model, Prompts(prompts.pool, shared))
    past = [past[number] for number in order]
    whole = [torch.cat([one.prefix, one.continuations[0].tokens]) for one in prompts.documents]
    mask = _left_padded([torch.ones_like(one) for one in whole]).to(device)
    # A beam search repeats its inputs itself, but not the cache.
    places = _left_padded(past).repeat_interleave(num_beams, dim=0).to(device)
    for layer in cache.layers:
        layer.keys, layer.values = _taken(layer.keys, places), _taken(layer.values, places)
    return continue_generation(
        inputs_embeds=prompts.pool[_left_padded(whole).to(device)],
        attention_mask=mask,
        past_key_values=cache,
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
        Document(documents[numbers[0]].prefix, [documents[number].continuations[0] for number in numbers])
        for numbers in groups.values()
    ]
    sequence = [number for numbers in groups.values() for number in numbers]
    return shared, sorted(range(len(sequence)), key=sequence.__getitem__)


def _prefill(model: Any, prompts: Prompts) -> tuple[DynamicCache, list[Tensor]]:
    """Keys and values [R, H, L, D / heads] of everything but the last token of each prompt, which `generate` computes,
    and for each prompt where in the flattened [R * L] positions its own lie.
    """
    # With every token labelled, the layout says where what precedes each token lies.
    documents = [
        Document(one.prefix, [Continuation(part.tokens, part.tokens) for part in one.continuations])
        for one in prompts.documents
    ]
    layout, cache = Packed.of(documents), DynamicCache()

    def decode(rows: Rows) -> Tensor:
        return model.model(
            inputs_embeds=rows.embedded(prompts.pool),
            attention_mask=rows.mask(model.config._attn_implementation, prompts.pool.dtype),
            position_ids=rows.position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    layout.to(prompts.pool.device).states(decode)
    lengths = [len(labelled(one, part)) for one in documents for part in one.continuations]
    prefixes = [len(one.prefix) for one in documents for _ in one.continuations]
    past = []
    for before, prefix in zip(layout.predictors.split(lengths), prefixes, strict=True):
        first = int(before[0])  # with a prefix: the last position of it
        past.append(torch.cat([torch.arange(first + 1 - prefix, first), before]) if prefix else before)
    return cache, past


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """[R, H, L, width] -> [A, H, N, width], the flattened [R * L] positions `places` [A, N]."""
    return states.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)


def _left_padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_side="left")
