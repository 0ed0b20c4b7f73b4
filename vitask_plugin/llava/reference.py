"""The slow, obvious way: upstream's forward of one branch alone, its exemplar in place of tokens of no meaning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from torch import Tensor, nn

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.llava.batch import VITaskDataset
from vitask_plugin.method.reference import embedded_as, unused_token
from vitask_plugin.method.sampler import Contrasted


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
    dataset: VITaskDataset,
    vitask: VITaskArguments,
    pair: Sequence[Contrasted],
    ready: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """See `Host.reference_logits`."""
    found: dict[str, list[Tensor]] = {"plain": [], "prompted": [], "negative": []}
    how = {"limit": dataset.tokenizer.model_max_length, "ready": ready}
    for index, negative in pair:
        instance = dataset[index]
        found["plain"].append(branch_logits(model, instance, instance["image"], **how))
        if vitask.uses_exemplar:
            exemplar = model.exemplars(ready(instance["tsm_features"][None]))[0]
            replaces = vitask.vitask_ep == "replace"
            found["prompted"].append(
                branch_logits(model, instance, instance["image"], exemplar, replaces=replaces, **how)
            )
        if vitask.uses_negatives:
            found["negative"].append(branch_logits(model, instance, dataset[negative]["image"], **how))
    return {kind: torch.cat(logits) for kind, logits in found.items() if logits}
