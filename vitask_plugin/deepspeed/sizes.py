"""How many parameters a model has, and how many of them are trained: what the memory estimates are made of."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vitask_plugin.errors import VITaskError
from vitask_plugin.method.connector import ExemplarConnector

TSM_WIDTH = 768  # of ViT-Base, the paper's TSM; the connector is all that depends on it


@dataclass(frozen=True)
class Sizes:
    """Parameters, in elements.

    Attributes:
        llm, projector, connector, adapters: of the parts that ZeRO-3 divides among ranks. tower: kept whole, unless
            `divides_tower`, as where it is loaded with the model.
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
    divides_tower: bool = False

    @property
    def divided(self) -> int:
        """What ZeRO-3 divides among ranks."""
        return self.llm + self.projector + self.connector + self.adapters + self.tower - self.whole

    @property
    def whole(self) -> int:
        """What every rank keeps."""
        return 0 if self.divides_tower else self.tower

    @property
    def total(self) -> int:
        return self.divided + self.whole

    def gathered(self, persistence: int) -> tuple[int, int]:
        """Elements of parameters that are larger than ZeRO-3's persistence threshold; the others stay on every rank.

        Returns:
            Of all divided parts, and of the decoder's layers among them.
        """
        every, layers = (
            sum(numel for numel in numels if numel > persistence) for numels in (self.numels, self.layer_numels)
        )
        return every, layers


def connector_of(width: int) -> ExemplarConnector:
    """The connector from `TSM_WIDTH` to an LLM of `width`."""
    return ExemplarConnector("mlp2x_gelu", TSM_WIDTH, width)


def check_rank(lora_r: int | None) -> None:
    """Raises:
    VITaskError: a rank below 1.
    """
    if lora_r is not None and lora_r < 1:
        raise VITaskError(f"--lora-r is {lora_r}; it must be at least 1")


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())  # parameters() lists a shared one once


def largest_layer(model: nn.Module) -> int:
    """As DeepSpeed's estimators define it."""
    return max(sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules())
