"""Twelve drawn data files of MedMNIST's layout and kinds, with a thousandth of its training images."""

from pathlib import Path

import numpy as np
import pytest
from medmnist import INFO

from vitask_plugin.data.instructions import DRAWN, LabelSet, label_sets

SETS = [known for known in label_sets().values() if known != DRAWN]
SIDE = 28


def training_images(known: LabelSet) -> int:
    """A thousandth of MedMNIST's, and at least one of each class."""
    return max(INFO[known.flag]["n_samples"]["train"] // 1000, len(known.choices), 4)


def draw(known: LabelSet, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noise that a class brightens, and labels: the first images are one of each class, the rest mostly of class 0."""
    classes = len(known.choices)
    first = np.minimum(generator.geometric(0.5, count) - 1, classes - 1)
    first[: min(classes, count)] = np.arange(min(classes, count))
    labels = first[:, None]
    if known.multi_label:
        labels = np.eye(classes, dtype=int)[first] | (generator.random((count, classes)) < 0.05)
        labels[classes:][::3] = 0  # no finding
    grey = INFO[known.flag]["n_channels"] == 1
    shape = (count, SIDE, SIDE) if grey else (count, SIDE, SIDE, 3)
    images = generator.integers(0, 120, shape, dtype=np.uint8)
    return images + (9 * first).astype(np.uint8).reshape(-1, *[1] * (images.ndim - 1)), labels.astype(np.uint8)


def write_twelve(root: Path) -> Path:
    """The files in `root`, for $MEDMNIST_ROOT; beside each training split a val and a test split of a few images."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for known in SETS:
        arrays = {}
        few = len(known.choices) + 2
        for split, count in (("train", training_images(known)), ("val", few), ("test", few)):
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = draw(known, count, generator)
        np.savez(root / f"{known.flag}.npz", **arrays)
    return root


@pytest.fixture(scope="session")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `vitask data medmnist --task all` writes of them. Read only."""
    from vitask_plugin.cli import main

    directory = tmp_path_factory.mktemp("twelve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(write_twelve(directory / "root")))
        patch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
        assert main(["data", "medmnist", "--task", "all", "--out", str(directory / "all")]) == 0
    return directory / "all"
