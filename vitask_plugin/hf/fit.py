"""Any HF vision-language model as a host of `vitask connector fit`."""

from typing import Any

import torch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.hf import loading
from vitask_plugin.hf.arguments import TrainingArguments
from vitask_plugin.hf.batch import VITaskDataset
from vitask_plugin.hf.trainer import VITaskTrainer
from vitask_plugin.training import workarounds
from vitask_plugin.training.fit import FitHost


class HfFit(FitHost):
    """transformers' training arguments and our trainer on a checkpoint in HF format, an adapter merged into it."""

    arguments, trainer = TrainingArguments, VITaskTrainer

    def prepare(self) -> None:
        workarounds.prepare(TrainingArguments)

    def load(self, path: str, base: str | None, dtype: torch.dtype) -> loading.Loaded:
        return loading.load(path, base, dtype=dtype)

    def data(self, loaded: loading.Loaded, vitask: VITaskArguments, data: str, image_folder: str) -> Any:
        template, text = loaded.template, loaded.model.config.get_text_config()
        # What the checkpoint's own run was cut at is not known; the decoder's own limit cuts no more than it did.
        return VITaskDataset(data, image_folder, template, text.max_position_embeddings, vitask)
