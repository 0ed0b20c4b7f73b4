"""transformers' Trainer as a host of VITask training, for any HF vision-language model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from vitask_plugin.hf import families, loading, reference
from vitask_plugin.hf.batch import VITaskCollator, VITaskDataset
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.model_folder import has_adapter
from vitask_plugin.training import precision, selftest
from vitask_plugin.training.batches import pad_of
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.trainer import VITaskTraining


class HFTrainer(Trainer):
    """transformers' Trainer, and a run that is resumed has the weights of its checkpoint."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_adapter(resume_from_checkpoint) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            loading.reload(self.model if model is None else model, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Under DeepSpeed each name of a tied weight comes as a tensor of its own, and would be written twice.
        if state_dict is not None:
            once = {name for name, _ in self.model.named_parameters()}
            again = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - once
            state_dict = {name: weight for name, weight in state_dict.items() if name not in again}
        super()._save(output_dir, state_dict)


class VITaskTrainer(VITaskTraining, HFTrainer):
    """Of a model of `with_vitask`, with PEFT's adapters or without."""

    def choose_attention(self, implementation: str) -> None:
        families.decoder(self._vlm).config._attn_implementation = implementation

    def continue_stage(self, model: nn.Module, args: Any) -> None:
        start = self._vlm.config.name_or_path
        loading.continue_stage(model, start, self.vitask.vitask_connector_path, args.lora_enable)

    def collator(self, dataset: VITaskDataset, exemplars: Exemplars) -> VITaskCollator:
        return VITaskCollator(dataset, exemplars, self.vitask, pad=pad_of(dataset.tokenizer))

    def may_pack(self, dtype: torch.dtype) -> bool:
        return families.may_pack(self._vlm, dtype)

    def reference_logits(self, pair: list[Contrasted]) -> dict[str, Tensor]:
        first, dtype = pair[0].index, precision.compute_dtype(self.args, self._vlm.dtype)
        reference.check_causal(
            self._vlm,
            self.train_dataset.encoded(first, first),
            str(self._vlm.config.name_or_path),
            selftest.bound(dtype),
            image_id=self.train_dataset.template.image_id,
            ready=self._prepare_input,
        )
        return reference.pair_logits(self._vlm, self.data_collator, pair, self._prepare_input)

    def branch_logits(self, batch: dict[str, Any]) -> Tensor:
        vitask = batch["vitask"]
        inputs = {name: value for name, value in batch.items() if name != "vitask"}
        return self._vlm.vitask_logits(vitask["branches"].layout, inputs, vitask.get("features"))
