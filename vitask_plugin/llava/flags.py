"""What VITask does with each flag of upstream's training script: honour it, or refuse it at the start with the reason.

`HONOURED` and `REFUSED` name every field of upstream's three argument classes, those that it has from transformers
(4.57 and 5, see `training.flags`) included; a test compares them with the installed ones.
"""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.training import flags
from vitask_plugin.training.flags import Refusal, off, one_of

# As upstream does it, or without effect there too.
_HONOURED = """
    model_name_or_path freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer pretrain_mm_mlp_adapter
    mm_use_im_start_end mm_use_im_patch_token
    data_path image_folder lazy_preprocess is_multimodal
    cache_dir freeze_mm_mlp_adapter model_max_length double_quant lora_enable lora_r lora_alpha
    lora_dropout mm_projector_lr group_by_modality_length
"""
HONOURED = flags.HONOURED | frozenset(_HONOURED.split())

_UNREAD = "upstream's script never reads it; leave it out"
# Templates of upstream's under which training and evaluation ask the same question, and both hold the instruction.
_TEMPLATES = (
    *("v0", "v0.5", "default", "v1", "vicuna_v1", "llava_v0", "llava_v1"),
    *("llama_2", "llava_llama_2", "mistral_instruct"),
)


REFUSED: dict[str, Refusal] = {
    "version": Refusal(
        one_of(*_TEMPLATES),
        "upstream would take vicuna_v1 for a name it does not know, and the templates plain, mmtag and mpt ask "
        f"another question in training than in evaluation; give one of {', '.join(_TEMPLATES)}",
    ),
    "bits": Refusal(one_of(4, 8, 16), "upstream quantizes to 4 or 8 bits and takes any other number for none; give 16"),
    "quant_type": Refusal(one_of("fp4", "nf4"), "bitsandbytes knows fp4 and nf4; give one of them"),
    "image_aspect_ratio": Refusal(
        one_of("square", "pad"),
        "upstream 1.2.2 trains on one view of each image and would judge on several; give square or pad",
    ),
    "mm_patch_merge_type": Refusal(one_of("flat"), "it is for several views of an image; leave it out, or give flat"),
    "mm_vision_select_feature": Refusal(one_of("patch", "cls_patch"), "give patch or cls_patch"),
    "mm_projector_type": Refusal(
        lambda value: re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", value) is not None,
        "give linear, mlp2x_gelu, or what the model was trained with",
    ),
    "mpt_attn_impl": Refusal(one_of("triton"), "it is for MPT models, which VITask does not train; leave it out"),
    "lora_weight_path": Refusal(off, f"{_UNREAD} (stage 2 continues the adapter of --vitask_connector_path)"),
    "lora_bias": Refusal(one_of("none"), "the next stage would not find the biases in the adapter; leave it out"),
    **flags.REFUSED,
}


def check(parsed: Namespace) -> None:
    """Refuses what VITask would not act on, see `training.flags.check`."""
    flags.check(parsed, REFUSED)


def check_known(left: Sequence[str], parsed: Namespace) -> None:
    """Refuses words that are no flag of anybody's, see `training.flags.check_known`."""
    flags.check_known(left, parsed, HONOURED | REFUSED.keys(), "upstream 1.2.2")


# The model's own configuration ------------------------------------------------------------------------------------

# Upstream builds these parts as the model's configuration says, and then writes what the flag says into it.
_BUILT_FROM_CONFIG = {
    "vision_tower": "mm_vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "mm_projector_type": "mm_projector_type",
}


def check_model(parsed: Namespace, config: Mapping[str, Any]) -> None:
    """Refuses flags that say something else of the model than its configuration, which is what upstream goes by.

    Args:
        parsed: as for `check`. config: the model's `config.json`; of an LLM alone, nothing is compared.

    Raises:
        VITaskError: naming both sides. A run would be trained one way, and its checkpoint say the other.
    """
    if "mm_vision_tower" not in config:
        return
    one_view(config, parsed.model_name_or_path)
    for flag, key in _BUILT_FROM_CONFIG.items():
        ours, own = getattr(parsed, flag), config.get(key)
        if own is not None and ours != own and not (flag == "vision_tower" and _same_folder(ours, own)):
            raise VITaskError(
                f"--{flag} {ours} is not what the model in {parsed.model_name_or_path!r} was built with ({key} "
                f"{own}), which upstream uses whatever the flag says; give --{flag} {own}"
            )


def one_view(config: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a model of several views per image, of which VITask's training makes one.

    Raises:
        VITaskError: naming the key, and what to change where one view is wanted.
    """
    ratio = config.get("image_aspect_ratio")
    if isinstance(ratio, str) and ratio.startswith("anyres"):
        raise VITaskError(
            f"the model in {str(path)!r} takes several views of each image (image_aspect_ratio {ratio} in its "
            "config.json), and VITask trains on one; to train or judge it on one view, set image_aspect_ratio to pad "
            "there (square for a checkpoint that VITask has trained) and mm_patch_merge_type to flat"
        )


def check_vocabulary(rows: int, config: Mapping[str, Any]) -> None:
    """Refuses LoRA on word embeddings that upstream has made longer: a LoRA checkpoint does not hold the new ones.

    Args:
        rows: of the word embeddings now. config: the `config.json` of the model they were loaded from.

    Raises:
        VITaskError: naming the flags that make them longer.
    """
    before = config.get("vocab_size", rows)
    if rows != before:
        raise VITaskError(
            f"--lora_enable True, and the model has {rows} word embeddings now where {before} were loaded: a LoRA "
            "checkpoint would not hold the new ones; give --mm_use_im_patch_token False, --mm_use_im_start_end False "
            "and --version v1, or tune without LoRA"
        )


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other)
