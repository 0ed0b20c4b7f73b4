"""How many parameters a LLaVA has, and how many of them are trained: counted on the real model, without its weights.

The model is built by upstream's class on torch's meta device, which keeps shapes and no data.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vitask_plugin.deepspeed.sizes import Sizes, check_rank, connector_of, count, largest_layer
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.llava import compat
from vitask_plugin.llava.model_type import MODEL_TYPES
from vitask_plugin.reading import readable

# LLaVA-1.5 on Vicuna 7B and 13B. 34b is the shape of LLaVA-1.6-34B's LLM alone (Yi-34B), as a Llama; its finer image
# grid is left out.
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "34b": {
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
    },
}
CLIP_LARGE_336 = "openai/clip-vit-large-patch14-336"  # LLaVA-1.5's tower, which needs no file
_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@functools.lru_cache
def sizes_of(model: str, lora_r: int | None = None) -> Sizes:
    """Counts a model.

    Args:
        model: "7b", "13b", "34b", or a folder with the config.json of a LLaVA or of a Llama.
        lora_r: rank of LoRA on every linear layer of the LLM, as upstream adds it; None: full fine-tuning.

    Raises:
        VITaskError: neither a known size nor such a folder, a tower whose shape is not at hand, or a rank below 1.
    """
    check_rank(lora_r)
    compat.prepare()
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.multimodal_projector.builder import build_vision_projector

    config = _config(model)
    with torch.device("meta"):
        llm = LlavaLlamaForCausalLM(config)
        projector = build_vision_projector(config)
        connector = connector_of(config.hidden_size)
        tower = CLIPVisionModel(_tower_config(model, config))
        llm_size = count(llm)
        adapters = _add_lora(llm, lora_r) if lora_r else 0
    parts = (llm, projector, connector)
    return Sizes(
        llm=llm_size,
        projector=count(projector),
        connector=count(connector),
        adapters=adapters,
        tower=count(tower),
        trained=(adapters or llm_size) + count(projector),
        numels=tuple(weight.numel() for part in parts for weight in part.parameters()),
        layer_numels=tuple(weight.numel() for weight in llm.model.layers.parameters()),
        largest_layer=max(map(largest_layer, (*parts, tower))),
        config=config,
    )


def _config(model: str) -> Any:
    """The LlavaConfig of the model without its tower, which upstream's class would fetch."""
    from llava.model.language_model.llava_llama import LlavaConfig

    if model in SHAPES:
        return LlavaConfig(
            **{"vocab_size": 32000, **SHAPES[model]}, mm_hidden_size=1024, mm_projector_type="mlp2x_gelu"
        )
    if not (Path(model) / "config.json").is_file():
        raise VITaskError(
            f"--model {model!r} is neither one of {', '.join(SHAPES)} nor a folder with a config.json; give one of them"
        )
    named = read_json(Path(model) / "config.json", "model configuration")
    known = named.get("model_type") in MODEL_TYPES if isinstance(named, dict) else False
    if not known or not SHAPES["7b"].keys() <= named.keys():
        raise VITaskError(
            f"--model {model!r}: its config.json is of no Llama with LLaVA 1.5's layers (model_type is to be one of "
            f"{', '.join(MODEL_TYPES)}, and {', '.join(SHAPES['7b'])} are to be there); only those can be tuned"
        )
    with readable("model", model):
        config = LlavaConfig.from_pretrained(model, local_files_only=True)
    found = config.to_dict()
    # An LLM that was not tuned yet names no projector: LLaVA-1.5's then.
    config.mm_hidden_size = found.get("mm_hidden_size", _TOWER["hidden_size"])
    config.mm_projector_type = found.get("mm_projector_type", "mlp2x_gelu")
    config.estimated_tower = found.get("mm_vision_tower", CLIP_LARGE_336)
    if hasattr(config, "mm_vision_tower"):
        del config.mm_vision_tower
    return config


def _tower_config(model: str, config: Any) -> CLIPVisionConfig:
    tower = getattr(config, "estimated_tower", CLIP_LARGE_336)
    if tower == CLIP_LARGE_336:
        return CLIPVisionConfig(**_TOWER)
    if not (Path(tower) / "config.json").is_file():
        raise VITaskError(
            f"model {model!r} has the vision tower {tower!r}, which is no folder on this machine; download it and put "
            "its path into config.json as mm_vision_tower"
        )
    with readable("vision tower", tower):
        return CLIPVisionConfig.from_pretrained(tower, local_files_only=True)


def _add_lora(llm: nn.Module, rank: int) -> int:
    """Adapters on what upstream adapts; returns their size."""
    from llava.train.train import find_all_linear_names
    from peft import LoraConfig, inject_adapter_in_model

    before = count(llm)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=find_all_linear_names(llm)), llm)
    return count(llm) - before
