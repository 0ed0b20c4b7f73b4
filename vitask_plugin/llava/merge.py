"""A LoRA checkpoint of LLaVA 1.2.2 as whole weights, which stock `load_pretrained_model` takes without a base."""

from pathlib import Path

import torch

from vitask_plugin.llava import loading
from vitask_plugin.llava.export import check_base
from vitask_plugin.model_folder import TOKENIZER_FILES, copy_files, saved_dtype
from vitask_plugin.record import connector_file

# Parts of the model that have files of their own.
_ELSEWHERE = ("model.vision_tower.", f"{connector_file.CONNECTOR_NAME}.")


def merge(path: Path, base: str | Path | None, directory: Path) -> str:
    """Writes the merged model with its configuration and tokenizer into `directory`; returns the base.

    Raises:
        VITaskError: no base, or one that the adapter does not fit.
    """
    check_base(path, base)
    model = loading.load(path, base).model.to(getattr(torch, saved_dtype(base)))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith(_ELSEWHERE)}
    model.save_pretrained(directory, state_dict=weights)
    loading.name_stock_architecture(directory)
    copy_files(base, directory, TOKENIZER_FILES)
    return str(base)
