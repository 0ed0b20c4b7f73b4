"""Upstream's data set opens image files through this project's one rule (`data.images`), sample by sample."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from llava.train.train import LazySupervisedDataset
from PIL import Image

from vitask_plugin.data.checking import read_image


@contextlib.contextmanager
def read_by_us(sample: Mapping[str, Any], folder: str) -> Iterator[None]:
    """While upstream makes this sample's instance, what it calls `Image` opens the file as everything of ours does.

    Its own reading turns no image upright, makes deep pixels white, and names no file that is broken.
    """
    namespace = LazySupervisedDataset.__getitem__.__globals__
    original = namespace["Image"]
    namespace["Image"] = _ImageOfSample(sample, folder)
    try:
        yield
    finally:
        namespace["Image"] = original


class _ImageOfSample:
    """The two functions of `PIL.Image` that upstream's data set calls."""

    new = staticmethod(Image.new)

    def __init__(self, sample: Mapping[str, Any], folder: str) -> None:
        self._sample, self._folder = sample, folder

    def open(self, path: str) -> Image.Image:
        return read_image(self._sample, self._folder)
