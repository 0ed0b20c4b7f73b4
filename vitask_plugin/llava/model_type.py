"""Which class a model is loaded with: its own `config.json` says it, never what its folder is called."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError

MODEL_TYPES = ("llama", "llava", "llava_llama")
TOWER_TYPES = ("clip", "clip_vision_model")


class ModelPath(str):
    """--model_name_or_path without an answer to `"mpt" in path`.

    By that upstream's script decides for its MPT class, which runs code out of the folder, and for the tokenizer.
    """

    def __contains__(self, part: str) -> bool:
        return part != "mpt" and super().__contains__(part)


def check_llama(config: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a language model that upstream's `LlavaLlamaForCausalLM` would load as something that it is not.

    Args:
        config: its `config.json`; empty where there is none, which loading it says.

    Raises:
        VITaskError: naming the model_type that was found and those that are supported.
    """
    found = config.get("model_type", MODEL_TYPES[0])
    if found in MODEL_TYPES and "text_config" in config:
        found = f"{found} in the layout of transformers' own LLaVA"  # the same name for other weights
    if found not in MODEL_TYPES:
        raise VITaskError(
            f"the model in {str(path)!r} is of model_type {found}, and VITask trains and judges Llamas as LLaVA 1.5 "
            f"lays them out ({', '.join(MODEL_TYPES)}); give one of those, such as Vicuna or LLaVA 1.5"
        )


def check_tower(config: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a vision tower that is no CLIP: upstream takes any folder for one. `config`: its `config.json`.

    Raises:
        VITaskError: naming the model_type that was found and those that are supported.
    """
    found = config.get("model_type", TOWER_TYPES[0])
    if found not in TOWER_TYPES:
        raise VITaskError(
            f"the vision tower in {str(path)!r} is of model_type {found}, and upstream loads every tower as CLIP "
            f"({', '.join(TOWER_TYPES)}); give a CLIP tower, such as openai/clip-vit-large-patch14-336"
        )
