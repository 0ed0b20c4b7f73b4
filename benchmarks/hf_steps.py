"""Training steps of the HF host to measure: the stock model's, and VITask's on the same weights and samples."""

from types import SimpleNamespace
from typing import Any

import torch
from hf_workload import HfWorkload
from steps import Steps
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vitask_plugin.hf import families, loading
from vitask_plugin.hf.model import with_vitask
from vitask_plugin.method.branches import IGNORE


class HfSteps(Steps):
    """Of one family. What is frozen is what the host freezes by default: the vision tower."""

    _workload: HfWorkload

    def make_model(self, upstream: bool) -> Any:
        settings, config = self.settings, self._workload.config
        made = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)] if upstream else with_vitask(config)
        model = made._from_config(config, dtype=getattr(torch, settings.dtype)).to(settings.device)
        model.config.use_cache = False
        families.freeze(model, tower=True, projector=False, language_model=False)
        return model

    def stock_view(self, model: Any) -> Any:
        """The same model: without a `vitask` batch its forward is the stock one."""
        return model

    def decoder(self, model: Any) -> nn.Module:
        return families.decoder(model)

    def add_lora(self, model: Any) -> None:
        rank = self.settings.lora_rank
        model.requires_grad_(False)
        # Changes the model in place; its wrapper is not needed.
        loading.add_lora(model, SimpleNamespace(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.05), projector=True)

    def lean_loss(self, batch: dict[str, Any]) -> Tensor:
        """The stock loss with logits at the answers alone, see `steps.lean_vanilla_loss`."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = self._vanilla.model(**inputs).last_hidden_state
        predicts = batch["labels"][:, 1:] != IGNORE
        logits = self._vanilla.lm_head(hidden[:, :-1][predicts])
        return nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:][predicts])
