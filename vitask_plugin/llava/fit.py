"""LLaVA as a host of `vitask connector fit`."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.llava import compat, flags, loading
from vitask_plugin.training.fit import FitHost


class LlavaFit(FitHost):
    """Upstream's training arguments and our trainer on a LLaVA checkpoint."""

    def prepare(self) -> None:
        compat.prepare()

    @property
    def arguments(self) -> type:
        from llava.train.train import TrainingArguments

        return TrainingArguments

    @property
    def trainer(self) -> type:
        from vitask_plugin.llava.trainer import VITaskTrainer

        return VITaskTrainer

    def load(self, path: str, base: str | None, dtype: torch.dtype) -> loading.Loaded:
        loaded = loading.load(path, base, dtype=dtype)
        flags.one_view(vars(loaded.model.config), path)
        return loaded

    @contextlib.contextmanager
    def speaking(self, version: str) -> Iterator[None]:
        """The conversation template of the training run, where upstream's dataset looks for it."""
        from llava import conversation

        before = conversation.default_conversation
        # As in upstream's script: these keep the default, what is unknown is vicuna_v1.
        if version not in ("v0", "v0.5"):
            known = conversation.conv_templates
            conversation.default_conversation = known.get(version, known["vicuna_v1"])
        try:
            yield
        finally:
            conversation.default_conversation = before

    def data(self, loaded: loading.Loaded, vitask: VITaskArguments, data: str, image_folder: str) -> Any:
        from vitask_plugin.llava.batch import VITaskDataset

        config, tokenizer = loaded.model.config, loaded.tokenizer
        config.tokenizer_padding_side = tokenizer.padding_side = "right"
        config.use_cache = False
        tokenizer.model_max_length = config.tokenizer_model_max_length
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        how = SimpleNamespace(
            image_folder=image_folder,
            image_processor=loaded.image_processor,
            image_aspect_ratio=config.image_aspect_ratio,
            is_multimodal=True,
            mm_use_im_start_end=config.mm_use_im_start_end,
        )
        return VITaskDataset(data, tokenizer, how, vitask=vitask)
