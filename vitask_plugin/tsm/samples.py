"""Labelled images of LLaVA JSON files, as batches for the TSM's training.

Shapes: B = batch, S = image side, K_all = classes of all tasks side by side in the head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from tqdm import tqdm

from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.instructions import read_samples, require_two_classes
from vitask_plugin.data.levels import check_levels
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, inside
from vitask_plugin.tsm.joint import Tasks, target_row


@dataclass(frozen=True)
class LabelledImage:
    """An image file, the `vitask` block of its sample, and the data file that this is in."""

    path: Path
    block: dict[str, Any]
    source: str | Path


@dataclass(frozen=True)
class Batch:
    """Pixels [B, 3, S, S], targets [B, K_all] (rows of `joint.target_row`), task [B] int64 (its position)."""

    pixels: Tensor
    targets: Tensor
    task: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.pixels.to(device), self.targets.to(device), self.task.to(device))


def read_labelled(data: Sequence[str | Path], folders: Sequence[str | Path], *, training: bool) -> list[LabelledImage]:
    """Every sample with a `vitask` block; its file is known to exist.

    Args:
        folders: image folders, one for all files or one for each.
        training: refuse a task of which only one class occurs.

    Raises:
        VITaskError: naming file and sample.
    """
    if len(folders) not in (1, len(data)):
        raise VITaskError(f"{len(data)} data files but {len(folders)} image folders; give one for all or one for each")
    for folder in folders:
        check_folder(folder, "image folder")
    found = []
    for position, path in enumerate(data):
        folder = folders[position if len(folders) > 1 else 0]
        samples = [sample for sample in read_samples(path) if "vitask" in sample]
        if not samples:
            raise VITaskError(f"data file {str(path)!r} has no sample with a 'vitask' block, so no label to learn")
        if training:
            require_two_classes(samples, path)
        for sample in samples:
            where = f"data file {str(path)!r}, sample {sample.get('id')!r}"
            try:
                image = inside(folder, sample["image"])
            except VITaskError as error:
                raise VITaskError(f"{where}: {error}") from None
            if not image.is_file():
                raise VITaskError(f"{where}: there is no image {str(image)!r}; check --image-folder")
            found.append(LabelledImage(image, sample["vitask"], path))
    return found


def check_pictures(images: Sequence[LabelledImage], what: str, *, refuse: bool) -> None:
    """Looks at some images of each task (`data.levels`), whether there is anything to see.

    Args:
        what: the data, for messages.

    Raises:
        VITaskError: naming an image that cannot be read, or a task whose images are of one colour, if `refuse`.
    """
    paths: dict[str, list[Path]] = {}
    for image in images:
        paths.setdefault(image.block["task"], []).append(image.path)
    for task, own in paths.items():
        check_levels(own, read_picture, f"{what}, task {task!r}", refuse=refuse)


def read_picture(path: str | Path) -> Image.Image:
    """The picture in a file; see `data.images.decode`."""
    return decode(read_bytes(path), path)


class _Dataset(Dataset):
    """Index -> (pixels, targets, task), or a sentence: an error must leave a worker process as no more than that.

    With `augment` an index is a pair (index, number that decides what is drawn).
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        tasks: Tasks,
        preprocess: Callable[[Image.Image], Tensor],
        augment: Callable[[Image.Image, int], Tensor] | None = None,
    ) -> None:
        self.images, self.tasks, self.preprocess, self.augment = images, tasks, preprocess, augment
        self.numbers = {name: number for number, name in enumerate(tasks)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor, int] | str:
        index, seed = index if self.augment else (index, None)
        path, block = self.images[index].path, self.images[index].block
        try:
            picture = read_picture(path)
            pixels = self.augment(picture, seed) if self.augment else self.preprocess(picture)
        except VITaskError as error:
            return str(error)
        return pixels, target_row(self.tasks, block["task"], block["label"]), self.numbers[block["task"]]


def _collate(items: list[Any]) -> Batch | str:
    for item in items:
        if isinstance(item, str):
            return item
    pixels, targets, tasks = zip(*items, strict=True)
    return Batch(torch.stack(pixels), torch.stack(targets), torch.tensor(tasks))


class _Numbered(Sampler):
    """The order of another sampler, each index with a number from the generator that the order is drawn from."""

    def __init__(self, order: RandomSampler) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(self.order)
        numbers = torch.randint(2**62, (len(order),), generator=self.order.generator)
        return iter(zip(order, numbers.tolist(), strict=True))


def make_loader(
    images: Sequence[LabelledImage],
    tasks: Tasks,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    training: bool,
    batch_size: int,
    workers: int,
    seed: int,
    augment: Callable[[Image.Image, int], Tensor] | None = None,
    order: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> DataLoader:
    """A loader for `batches`; shuffled if `training`.

    Args:
        augment: in place of `preprocess` in training; its second argument decides what is drawn.
        order: what the order is drawn from, in place of `seed`; its state after an epoch is all that the next needs.
        share: (number of this process, number of processes); each gets every so manyth batch, equally many of them.
    """
    dataset = _Dataset(images, tasks, preprocess, augment)
    sampler: Sampler = SequentialSampler(dataset)
    if training:
        # A generator of its own: the loader draws from the other one, more or less often depending on its workers.
        sampler = RandomSampler(dataset, generator=order or torch.Generator().manual_seed(seed))
        sampler = _Numbered(sampler) if augment else sampler
    # Batch normalisation cannot train on a last batch of one image; shares of several processes have none.
    one_left = training and share[1] == 1 and len(images) % batch_size == 1 and len(images) > batch_size
    by_batch: Any = BatchSampler(sampler, batch_size, drop_last=one_left)
    return DataLoader(
        dataset,
        batch_sampler=by_batch if share[1] == 1 else BatchSamplerShard(by_batch, share[1], share[0]),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),
    )


def batches(loader: DataLoader, device: torch.device, description: str) -> Iterator[Batch]:
    """The loader's batches on `device`, with a progress bar.

    Raises:
        VITaskError: naming the image that could not be read.
    """
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=None):
        if isinstance(batch, str):
            raise VITaskError(batch)
        yield batch.to(device)
