"""A PEFT adapter of any `AutoModelForImageTextToText` as whole weights, with the processor of the model."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, PROCESSOR_FILES, TOKENIZER_FILES, copy_files
from vitask_plugin.record.base import check

_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def merge(path: Path, base: str | Path | None, directory: Path) -> str:
    """Writes the merged model, its configuration, tokenizer and processor into `directory`; returns the base.

    Args:
        base: None = the one that the adapter's configuration names.

    Raises:
        VITaskError: no base, one that cannot be loaded, or one that the adapter does not fit.
    """
    base = base or read_json(path / ADAPTER_CONFIG_FILE, "adapter configuration").get("base_model_name_or_path")
    if not base:
        raise VITaskError(
            f"the adapter in {str(path)!r} does not say which model it was trained from; name it with --model-base"
        )
    check(path, base)
    model, dtype = _load(base)
    merged(model, path, base).to(dtype).save_pretrained(directory)
    _copy_processor(path, base, directory)
    return str(base)


def _load(base: str | Path) -> tuple[Any, torch.dtype]:
    """The model in float32, and the dtype of its weights as they are saved."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
        return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), dtype
    except _UNREADABLE as error:
        raise VITaskError(
            f"the base model {str(base)!r} cannot be loaded as one of images and text ({_first_line(error)}); give the "
            "folder of the model that the adapter was trained from with --model-base"
        ) from None


def merged(model: Any, path: Path, base: str | Path) -> Any:
    """A base with the adapter in `path` merged into its weights. `base`: as it is called.

    Raises:
        VITaskError: an adapter of another base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are missing, which is refused below
            adapted = PeftModel.from_pretrained(model, path)
        saved = load_peft_weights(str(path), device="cpu")
        other = sorted(saved.keys() ^ get_peft_model_state_dict(adapted).keys())
        if other:
            raise ValueError(f"{other[0]!r} is in one of them alone")
    except _UNREADABLE as error:
        raise VITaskError(
            f"the adapter in {str(path)!r} does not fit the model {str(base)!r} ({_first_line(error)}); give the model "
            "that it was trained from with --model-base (lmms-eval: model_base=)"
        ) from None
    return adapted.merge_and_unload()


def _copy_processor(path: Path, base: str | Path, directory: Path) -> None:
    """That of the adapter's folder if it has one, else the base's."""
    names = (*PROCESSOR_FILES, *TOKENIZER_FILES)
    source = path if any((path / name).is_file() for name in names) else Path(base)
    if source.is_dir():
        copy_files(source, directory, names)
    else:
        from transformers import AutoProcessor

        AutoProcessor.from_pretrained(base).save_pretrained(directory)


def _first_line(error: Exception) -> str:
    """Of the error's words; torch's first line announces a list, of which the first item is added."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
