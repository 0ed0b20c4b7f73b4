"""The slow, obvious way: upstream's forward of one branch alone, its exemplar in place of tokens of no meaning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from torch import Tensor, nn

from vitask_plugin.llava.batch import VITaskCollator
from vitask_plugin.method.reference import embedded_as, unused_token
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training import selftest


def branch_logits(
    model: nn.Module,
    instance: dict[str, Any],
    image: Tensor,
    exemplar: Tensor | None = None,
    *,
    replaces: bool = False,
    limit: int,
    ready: Callable[[Tensor], Tensor],
) -> Tensor:
    """[n, V] logits that predict the answers' tokens.

    Args:
        instance: of upstream's data set. image: [3, S, S] that it is asked about.
        exemplar: [E, D] behind the image tokens, or in place of them. limit: positions; what is behind is cut.
        ready: moves a tensor as the Trainer does: to the device, and to DeepSpeed's dtype.
    """
    ids, labels = instance["input_ids"], instance["labels"]
    last = int((ids == IMAGE_TOKEN_INDEX).nonzero()[-1])
    count = 0 if exemplar is None else len(exemplar)
    start = last if replaces else last + 1
    unused = unused_token(ids)
    put = torch.cat([ids[:start], ids.new_full((count,), unused), ids[last + 1 :]])[None]
    known = torch.cat([labels[:start], ids.new_full((count,), IGNORE_INDEX), labels[last + 1 :]])[None]
    put, known, pixels = ready(put), ready(known), ready(image[None])
    with embedded_as(model.get_model().embed_tokens, unused, exemplar):
        _, positions, mask, _, embeds, expanded = model.prepare_inputs_labels_for_multimodal(
            put, None, torch.ones_like(put), None, known, pixels, [image.shape[-2:]]
        )
    logits = model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, return_dict=True
    ).logits[0]
    return logits[(expanded[0, 1:limit] != IGNORE_INDEX).nonzero().squeeze(-1)]


def pair_logits(
    model: nn.Module,
    collator: VITaskCollator,
    pair: Sequence[Contrasted],
    ready: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """See `Host.reference_logits`."""
    dataset, replaces_images = collator.dataset, collator.vitask.vitask_ep == "replace"

    def branch(index: int, image: int, exemplar: Tensor | None = None) -> Tensor:
        replaces = exemplar is not None and replaces_images
        how = {"replaces": replaces, "limit": dataset.tokenizer.model_max_length, "ready": ready}
        return branch_logits(model, dataset[index], dataset[image]["image"], exemplar, **how)

    return selftest.references(model, collator, pair, branch, ready)
