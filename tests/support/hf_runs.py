"""Command lines of the HF host, small: one epoch of 4 steps of 8 samples, float32."""

from pathlib import Path

from curves import history, weights
from ranks import Ended, launch

LORA = ("--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0")


def plain(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Without VITask."""
    return [
        *("--model_name_or_path", str(model)),
        *("--data_path", str(data / "train.json"), "--image_folder", str(data / "images")),
        *("--output_dir", str(output), "--num_train_epochs", "1", "--per_device_train_batch_size", "8"),
        *("--learning_rate", "1e-3", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"),
        *("--model_max_length", "512", "--use_cpu", "True", "--disable_tqdm", "True"),
        *more,
    ]


def vitask(model: Path, data: Path, features: Path, output: Path, *more: str) -> list[str]:
    return plain(model, data, output, "--vitask", "True", "--vitask_features", str(features), *more)


def train(flags: list[str], processes: int = 1) -> Path:
    """Runs it; the output."""
    output = Path(flags[flags.index("--output_dir") + 1])
    ended = launch(processes, flags, output.parent / f"log-{output.name}", host="hf")
    assert ended.statuses == [0] * processes, f"{ended.statuses}\n{ended.text}"
    return output


__all__ = ["LORA", "Ended", "history", "plain", "train", "vitask", "weights"]
