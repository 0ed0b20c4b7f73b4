"""A linear probe on the frozen tower of the VLM that is tuned: what its image features say without a language model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from study_data import SPLITS, file_of
from study_judging import labels_of
from study_training import Bench
from study_work import made_once

from vitask_plugin.data.instructions import read_samples
from vitask_plugin.files import atomic_path

BATCH = 64
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse regularisation; chosen on val


def probed(bench: Bench, data: Path, splits: tuple[str, ...]) -> tuple[dict[tuple[str, bool, bool], np.ndarray], Any]:
    """Log-probabilities [N, K] of a logistic regression on the mean and the class token of the tower's last layer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = tower_features(bench, data)
    labels = {split: labels_of(file_of(data, split))[0] for split in SPLITS}
    best = None
    for strength in STRENGTHS:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        probe.fit(features["train"], labels["train"])
        likely = probe.predict_log_proba(features["val"])
        loss = -float(likely[np.arange(len(likely)), labels["val"]].mean())
        if best is None or loss < best[0]:
            best = (loss, strength, probe)
    _, strength, probe = best
    found = {(split, True, False): probe.predict_log_proba(features[split]) for split in splits}
    return found, {"probe": {"C": strength}}


@torch.no_grad()
def tower_features(bench: Bench, data: Path) -> dict[str, np.ndarray]:
    """[N, 2 F] of each split, computed once."""
    file = bench.work / "tower" / f"{data.name}-{bench.sources['tower']}.safetensors"
    with made_once(file) as missing:
        if missing:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            model = AutoModelForImageTextToText.from_pretrained(bench.model, dtype=torch.float32).eval()
            processor = AutoProcessor.from_pretrained(bench.model)
            found = {split: _seen(model.model.vision_tower, processor, data, split) for split in SPLITS}
            with atomic_path(file) as path:
                save_file(found, path)
    return load_file(file)


def _seen(tower: Any, processor: Any, data: Path, split: str) -> np.ndarray:
    images = [data / "images" / sample["image"] for sample in read_samples(file_of(data, split))]
    found = []
    for first in range(0, len(images), BATCH):
        opened = [Image.open(path).convert("RGB") for path in images[first : first + BATCH]]
        pixels = processor.image_processor(opened, return_tensors="pt").pixel_values
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels).last_hidden_state.float()
        found.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1))
    return torch.cat(found).numpy()
