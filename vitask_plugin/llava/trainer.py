"""Upstream's trainer as a host of VITask training: its vision tower, its LoRA files, its flags."""

from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import flags, loading, reference
from vitask_plugin.llava.apart import set_apart, weights_apart
from vitask_plugin.llava.batch import VITaskCollator, VITaskDataset
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.model_folder import NON_LORA_FILE
from vitask_plugin.reading import model_config
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.trainer import VITaskTraining


class VITaskTrainer(VITaskTraining, LLaVATrainer):
    """Built by upstream's `train()` in place of its own trainer, after it set up model, LoRA and vision tower."""

    def __init__(self, *, data_collator: Any = None, **kwargs: Any) -> None:
        # Upstream's collator is made before image tokens and exemplars are known, and goes unused.
        super().__init__(**kwargs)

    @property
    def no_answer(self) -> str:
        return f", or the tokenizer does not fit --version {self._version} (upstream says 'tokenization mismatch' then)"

    def check_model(self, args: Any) -> None:
        if getattr(args, "tune_mm_mlp_adapter", False) and not args.lora_enable:
            raise VITaskError(
                "--tune_mm_mlp_adapter True makes upstream write the projector alone, which is no checkpoint to "
                "evaluate or to resume from; add --lora_enable True, with which the projector alone is trained too"
            )
        if args.lora_enable:
            words = self._vlm.get_input_embeddings().weight
            loaded = model_config(self._vlm.config.name_or_path)
            flags.check_vocabulary(getattr(words, "ds_shape", words.shape)[0], loaded)

    def choose_attention(self, implementation: str) -> None:
        # Not by set_attn_implementation(), which would change the vision tower's attention too.
        self._vlm.config._attn_implementation = implementation

    def continue_stage(self, model: nn.Module, args: Any) -> None:
        loading.continue_stage(
            model, self._vlm.config.name_or_path, self.vitask.vitask_connector_path, args.lora_enable
        )

    def last_changes(self) -> None:
        if is_deepspeed_zero3_enabled():
            set_apart(self._vlm)

    def collator(self, dataset: VITaskDataset, exemplars: Exemplars) -> VITaskCollator:
        tower = self._vlm.get_vision_tower()
        image_tokens = tower.num_patches + (tower.select_feature == "cls_patch")
        return VITaskCollator(dataset, exemplars, self.vitask, image_tokens=image_tokens)

    def reference_logits(self, pair: list[Contrasted]) -> dict[str, Tensor]:
        return reference.pair_logits(self._vlm, self.data_collator, pair, self._prepare_input)

    def branch_logits(self, batch: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "vitask"}
        return self._vlm.vitask_logits(**inputs, **batch["vitask"])

    def own_rates(self) -> dict[str, float]:
        return {} if self.args.mm_projector_lr is None else {"projector": self.args.mm_projector_lr}

    def weights_apart(self) -> dict[str, Tensor]:
        return weights_apart(self._vlm)

    def finish_folder(self, directory: str) -> None:
        loading.name_stock_architecture(directory)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        # Upstream's checkpoints of the projector alone cannot be resumed from; the usual ones of LoRA hold it too.
        self.args.tune_mm_mlp_adapter = False
        return super().train(resume_from_checkpoint, **kwargs)

    def _save_weights(self, output_dir: str, state_dict: dict[str, Tensor]) -> None:
        super()._save_weights(output_dir, state_dict)
        if not (self.args.lora_enable and self.args.should_save):
            return
        # What upstream writes beside the adapter after the last step, and not into a checkpoint.
        self._vlm.config.save_pretrained(output_dir)
        if not self.is_deepspeed_enabled:
            return  # `compat` has written the rest, which such a run resumes from
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        other = {name: weight.cpu() for name, weight in state_dict.items() if name in trained and "lora_" not in name}
        other = {name: weight for name, weight in other.items() if "vitask_connector." not in name}
        torch.save(other, Path(output_dir) / NON_LORA_FILE)
