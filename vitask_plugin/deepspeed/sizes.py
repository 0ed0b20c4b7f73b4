"""How many parameters a LLaVA has, and how many of them are trained: counted on the real model, without its weights.

The model is built by upstream's class on torch's meta device, which keeps shapes and no data.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vitask_plugin.connector import ExemplarConnector
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import read_json
from vitask_plugin.llava import compat
from vitask_plugin.llava.model_type import MODEL_TYPES
from vitask_plugin.llava.reading import readable

compat.prepare()
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402 (after the mends)
from llava.model.multimodal_projector.builder import build_vision_projector  # noqa: E402

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
TSM_WIDTH = 768  # of ViT-Base, the paper's TSM; the connector is all that depends on it


@dataclass(frozen=True)
class Sizes:
    """Parameters, in elements.

    Attributes:
        llm, projector, connector, adapters: of the parts that ZeRO-3 divides among ranks. tower: kept whole.
        trained: with full fine-tuning LLM and projector, with LoRA adapters and projector; stage 2, so that the
            connector is frozen.
        numels: of each parameter of the divided parts. layer_numels: of those in the decoder's layers.
        largest_layer: the most parameters that one module holds itself.
        config: of the LLM.
    """

    llm: int
    projector: int
    connector: int
    adapters: int
    tower: int
    trained: int
    numels: tuple[int, ...]
    layer_numels: tuple[int, ...]
    largest_layer: int
    config: Any

    @property
    def divided(self) -> int:
        """What ZeRO-3 divides among ranks."""
        return self.llm + self.projector + self.connector + self.adapters

    @property
    def total(self) -> int:
        return self.divided + self.tower

    def gathered(self, persistence: int) -> tuple[int, int]:
        """Elements of parameters that are larger than ZeRO-3's persistence threshold; the others stay on every rank.

        Returns:
            Of all divided parts, and of the decoder's layers among them.
        """
        every, layers = (
            sum(numel for numel in numels if numel > persistence) for numels in (self.numels, self.layer_numels)
        )
        return every, layers


@functools.lru_cache
def sizes_of(model: str, lora_r: int | None = None) -> Sizes:
    """Counts a model.

    Args:
        model: "7b", "13b", "34b", or a folder with the config.json of a LLaVA or of a Llama.
        lora_r: rank of LoRA on every linear layer of the LLM, as upstream adds it; None: full fine-tuning.

    Raises:
        VITaskError: neither a known size nor such a folder, a tower whose shape is not at hand, or a rank below 1.
    """
    if lora_r is not None and lora_r < 1:
        raise VITaskError(f"--lora-r is {lora_r}; it must be at least 1")
    config = _config(model)
    with torch.device("meta"):
        llm = LlavaLlamaForCausalLM(config)
        projector = build_vision_projector(config)
        connector = ExemplarConnector("mlp2x_gelu", TSM_WIDTH, config.hidden_size)
        tower = CLIPVisionModel(_tower_config(model, config))
        llm_size = _count(llm)
        adapters = _add_lora(llm, lora_r) if lora_r else 0
    parts = (llm, projector, connector)
    return Sizes(
        llm=llm_size,
        projector=_count(projector),
        connector=_count(connector),
        adapters=adapters,
        tower=_count(tower),
        trained=(adapters or llm_size) + _count(projector),
        numels=tuple(weight.numel() for part in parts for weight in part.parameters()),
        layer_numels=tuple(weight.numel() for weight in llm.model.layers.parameters()),
        largest_layer=max(map(_largest_layer, (*parts, tower))),
        config=config,
    )


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())  # parameters() lists a shared one once


def _largest_layer(model: nn.Module) -> int:
    """As DeepSpeed's estimators define it."""
    return max(sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules())


def _config(model: str) -> LlavaConfig:
    """Of the model without its tower, which upstream's class would fetch."""
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


def _tower_config(model: str, config: LlavaConfig) -> CLIPVisionConfig:
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

    before = _count(llm)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=find_all_linear_names(llm)), llm)
    return _count(llm) - before
