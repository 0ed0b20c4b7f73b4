"""Runs upstream's training script in a process of its own, as a user would, on the tiny LLaVA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from ranks import launch
from safetensors.torch import load_file

MODULE = [sys.executable, "-m", "vitask_plugin.llava.train"]
LORA = ["--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16"]


def arguments(tiny_llava, data: Path, output: Path, *flags: str) -> list[str]:
    """Upstream's usual command line, small: 30 samples, batch 8, one epoch of 4 steps, float32."""
    return [
        *("--model_name_or_path", str(tiny_llava.base), "--version", "v1"),
        *("--data_path", str(data / "train.json"), "--image_folder", str(data / "images")),
        *("--vision_tower", str(tiny_llava.tower), "--mm_projector_type", "mlp2x_gelu"),
        *("--mm_vision_select_layer", "-2", "--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False"),
        *("--output_dir", str(output), "--num_train_epochs", "1", "--per_device_train_batch_size", "8"),
        *("--learning_rate", "1e-3", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"),
        *("--model_max_length", "512", "--use_cpu", "True", "--bf16", "False", "--lazy_preprocess", "True"),
        *flags,
    ]


def run(command: list[str], check: bool = True) -> subprocess.CompletedProcess:
    """The finished process; a failure shows what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def train(tiny_llava, data: Path, output: Path, *flags: str, processes: int = 1) -> Path:
    """A run with VITask, in processes that were forked with the imports done."""
    ended = launch(processes, arguments(tiny_llava, data, output, *flags), output.parent / f"log-{output.name}")
    assert ended.statuses == [0] * processes, f"{ended.statuses}\n{ended.text}"
    return output


def history(output: Path) -> list[dict]:
    """The logged steps of a run."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All saved weights of a full or a LoRA run, by name."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        if not path.name.startswith("vitask"):
            found |= load_file(path)
    for path in sorted(directory.glob("*.bin")):
        if path.name != "training_args.bin":
            found |= torch.load(path, weights_only=True)
    return found
