"""Contrastive decoding at inference, the control for CRT: y(image) against y(no image), with no tuning at all.

    logits = (1 + w) y(image, instruction) - w y(instruction)

The form is that of visual contrastive decoding (VCD; Leng et al., 2024, arXiv 2311.16922), whose negative view is the
image under noise. Ours is the prompt without image and exemplar, as in M3ID (Favero et al., 2024, arXiv 2403.14003):
it has no noise level and no draw, and costs a continuation instead of a second image. VCD's cut-off for implausible
tokens is left out, so that every label keeps a likelihood.

Shapes: B prompts, n labelled tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vitask_plugin.inference.scoring import with_text
from vitask_plugin.method.branches import IGNORE, Continuation, Document, Layout, Prompts


def contrast(seen: Tensor, blind: Tensor, weight: float) -> Tensor:
    """(1 + w) y(image) - w y(no image), float32; any shape."""
    return (1 + weight) * seen.float() - weight * blind.float()


def without_image(ids: Sequence[int]) -> list[int]:
    """Token ids of a prompt without its images (which are negative)."""
    return [token for token in ids if token >= 0]


def blind_prompts(prompts: Sequence[Sequence[int]], like: Tensor, embed: Callable[[Tensor], Tensor]) -> Prompts:
    """The prompts as text alone.

    Args:
        prompts: token ids. like: a pool, for its width, dtype and device. embed: token ids [n] -> embeddings [n, D].
    """
    pool, places = with_text(like[:0], [without_image(prompt) for prompt in prompts], embed)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Prompts(pool, [Document(nothing, [Continuation(at, torch.full_like(at, IGNORE))]) for at in places])


def both(seen: Prompts, blind: Prompts) -> Prompts:
    """The B prompts, and behind them the B prompts as text alone, in one pool."""
    moved = [
        Document(
            document.prefix + len(seen.pool),
            [Continuation(part.tokens + len(seen.pool), part.labels, part.shared) for part in document.continuations],
        )
        for document in blind.documents
    ]
    return Prompts(torch.cat([seen.pool, blind.pool]), [*seen.documents, *moved])


class ContrastLogits(LogitsProcessor):
    """For greedy generation from `both`: the first half of the rows against the second, which is told the answer."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen, blind = scores.chunk(2)
        # What another processor has ruled out (-inf) stays so; the difference of two such would be NaN.
        contrasted = contrast(seen, blind, self.weight).masked_fill(seen.isneginf(), -torch.inf)
        return torch.cat([contrasted, contrasted])


class ContrastModel:
    """What label scoring needs of a model (`vitask_states`, `lm_head`), with contrasted logits.

    Args:
        model: a `VITaskLlavaLlamaForCausalLM`. blind: the same labels after the prompts as text alone.
    """

    def __init__(self, model: Any, blind: Prompts, weight: float) -> None:
        self.model, self.blind, self.weight = model, blind, weight

    def vitask_states(self, layout: Layout, pool: Tensor) -> Tensor:
        """[n, 2 D]: the state that predicts a labelled token given the image, beside the one without."""
        blind = type(layout).of(self.blind.documents).to(pool.device)
        states = self.model.vitask_states(layout, pool), self.model.vitask_states(blind, self.blind.pool)
        return torch.cat(states, dim=-1)

    def lm_head(self, states: Tensor) -> Tensor:
        """[n, 2 D] -> [n, V]."""
        seen, blind = (self.model.lm_head(half) for half in states.chunk(2, dim=-1))
        return contrast(seen, blind, self.weight)
