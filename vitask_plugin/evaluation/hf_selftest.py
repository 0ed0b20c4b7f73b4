"""Before the first answer: is what a model is asked here what its own forward says of the same conversations?

As in training (`training.selftest`): a shared prefix is a claim about a model, tried on the user's own. Where it does
not hold, each prompt gets a forward of its own; where that is not right either, the model is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.decoding import no_numbers
from vitask_plugin.hf import families
from vitask_plugin.hf.conversation import joined
from vitask_plugin.hf.prompting import as_input
from vitask_plugin.hf.reference import branch_logits
from vitask_plugin.method.branches import IGNORE, LAYOUTS, Layout, Prompts, common
from vitask_plugin.training import selftest


@dataclass(frozen=True)
class Asked:
    """A question with answers, in tokens.

    Attributes:
        prefix: [P] token ids with expanded images. end: P, or 0 without an image. text: ids up to the answer.
        answered: per answer, ids of text, answer and end token. inputs: of the images. exemplar: [E, D], or None.
    """

    prefix: Tensor
    end: int
    text: list[int]
    answered: list[list[int]]
    inputs: dict[str, Tensor]
    exemplar: Tensor | None


def choose(
    model: Any, scored: Prompts, asked: Sequence[Asked], folder: Path, *, image_id: int, replaces: bool
) -> tuple[type[Layout], str]:
    """How to ask this model, and a line that says why.

    Args:
        scored: the same questions, with one continuation per answer. folder: of the checkpoint, for messages.
        replaces: exemplars stand in place of the image tokens, of id `image_id`.

    Raises:
        VITaskError: no layout gives the model's own numbers, or those are none.
    """
    stock = _stock_logits(model, asked, image_id=image_id, replaces=replaces)
    if stock.isnan().any():
        raise no_numbers(folder)
    limit, differences = selftest.bound(stock.dtype), {}
    for name in ("packed", "branches") if families.may_pack(model, stock.dtype) else ("branches",):
        layout = LAYOUTS[name].of(scored.documents).to(scored.pool.device)
        logits = model.lm_head(model.vitask_states(layout, scored.pool))
        differences[name] = selftest.difference(logits, stock)
        if differences[name] <= limit:
            return LAYOUTS[name], _line(name, differences[name], differences.get("packed"), limit, model)
    figures = ", ".join(f"{name} {figure:.1e}" for name, figure in differences.items())
    raise VITaskError(
        f"vitask_hf would not judge {str(folder)!r} by its own numbers: on its first prompts the logits differ from "
        f"the stock forward of {type(model).__name__} by {figures} of their size (at most {limit:.0e} is rounding); "
        "evaluate it with lmms-eval's own adapter"
    )


def _line(name: str, difference: float, packed: float | None, limit: float, model: Any) -> str:
    own = f"{difference:.1e} of the logits' size from stock forwards"
    if name == "packed":
        return f"one forward for all answers, {own}"
    why = "it has layers that no mask reaches"
    if packed is not None:
        why = f"{packed:.1e} if they shared their prompt (at most {limit:.0e} is rounding)"
    return f"a forward of its own for each answer of {type(model).__name__}, {own}: {why}"


def _stock_logits(model: Any, asked: Sequence[Asked], *, image_id: int, replaces: bool) -> Tensor:
    """[n, V] logits that predict the answers' tokens, by one stock forward each."""
    found, like = [], model.lm_head.weight
    for one in asked:
        start = min(common(one.text, answer) for answer in one.answered)
        for answer in one.answered:
            ids = torch.cat([one.prefix, torch.tensor(answer)])
            labels = ids.clone()
            labels[: len(one.prefix) + start] = IGNORE
            item = {"input_ids": ids, "labels": labels, "end": one.end, "inputs": joined([one.inputs], len(ids))}
            words = {"image_id": image_id, "replaces": replaces and one.exemplar is not None}
            found.append(branch_logits(model, item, one.exemplar, **words, ready=partial(as_input, like=like)))
    return torch.cat(found)
