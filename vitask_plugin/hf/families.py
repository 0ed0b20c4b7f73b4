"""Where the parts of an HF vision-language model are, and what its decoder asks of a mask.

Most is asked of the model itself. What is told here is what its configuration does not say.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitask_plugin.errors import VITaskError

# Paths below the model. A tower may hold the projector, which is then no part of it.
TOWERS = ("model.vision_tower", "model.visual", "model.vision_model")
PROJECTORS = (
    *("model.multi_modal_projector", "model.image_newline"),
    *("model.visual.merger", "model.visual.deepstack_merger_list", "model.connector"),
)
# Families whose decoder lets the tokens of an image see each other.
IMAGES_SEE_THEMSELVES = ("gemma3", "gemma3_text")
# Kinds of layers in `layer_types` whose state depends on what the mask lets through and on nothing else.
MASKED_LAYERS = frozenset({"full_attention", "sliding_attention"})


@functools.cache
def images_reach_beyond_windows() -> bool:
    """Whether the installed transformers lets tokens of an image see each other whatever the window, as it once did."""
    from transformers.models.gemma3 import modeling_gemma3

    return not hasattr(modeling_gemma3, "create_masks_for_vision_model")


def decoder(model: nn.Module) -> nn.Module:
    """The language model that turns embeddings into hidden states.

    Raises:
        VITaskError: the model has none of the usual name.
    """
    found = getattr(model.model, "language_model", None)
    if found is None:
        raise VITaskError(
            f"{type(model).__name__} has no `model.language_model`, which VITask computes branches with; see "
            "docs/hosts.md for how a family is added"
        )
    return found


def image_token(config: Any, name: str) -> int:
    """Id of an expanded image token.

    Raises:
        VITaskError: the configuration names none.
    """
    found = getattr(config, "image_token_id", None)
    if found is None:
        found = getattr(config, "image_token_index", None)
    if found is None:
        raise VITaskError(
            f"the config.json of {name!r} names no image token (image_token_id), so it is no vision-language model of "
            "a kind that VITask trains; give one that AutoModelForImageTextToText loads"
        )
    return found


def parts(model: nn.Module, paths: tuple[str, ...]) -> list[tuple[str, nn.Module | nn.Parameter]]:
    """(path, part) of those that the model has."""
    return [(path, part) for path in paths if (part := _at(model, path)) is not None]


def _at(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def weights(part: nn.Module | nn.Parameter) -> Iterator[nn.Parameter]:
    return iter([part]) if isinstance(part, nn.Parameter) else part.parameters()


def freeze(model: nn.Module, *, tower: bool, projector: bool, language_model: bool) -> None:
    """Freezes the parts that are named, and trains all others."""
    model.requires_grad_(True)
    inside = {id(one) for _, part in parts(model, PROJECTORS) for one in weights(part)}
    towers = [one for _, part in parts(model, TOWERS) for one in weights(part) if id(one) not in inside]
    for frozen, found in (
        (tower, towers),
        (projector, [one for _, part in parts(model, PROJECTORS) for one in weights(part)]),
        (language_model, [*decoder(model).parameters(), *model.lm_head.parameters()]),
    ):
        for one in found:
            one.requires_grad_(not frozen)


def lora_targets(model: nn.Module) -> str:
    """A pattern of every linear layer in the decoder, as upstream LLaVA adapts them."""
    names = {name.rpartition(".")[2] for name, part in decoder(model).layers.named_modules() if _is_linear(part)}
    return rf".*\.language_model\.layers\..*\.({'|'.join(sorted(names))})"


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear)


def may_pack(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether comparing numbers can show that a shared prefix is right: below float32 a leak through a layer that no
    mask reaches may hide in the noise."""
    return dtype == torch.float32 or MASKED_LAYERS.issuperset(layer_kinds(decoder(model).config))


def layer_kinds(config: Any) -> tuple[str, ...]:
    """The kinds of layers that a decoder's configuration lists; nothing where all are alike."""
    return tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
