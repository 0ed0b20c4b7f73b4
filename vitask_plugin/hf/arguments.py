"""The flags of the HF host: LLaVA's names for what both have, and transformers' own TrainingArguments."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

import transformers

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.training import flags
from vitask_plugin.training.flags import Refusal, one_of


@dataclass
class ModelArguments(VITaskArguments):
    """Which model, which parts of it are trained, and VITask's flags."""

    model_name_or_path: str = field(default="", metadata={"help": "Folder or Hub name of a VLM in HF format."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where models of the Hub are kept."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the model; with --vitask True of its vision tower (see --vitask_attention)."},
    )
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Whether the vision tower stays as it is."})
    freeze_projector: bool = field(
        default=False, metadata={"help": "Whether what maps image features to the language model stays as it is."}
    )
    freeze_language_model: bool = field(default=False, metadata={"help": "Whether the language model stays as it is."})


@dataclass
class DataArguments:
    """LLaVA's JSON and its images."""

    data_path: str = field(default="", metadata={"help": "LLaVA's JSON, such as `vitask data` writes it."})
    image_folder: str = field(default="", metadata={"help": "Folder that the JSON's image paths start from."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, and LoRA and quantization under LLaVA's names."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "Samples are no columns; leave it out."})
    model_max_length: int = field(
        default=2048, metadata={"help": "Positions of a sample, image tokens included; what is behind is cut."}
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train LoRA adapters in place of the language model."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale times rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of them."})
    bits: int = field(default=16, metadata={"help": "4 or 8: the frozen weights are quantized (needs LoRA)."})
    double_quant: bool = field(default=True, metadata={"help": "Quantize the quantization constants too."})
    quant_type: str = field(default="nf4", metadata={"help": "How 4 bits are spent: nf4 or fp4."})

    group_by_modality_length = False  # a flag of upstream LLaVA's; here samples are mixed


_HONOURED = """
    model_name_or_path cache_dir attn_implementation freeze_vision_tower freeze_projector freeze_language_model
    data_path image_folder model_max_length lora_enable lora_r lora_alpha lora_dropout double_quant
"""
HONOURED = flags.HONOURED | frozenset(_HONOURED.split())
REFUSED: dict[str, Refusal] = {
    "bits": Refusal(one_of(4, 8, 16), "weights are quantized to 4 or 8 bits; give one of them, or leave it out"),
    "quant_type": Refusal(one_of("fp4", "nf4"), "bitsandbytes knows fp4 and nf4; give one of them"),
    **flags.REFUSED,
}
# Flags of LLaVA's own training script, and what says the same thing here.
_FOLDER = "the model's folder says it here; leave it out"
OF_LLAVA = {
    "version": "the model's chat template says it here; leave it out",
    "vision_tower": _FOLDER,
    "pretrain_mm_mlp_adapter": _FOLDER,
    "mm_projector_type": _FOLDER,
    "mm_vision_select_layer": _FOLDER,
    "mm_vision_select_feature": _FOLDER,
    "mm_patch_merge_type": _FOLDER,
    "mm_use_im_start_end": _FOLDER,
    "mm_use_im_patch_token": _FOLDER,
    "image_aspect_ratio": "the model's processor says it here; leave it out",
    "mm_projector_lr": "the projector has the run's --learning_rate here; leave it out, or add --freeze_projector True",
    "freeze_backbone": "--freeze_language_model True says it here",
    "tune_mm_mlp_adapter": "--freeze_language_model True says it here",
    "freeze_mm_mlp_adapter": "--freeze_projector True says it here",
    "lazy_preprocess": "samples are always read when their turn comes; leave it out",
    "is_multimodal": "samples say it themselves; leave it out",
    "mpt_attn_impl": "--attn_implementation says it here",
    "lora_weight_path": "--vitask_connector_path resumes from an adapter; leave it out",
    "lora_bias": "biases stay as they are under LoRA; leave it out",
    "group_by_modality_length": "samples are mixed here; leave it out",
}


def check_parts(parsed: Namespace) -> None:
    """Refuses flags that say of a part what LoRA does not do, and bits that there are none of.

    Raises:
        VITaskError: naming the flag.
    """
    refusal = REFUSED["bits"]
    if not refusal.allows(parsed.bits):
        raise VITaskError(f"--bits {parsed.bits}: {refusal.why}")
    if parsed.lora_enable and not parsed.freeze_vision_tower:
        raise VITaskError(
            "--lora_enable True adapts the language model alone, so --freeze_vision_tower False would have no effect; "
            "leave one of them out"
        )
    if parsed.lora_enable and parsed.freeze_language_model:
        raise VITaskError(
            "--lora_enable True trains adapters in the language model, which --freeze_language_model True forbids; "
            "leave one of them out (without LoRA the projector alone is trained then)"
        )


def check_host(left: Sequence[str]) -> None:
    """Refuses flags of LLaVA's own code, saying what does the same here.

    Args:
        left: what parsing has left of the command line.
    """
    for word in left:
        name = word.partition("=")[0]
        if name.startswith("--") and (why := OF_LLAVA.get(name[2:].replace("-", "_"))) is not None:
            raise VITaskError(f"{name} is a flag of LLaVA's own code, and {why}")
