"""The seam: what the training system asks of a host, found by building two of them.

A host's trainer inherits `VITaskTraining`, and with it this class, before its own Trainer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitask_plugin.training.batches import BranchedBatches
from vitask_plugin.training.exemplars import Exemplars


class Host:
    """What depends on the code base or the family of models. The defaults are those of a plain HF model.

    Attributes:
        _vlm: the model, without PEFT's wrapper.
        no_answer: another cause than length of samples without an answer, as the rest of a sentence.
    """

    _vlm: nn.Module
    no_answer = ""

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self._vlm.config.get_text_config()

    @property
    def width(self) -> int:
        """D, the width of the language model's embeddings."""
        return self.text_config.hidden_size

    def check_model(self, args: Any) -> None:
        """Refuses a model that these flags do not go with, before anything long begins."""

    def choose_attention(self, implementation: str) -> None:
        """Gives the decoder, and it alone, an attention that takes a mask of one's own."""
        self.text_config._attn_implementation = implementation

    def continue_stage(self, model: nn.Module, args: Any) -> None:
        """Loads what --vitask_connector_path taught the language model in the earlier stage."""
        raise NotImplementedError

    def last_changes(self) -> None:
        """What a host changes in the model last, before the Trainer is made of it."""

    def collator(self, dataset: Any, exemplars: Exemplars) -> BranchedBatches:
        """Of this run's batches; all of the model is known."""
        raise NotImplementedError

    def may_pack(self, dtype: torch.dtype) -> bool:
        """Whether numbers in this dtype can show that a shared prefix is right for the model."""
        return True

    def reference_logits(self, pair: list[Any]) -> dict[str, Tensor]:
        """[n, V] logits of stock forwards of one branch each, for the self-test.

        Args:
            pair: two samples, each other's negative if there are negatives.

        Returns:
            {"plain", and where the run has them "prompted" and "negative"}: of both samples, in their order.
        """
        raise NotImplementedError

    def branch_logits(self, batch: dict[str, Any]) -> Tensor:
        """[n, V] logits of a collated batch's layout, without a loss."""
        raise NotImplementedError

    def own_rates(self) -> dict[str, float]:
        """`{part: learning rate}` of parts that have a rate of their own, the connector aside."""
        return {}

    def weights_apart(self) -> dict[str, Tensor]:
        """Weights that belong into a checkpoint and are not in the model's state dict."""
        return {}

    def finish_folder(self, directory: str) -> None:
        """What makes a folder with weights a checkpoint that the stock code base loads; one process calls it."""
