"""Images through the TSM, batch by batch, into the parts of a feature store (`shards`); alone or among processes.

Shapes: B = batch, S = image side, E = tokens per image, F = width of a token, K_all = columns of the TSM's head.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitask_plugin.arguments import FEATURE_DTYPES
from vitask_plugin.data.comparison import Seen, check_prepared
from vitask_plugin.data.contents import Contents, Mark, mark_of, trusted
from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, check_replaceable, inside, make_parent
from vitask_plugin.tsm.device import as_device, memory_error_as
from vitask_plugin.tsm.joint import class_count
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.out_of_fold import OutOfFold
from vitask_plugin.tsm.shards import BATCHES, OUTPUT_FILES, Parts, Plan

MOST_LOST = 0.01  # of the features of an image, by their norm, to rounding; float16 itself rounds by .0005

Item = tuple[Tensor | None, str, Mark]  # pixels and SHA-256, or None and the sentence about an unreadable image


class _Images(Dataset):
    """Row -> `Item`: an error must leave a worker process as one sentence."""

    def __init__(self, tsm: TSM, folder: str | Path, images: Sequence[str]) -> None:
        self.preprocess, self.folder, self.images = tsm.preprocessing(), folder, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        try:
            path = inside(self.folder, self.images[index])
            mark = trusted(mark_of(path))
            data = read_bytes(path)
            return self.preprocess(decode(data, path)), hashlib.sha256(data).hexdigest(), mark
        except VITaskError as error:
            return None, str(error), (0, 0)


def _collate(items: list[Item]) -> tuple[Tensor | None, list[str], list[Mark]]:
    """Pixels [B, 3, S, S], hashes and marks, or None and the sentence about the first image that cannot be read.

    One tensor per batch: each tensor that leaves a worker process costs an open file.
    """
    for pixels, message, _ in items:
        if pixels is None:
            return None, [message], []
    pixels, hashes, marks = zip(*items, strict=True)
    return torch.stack(pixels), list(hashes), list(marks)


class Extraction:
    """The features of some images, to be computed in parts and put together.

    Args:
        tsm_directory: what `TSM.save` wrote.
        images: paths relative to `image_folder`, in the order of the rows.
        output: folder to write; an older store there is replaced at the end.
        tokens: `cls` or `all`. dtype: of the features on the disk, float32 or float16.
        batch_size: images per forward. workers: processes that read images; 0 = this one.
        trust_code: see `TSM.load`.

    Raises:
        VITaskError: `output` holds something else, there is no image folder, or the architecture has no patches for
            `all`.
    """

    def __init__(
        self,
        tsm_directory: str | Path,
        images: Sequence[str],
        image_folder: str | Path,
        output: str | Path,
        *,
        tokens: str = "cls",
        dtype: str = "float32",
        batch_size: int = 64,
        workers: int = 0,
        device: str = "cpu",
        trust_code: bool = False,
    ) -> None:
        if dtype not in FEATURE_DTYPES:
            raise VITaskError(f"features cannot be stored as {dtype!r}; choose one of {', '.join(FEATURE_DTYPES)}")
        check_replaceable(output, OUTPUT_FILES)
        check_folder(image_folder, "image folder")
        self.tsm = TSM.load(tsm_directory, as_device(device), trust_code=trust_code)
        self.tsm.check_tokens(tokens)
        self._out_of_fold = OutOfFold.load(tsm_directory, self.tsm)
        self.folder, self.workers = image_folder, workers
        record = self.tsm.record
        count = record["patch_count"] if tokens == "all" else 1
        width = record["patch_width" if tokens == "all" else "feature_width"]
        shape = (count, width, class_count(record["tasks"]))
        self.plan = Plan(Path(output), images, self.tsm.hash, tokens, dtype, shape, batch_size)
        self.parts = Parts(self.plan)

    def check_images(self, used: Seen) -> None:
        """Refuses images unlike those that the TSM was trained on; an imported TSM has no record of them.

        Raises:
            VITaskError: naming both sides.
        """
        anyway = "extract the features with `vitask tsm extract --any-image-size` if that is meant"
        check_prepared(self.tsm.trained_on, used, anyway)

    def compute(self, share: tuple[int, int] = (0, 1), between: Callable[[], None] = lambda: None) -> None:
        """Computes the parts of one process that are not there yet.

        Args:
            share: (number of this process, number of processes).
            between: called between two batches; what it raises ends the work, and finished parts stay.

        Raises:
            VITaskError: an image is unreadable or leaves the folder, a feature is not finite or beyond the dtype, or
                the disk is too small. Finished parts stay; without any, nothing does.
        """
        number, processes = share
        try:
            if number == 0:
                self._check_space()
            own = range(number, self.plan.count, processes)
            self._write([part for part in own if not self.parts.is_current(part, self.folder)], between)
        except BaseException:
            self.parts.drop_if_empty()
            raise

    def finish(self) -> None:
        """Puts all parts together, after computing those that nobody has; the output is there then, whole."""
        self._write([part for part in range(self.plan.count) if not self.parts.is_there(part)], lambda: None)
        self.parts.finish()

    def _write(self, numbers: Sequence[int], between: Callable[[], None]) -> None:
        if not numbers:
            return
        plan, device = self.plan, self.tsm.device
        sentence = f"out of memory on {device} with {plan.batch_size} images in a batch; give a smaller --batch-size"
        with memory_error_as(sentence), self._progress(numbers) as progress:
            batches = self._batches(numbers)
            for number in numbers:
                rows = plan.rows(number)
                features, logits, entries = [], [], {}
                for start in range(0, len(rows), plan.batch_size):
                    pixels, found, marks = next(batches)
                    if pixels is None:
                        raise VITaskError(found[0])
                    names = [plan.images[row] for row in rows[start : start + plan.batch_size]]
                    own, said = self._ask(pixels.to(device), found)
                    features.append(_stored(own.cpu().numpy(), names, plan.dtype))
                    logits.append(said.cpu().numpy())
                    digests = map(bytes.fromhex, found)
                    entries |= dict(zip(names, zip(marks, digests, strict=True), strict=True))
                    progress.update(len(names))
                    between()
                self.parts.keep(number, np.concatenate(features), np.concatenate(logits), Contents.of(entries))

    def _ask(self, pixels: Tensor, hashes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, E, F] and logits [B, K_all] of pixels [B, 3, S, S] and the SHA-256 of their files."""
        if self._out_of_fold is not None:
            return self._out_of_fold(pixels, hashes, self.plan.tokens)
        output = self.tsm(pixels)
        return self.tsm.tokens(output, self.plan.tokens), output.logits

    def _batches(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor | None, list[str], list[Mark]]]:
        size = self.plan.batch_size
        rows = [self.plan.rows(number) for number in numbers]
        order = [list(part[start : start + size]) for part in rows for start in range(0, len(part), size)]
        dataset = _Images(self.tsm, self.folder, self.plan.images)
        return iter(DataLoader(dataset, batch_sampler=order, num_workers=self.workers, collate_fn=_collate))

    def _progress(self, numbers: Sequence[int]) -> tqdm:
        total = sum(len(self.plan.rows(number)) for number in numbers)
        return tqdm(total=total, desc="TSM features", unit="image", disable=None)

    def _check_space(self) -> None:
        parent = self.plan.output.parent
        make_parent(self.plan.output)
        part = self.plan.bytes * min(1.0, self.plan.batch_size * BATCHES / len(self.plan.images))
        needed, free = self.plan.bytes + part - self.parts.used(), shutil.disk_usage(parent).free
        if needed > free:
            raise VITaskError(
                f"the features need {needed / 2**30:.1f} GiB, but {str(parent)!r} has {free / 2**30:.1f} GiB free; use "
                f"{'--dtype float16, ' if self.plan.dtype == 'float32' else ''}--tokens cls or another disk"
            )


