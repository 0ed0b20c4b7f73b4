"""What is changed in training images at random: timm's transforms of a picture, and mirroring and mixing of a batch.

What is drawn for a picture follows from a number that the sampler gives it, so that neither the number of workers nor
an interruption changes it.

Shapes: B = batch, S = image side, K_all = classes of all tasks side by side in the head.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitask_plugin.data.images import to_rgb
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.samples import Batch
from vitask_plugin.tsm.settings import Settings


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """What Python, NumPy and torch draw inside follows from `seed`; their states outside are left alone."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Augmented:
    """(picture, number that decides what is drawn) -> normalised pixels [3, S, S], by timm's training transform.

    Without `scale` the whole picture is resized, as outside of the training, and then changed.
    """

    def __init__(self, settings: Settings, image_size: int, mean: list[float], std: list[float]) -> None:
        from timm.data import create_transform

        self.size = None if settings.scale else (image_size, image_size)
        try:
            self.transform = create_transform(
                image_size,
                is_training=True,
                scale=settings.scale or (1.0, 1.0),
                ratio=(3 / 4, 4 / 3) if settings.scale else (1.0, 1.0),
                hflip=0.0,  # a batch is mirrored as one: see `mirrored`
                color_jitter=settings.color_jitter,
                auto_augment=settings.aa,
                interpolation="bicubic",
                mean=tuple(mean),
                std=tuple(std),
                re_prob=settings.reprob,
                re_mode="pixel",
            )
        except Exception as error:  # timm asserts, or looks a word up
            raise VITaskError(
                f"timm cannot make the augmentation --aa {settings.aa} ({str(error) or type(error).__name__}); "
                "give one such as rand-m9-mstd0.5, augmix-m3-w3 or original"
            ) from None

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        image = to_rgb(image)
        if self.size:
            image = image.resize(self.size, Image.Resampling.BICUBIC)
        with drawn_from(seed):
            return self.transform(image)


def augmentation(settings: Settings, image_size: int, mean: list[float], std: list[float]) -> Augmented | None:
    """What changes single pictures; None if nothing does.

    Raises:
        VITaskError: on an augmentation that timm does not know.
    """
    wanted = settings.aa or settings.color_jitter or settings.scale or settings.reprob
    return Augmented(settings, image_size, mean, std) if wanted else None


def mirrored(pixels: Tensor, shares: tuple[float, float]) -> Tensor:
    """Pixels [B, 3, S, S], of which random ones are mirrored left-right and top-bottom."""
    for share, dimension in zip(shares, (3, 2), strict=True):
        if share:
            chosen = (torch.rand(len(pixels)) < share).to(pixels.device)
            pixels = torch.where(chosen[:, None, None, None], pixels.flip(dimension), pixels)
    return pixels


def mixing(settings: Settings) -> Callable[[Batch, int], Batch] | None:
    """(batch, seed) -> the batch with mixup or cutmix; None if neither is on.

    Images are mixed with others of their own task only, since a sample's loss is over its own task's classes. Of an odd
    number of images one stays as it is.
    """
    if not (settings.mixup or settings.cutmix):
        return None
    from timm.data import Mixup

    def mixed(batch: Batch, seed: int) -> Batch:
        pixels, targets = batch.pixels.clone(), batch.targets.clone()
        with drawn_from(seed):
            for task in batch.task.unique().tolist():
                rows = (batch.task == task).nonzero().squeeze(1)
                rows = rows[: len(rows) // 2 * 2]
                if not len(rows):
                    continue
                mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=len(rows))
                # With each image as a class of its own, timm's targets say how much of each image is in each.
                own, shares = mix(pixels[rows], torch.arange(len(rows), device=rows.device))
                pixels[rows], targets[rows] = own, shares.to(targets) @ batch.targets[rows]
        return replace(batch, pixels=pixels, targets=targets)

    return mixed
