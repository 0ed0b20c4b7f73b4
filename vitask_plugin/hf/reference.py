"""The slow, obvious way: the stock forward of one branch alone, its exemplar in place of tokens of no meaning.

What the layouts give is compared with it, by the self-test before the first step and by the tests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.batch import VITaskCollator
from vitask_plugin.method.branches import IGNORE
from vitask_plugin.method.reference import embedded_as, unused_token
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training import selftest


def branch_logits(
    model: nn.Module,
    item: Mapping[str, Any],
    exemplar: Tensor | None = None,
    *,
    image_id: int,
    replaces: bool = False,
    ready: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """[n, V] logits that predict the answers' tokens.

    Args:
        model: with the stock forward. item: an encoded sample, see `batch.EncodedSamples.encoded`.
        exemplar: [E, D] behind the prefix; `replaces`: in place of the image tokens, of id `image_id`.
        ready: moves a tensor as the Trainer does: to the device, and to DeepSpeed's dtype.
    """
    ids, end, inputs = item["input_ids"], item["end"], item["inputs"]
    count = 0 if exemplar is None else len(exemplar)
    before, behind = torch.arange(end), torch.arange(end, len(ids))
    if replaces:
        is_image = ids[:end] == image_id
        first = int(is_image.nonzero()[0])
        before, behind = torch.arange(first), torch.cat([torch.arange(first, end)[~is_image[first:]], behind])
        inputs = {name: value for name, value in inputs.items() if _per_token(name)}

    def with_exemplar(values: Tensor, blank: int) -> Tensor:
        return torch.cat([values[before], values.new_full((count,), blank), values[behind]])

    unused = unused_token(ids)
    labels = with_exemplar(item["labels"], IGNORE)
    put = ready(with_exemplar(ids, unused)[None])
    inputs = {name: with_exemplar(value[0], 0)[None] if _per_token(name) else value for name, value in inputs.items()}
    with embedded_as(model.get_input_embeddings(), unused, exemplar):
        logits = model(
            input_ids=put,
            attention_mask=torch.ones_like(put),
            **{name: ready(value) for name, value in inputs.items()},
            use_cache=False,
        ).logits[0]
    return logits[(labels[1:] != IGNORE).nonzero().squeeze(-1).to(logits.device)]


def _per_token(name: str) -> bool:
    return name.endswith("token_type_ids")


def check_causal(model: nn.Module, item: Mapping[str, Any], name: str, bound: float, **how: Any) -> None:
    """Refuses a model whose stock forward lets an answer's tokens see those behind them, as prefix-LMs may.

    Args:
        item: an encoded sample. bound: relative to the logits' size, what is rounding. how: see
            `branch_logits`.
    """
    answered = (item["labels"] != IGNORE).nonzero()
    if not len(answered):
        return  # cut off; said when its turn comes
    last = int(answered[-1])
    ids = item["input_ids"].clone()
    ids[last] = unused_token(ids)
    logits, other = (branch_logits(model, one, **how) for one in (item, {**item, "input_ids": ids}))
    differs = selftest.difference(other, logits)
    if differs > bound:
        raise VITaskError(
            f"in {name!r} an answer's tokens see those behind them (with another last token their logits differ by "
            f"{differs:.1e} of their size; at most {bound:.0e} is rounding), so it would learn to copy and not to "
            "answer; give a model whose decoder is causal"
        )


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
        how = {"image_id": dataset.template.image_id, "replaces": replaces, "ready": ready}
        return branch_logits(model, dataset.encoded(index, image), exemplar, **how)

    return selftest.references(model, collator, pair, branch, ready)
