"""How many parameters a model has, and how many of them are trained: what the memory estimates are made of."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sizes:
    """Parameters, in elements.

    Attributes:
        llm, projector, connector, adapters: of the parts that ZeRO-3 divides among ranks. tower: kept whole.
        trained: with full fine-tuning LLM and projector, with LoRA adapters and projector; stage 2, so that the
            connector is frozen.
        numels: of each parameter of the divided parts. layer_numels: of those in the decoder's layers.
        largest_layer: the most parameters that one module holds itself.
        config: of the LLM.
    """

    llm: int
    projector: int
    connector: int
    adapters: int
    tower: int
    trained: int
    numels: tuple[int, ...]
    layer_numels: tuple[int, ...]
    largest_layer: int
    config: Any

    @property
    def divided(self) -> int:
        """What ZeRO-3 divides among ranks."""
        return self.llm + self.projector + self.connector + self.adapters

    @property
    def total(self) -> int:
        return self.divided + self.tower

    def gathered(self, persistence: int) -> tuple[int, int]:
        """Elements of parameters that are larger than ZeRO-3's persistence threshold; the others stay on every rank.

        Returns:
            Of all divided parts, and of the decoder's layers among them.
        """
        every, layers = (
            sum(numel for numel in numels if numel > persistence) for numels in (self.numels, self.layer_numels)
        )
        return every, layers


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())  # parameters() lists a shared one once


def largest_layer(model: nn.Module) -> int:
    """As DeepSpeed's estimators define it."""
    return max(sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules())
