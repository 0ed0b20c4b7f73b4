"""From labelled images to a tuned tiny VLM, step by step: data set, classifier, tiny model, stage 1 of VITask.

    python examples/own_images.py OUT [--images FOLDER] [--modality WORDS]

FOLDER has a folder of images for each class; without it two kinds of stripes are drawn. On a CPU in less than a minute.
`vitask run` does all this and more by one command; this script shows the parts, to take and change.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vitask_plugin import TSM, read_record
from vitask_plugin.cli import main as vitask


def draw(folder: Path, count: int = 20, size: int = 32) -> Path:
    """`count` images of stripes across and of stripes down, each with noise."""
    random = np.random.default_rng(0)
    for name, axis in (("across", 0), ("down", 1)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            waves = np.sin(np.arange(size) * random.uniform(0.6, 1.2) + random.uniform(0, 6))
            stripes = np.broadcast_to(waves[:, None] if axis == 0 else waves[None], (size, size))
            grey = 128 + 70 * stripes + random.normal(0, 20, (size, size))
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(folder / name / f"{index:02d}.png")
    return folder


def command(*words: object) -> None:
    """`vitask WORDS` in this process; a failure has said why."""
    if vitask([str(word) for word in words]):
        raise SystemExit(1)


def program(module: str, *words: object) -> None:
    """`python -m MODULE WORDS`: what ends its process by itself, as a training does."""
    subprocess.run([sys.executable, "-m", module, *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--images", type=Path, help="a folder of images for each class; default: drawn ones")
    parser.add_argument("--modality", default="drawn texture", help="what the images are, as the question calls it")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True)
    images = args.images or draw(out / "drawn")

    # 1. A data set: images, an instruction and an answer each, a JSON per split.
    data, tsm, model, tuned = (out / name for name in ("data", "tsm", "tiny", "tuned"))
    command("data", "folder", images, "--modality", args.modality, "--out", data)
    files = ("--data", data / "train.json", "--image-folder", data / "images")

    # 2. The task-specific model: any timm classifier.
    validation = ("--val", data / "val.json", "--image-size", 32, "--epochs", 3, "--batch-size", 8, "--workers", 0)
    command("tsm", "train", "--arch", "test_vit", *files, *validation, "--out", tsm)
    print(f"the classifier knows {next(iter(TSM.load(tsm).record['tasks'].values()))['choices']}")

    # 3. A tiny VLM of random weights that knows the words of the task. Here stands your own model's folder.
    program("vitask_plugin.hf.tiny", "--family", "llava", "--out", model, "--data", data)

    # 4. Stage 1: vanilla tuning with the exemplar (EP) and the alignment (RDA). Stage 2 is the same command with
    #    --vitask_stage 2 --vitask_connector_path TUNED, the tuned model as --model_name_or_path, another output.
    flags = {
        "model_name_or_path": model,
        "data_path": data / "train.json",
        "image_folder": data / "images",
        "output_dir": tuned,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "vitask": True,
        "vitask_tsm": tsm,
    }
    program("vitask_plugin.hf.train", *(word for name, value in flags.items() for word in (f"--{name}", value)))

    log = json.loads((tuned / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps, for {list(read_record(tuned)['tasks'])}")
    print(f"{tuned} is a plain Hugging Face folder, with the connector and vitask.json beside the weights")


if __name__ == "__main__":
    main()
