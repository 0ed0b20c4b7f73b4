"""Which training images are nearest to an image in the TSM's features, and what their labels are.

By cosine distance, 1 - cos: 0 = the same direction, 1 = nothing in common, 2 = opposite. Every image is compared.

Shapes: N = training images, F = width of a token, E = tokens of an image.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vitask_plugin.data.comparison import tasks_alike
from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.instructions import read_samples, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, inside
from vitask_plugin.tsm.features import FeatureStore


@dataclass(frozen=True)
class Neighbour:
    """A training image: its path in the data file, its label in words, and how far away it is (0 to 2)."""

    image: str
    label: str
    distance: float


class TrainingImages:
    """The images of some data files with their labels, among which neighbours are looked for. In memory: 4NF bytes.

    Args:
        store: holds the features of all of them.
        data: LLaVA JSON files; their samples of this task count.
        folder: which their image paths are relative to.
        task, choices: which task, by its name or by labels that look alike.

    Raises:
        VITaskError: no image of this task, or one without features.
    """

    def __init__(
        self, store: FeatureStore, data: Sequence[str | Path], folder: str | Path, task: str, choices: Sequence[str]
    ) -> None:
        check_folder(folder, "image folder")
        self.store, self.folder = store, folder
        self._labels: dict[str, str] = {}  # of images, in the order of the rows below
        for path in data:
            for sample in read_samples(path):
                block = sample.get("vitask")
                if block and tasks_alike({task: choices}, block["task"], block["choices"]):
                    self._labels.setdefault(sample["image"], response(block["choices"], block["label"])[:-1])
        if not self._labels:
            files = ", ".join(map(repr, map(str, data)))
            raise VITaskError(f"{files}: no sample of task {task!r}; give --data with the training data of this task")
        self._images = list(self._labels)
        self._units = _units(store.vectors(self._images))

    def __len__(self) -> int:
        return len(self._images)

    def nearest(self, tokens: Tensor, count: int) -> list[Neighbour]:
        """The `count` nearest images, nearest first; of equally near ones the first in the data.

        Args:
            tokens: [E, F], of the same TSM and kind as the store's.
        """
        own = _units(tokens.detach().float().cpu().numpy().mean(axis=0, keepdims=True))[0]
        distances = np.clip(1 - self._units @ own, 0, 2)
        rows = np.argsort(distances, kind="stable")[:count]
        return [Neighbour(self._images[row], self._labels[self._images[row]], float(distances[row])) for row in rows]

    def picture(self, neighbour: Neighbour) -> Image.Image:
        """The RGB picture of one.

        Raises:
            VITaskError: its file is absent, damaged, or not the one whose features are stored.
        """
        path = inside(self.folder, neighbour.image)
        data = read_bytes(path)
        self.store.check_image(neighbour.image, hashlib.sha256(data).hexdigest())
        return decode(data, path)


def _units(vectors: np.ndarray) -> np.ndarray:
    """[N, F] vectors of length 1; those of length 0, which have no direction, stay what they are (distance 1)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