def _stored(features: np.ndarray, images: Sequence[str], dtype: str) -> np.ndarray:
    """Features [B, E, F] as they are stored.

    Raises:
        VITaskError: naming the first image with a feature that is not finite, or not in this dtype.
    """
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    wrong = ~np.isfinite(stored).all(axis=(1, 2))
    if wrong.any():
        row = int(wrong.argmax())
        if np.isfinite(features[row]).all():
            raise VITaskError(
                f"image {images[row]!r} has a feature of {np.abs(features[row]).max():.4g}, and {dtype} ends at "
                f"{np.finfo(dtype).max:.0f}; use float32"
            )
        raise VITaskError(f"image {images[row]!r} has a feature that is not finite; train or import the TSM again")
    exact = features.astype(np.float64)  # whose norm is not 0 where small features' is
    norm = np.linalg.norm(exact, axis=(1, 2)).clip(np.finfo(np.float64).tiny)
    lost = np.linalg.norm(stored - exact, axis=(1, 2)) / norm
    if lost.max() > MOST_LOST:
        row = int(lost.argmax())
        raise VITaskError(
            f"image {images[row]!r} has features of at most {np.abs(features[row]).max():.4g}, of which {dtype} loses "
            f"{lost[row]:.0%}; use float32"
        )
    return stored
