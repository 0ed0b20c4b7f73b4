"""Runs upstream's `train()` in this process, any number of times, and hands back its trainer."""

import sys
from pathlib import Path
from typing import Any


def arguments(work: Path, output: Path, *flags: str) -> list[str]:
    """Upstream's usual command line, small: `work` holds base/, tower/, train.json and images/."""
    return [
        *("--model_name_or_path", str(work / "base"), "--vision_tower", str(work / "tower"), "--version", "v1"),
        *("--data_path", str(work / "train.json"), "--image_folder", str(work / "images")),
        *("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2", "--image_aspect_ratio", "pad"),
        *("--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False", "--bf16", "False"),
        *("--output_dir", str(output), "--max_steps", "4", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-2", "--weight_decay", "0.1", "--lr_scheduler_type", "cosine"),
        *("--logging_steps", "1", "--report_to", "none", "--save_strategy", "steps", "--save_steps", "2"),
        *("--model_max_length", "512", "--lazy_preprocess", "True", "--use_cpu", "True", "--disable_tqdm", "True"),
        *flags,
    ]


LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "1e-3")


def train(namespace: dict[str, Any], command_line: list[str]) -> Any:
    """Calls `namespace["train"]` with that command line, from one seed; returns the trainer it made."""
    import transformers

    trainers, trainer_class = [], namespace["LLaVATrainer"]

    def keep(*args: Any, **kwargs: Any) -> Any:
        trainers.append(trainer_class(*args, **kwargs))
        return trainers[-1]

    namespace["LLaVATrainer"] = keep
    before, sys.argv = sys.argv, ["train.py", *command_line]
    try:
        # The projector and LoRA are initialised before the trainer sets the seed.
        transformers.set_seed(0)
        namespace["train"]()
    finally:
        sys.argv, namespace["LLaVATrainer"] = before, trainer_class
    return trainers[-1]
