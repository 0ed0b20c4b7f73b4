"""`vitask tsm extract`: the TSM's features and logits of a data set, computed once and memory-mapped.

Each image's row is tied to the SHA-256 of the image file, and the whole store to the TSM's hash, so a changed image or
another TSM is noticed, never silently mismatched.

Shapes: I = images, E = tokens per image (1 for `cls`), F = width of a token, K_all = classes of all tasks.
"""

import argparse
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.data.sizes import differing, sizes_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_folder, check_replaceable, inside, read_json, write_json
from vitask_plugin.tsm.device import as_device, memory_error_as
from vitask_plugin.tsm.joint import class_count
from vitask_plugin.tsm.model import TOKENS, TSM
from vitask_plugin.tsm.trust import add_flag

INDEX_FILE = "index.json"
FEATURES_FILE = "features.npy"
LOGITS_FILE = "logits.npy"
FORMAT = 1


class FeatureStore:
    """Features [I, E, F] and logits [I, K_all] on disk, float32, looked up by image path. Picklable.

    Attributes:
        tsm_hash: of the TSM they were computed with.
        tokens: `cls` or `all`.
        length: E. width: F.
    """

    def __init__(self, directory: str | Path, index: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.tsm_hash: str = index["tsm"]
        self.tokens: str = index["tokens"]
        self._images: dict[str, list[Any]] = index["images"]  # path -> [row, sha256 of the file]
        self._map()
        if len(self._features) != len(self._images) or len(self._logits) != len(self._images):
            raise VITaskError(
                f"features {str(self.directory)!r} do not fit their index; run `vitask tsm extract` again"
            )
        self.length, self.width = self._features.shape[1:]

    @classmethod
    def open(cls, directory: str | Path) -> "FeatureStore":
        """The store that `extract` wrote.

        Raises:
            VITaskError: if a file is missing or damaged.
        """
        index = read_json(Path(directory) / INDEX_FILE, "feature index")
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise VITaskError(f"features {str(directory)!r} are not of format {FORMAT}; run `vitask tsm extract` again")
        return cls(directory, index)

    def _map(self) -> None:
        try:
            self._features = np.load(self.directory / FEATURES_FILE, mmap_mode="r")
            self._logits = np.load(self.directory / LOGITS_FILE, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise VITaskError(
                f"features {str(self.directory)!r} are missing or damaged ({error}); run `vitask tsm extract` again"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as the whole array: workers map the files themselves.
        return {name: value for name, value in self.__dict__.items() if name not in ("_features", "_logits")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __contains__(self, image: str) -> bool:
        return image in self._images

    def __len__(self) -> int:
        return len(self._images)

    def get(self, image: str, content_sha256: str) -> Tensor:
        """Features [E, F] of an image, by its path in the JSON.

        Raises:
            VITaskError: if the image is not in the store, or its file has other content than when it was extracted.
        """
        row, sha256 = self._entry(image)
        if sha256 != content_sha256:
            raise VITaskError(
                f"image {image!r} has changed since its features in {str(self.directory)!r} were extracted; "
                "run `vitask tsm extract` again"
            )
        return torch.from_numpy(np.array(self._features[row]))

    def logits(self, image: str) -> Tensor:
        """Logits [K_all] of an image.

        Raises:
            VITaskError: if the image is not in the store.
        """
        return torch.from_numpy(np.array(self._logits[self._entry(image)[0]]))

    def _entry(self, image: str) -> list[Any]:
        if image not in self._images:
            raise VITaskError(
                f"features {str(self.directory)!r} hold nothing for image {image!r}; "
                "run `vitask tsm extract` on the data file that names it"
            )
        return self._images[image]

    def check_tsm(self, tsm_hash: str) -> None:
        """Refuses a TSM other than the one that the features come from.

        Raises:
            VITaskError: naming both.
        """
        if tsm_hash != self.tsm_hash:
            raise VITaskError(
                f"features {str(self.directory)!r} were extracted by TSM {self.tsm_hash[:12]}, but the TSM in use is "
                f"{tsm_hash[:12]}; run `vitask tsm extract` with this TSM, or use the other one"
            )


class _Images(Dataset):
    """Row -> (pixels, sha256), or (None, sentence): an error must leave a worker process as one sentence."""

    def __init__(self, tsm: TSM, folder: str | Path, images: Sequence[str]) -> None:
        self.preprocess, self.folder, self.images = tsm.preprocessing(), folder, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            path = inside(self.folder, self.images[index])
            data = read_bytes(path)
            return self.preprocess(decode(data, path)), hashlib.sha256(data).hexdigest()
        except VITaskError as error:
            return None, str(error)


def _collate(items: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    """Pixels [B, 3, S, S] and hashes, or None and the sentence about the first image that cannot be read.

    One tensor per batch: each tensor that leaves a worker process costs an open file.
    """
    for pixels, message in items:
        if pixels is None:
            return None, [message]
    pixels, hashes = zip(*items, strict=True)
    return torch.stack(pixels), list(hashes)


def extract(
    tsm_directory: str | Path,
    data: Sequence[str | Path],
    image_folder: str | Path,
    output: str | Path,
    tokens: str = "cls",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    *,
    trust_code: bool = False,
    any_size: bool = False,
) -> FeatureStore:
    """Computes features and logits of every image that a `vitask` sample of the data files names, each path once.

    Args:
        tsm_directory: what `TSM.save` wrote.
        data: LLaVA JSON files whose image paths are relative to `image_folder`.
        output: folder to write; an older store there is replaced at the end.
        tokens: `cls` or `all`.
        batch_size: images per forward. workers: processes that read images; 0 = this one.
        trust_code: see `TSM.load`.
        any_size: go on if the images are of another size than those that the TSM was trained on.

    Raises:
        VITaskError: an image is unreadable, leaves the folder or is of another size than the TSM's, a file has no
            `vitask` sample, the disk is too small, or the architecture has no patches for `all`. Nothing is left
            behind.
    """
    check_replaceable(output, (INDEX_FILE, FEATURES_FILE, LOGITS_FILE))
    check_folder(image_folder, "image folder")
    torch_device = as_device(device)
    tsm = TSM.load(tsm_directory, torch_device, trust_code=trust_code)
    tsm.check_tokens(tokens)
    images = _images_of(data)
    if not any_size:
        _check_sizes(tsm, tsm_directory, data, image_folder)
    count = tsm.record["patch_count"] if tokens == "all" else 1
    width = tsm.record["patch_width" if tokens == "all" else "feature_width"]
    with atomic_directory(output) as directory:
        _check_space(directory, len(images) * count * width * 4)
        features = open_memmap(directory / FEATURES_FILE, "w+", np.float32, (len(images), count, width))
        logits = open_memmap(directory / LOGITS_FILE, "w+", np.float32, (len(images), class_count(tsm.record["tasks"])))
        with memory_error_as(
            f"out of memory on {torch_device} with {batch_size} images in a batch; give a smaller --batch-size"
        ):
            hashes = _fill(tsm, _Images(tsm, image_folder, images), tokens, features, logits, batch_size, workers)
        features.flush()
        logits.flush()
        entries = {image: [row, sha256] for row, (image, sha256) in enumerate(zip(images, hashes, strict=True))}
        write_json(directory / INDEX_FILE, {"format": FORMAT, "tsm": tsm.hash, "tokens": tokens, "images": entries})
    return FeatureStore.open(output)


def _fill(
    tsm: TSM, dataset: _Images, tokens: str, features: np.ndarray, logits: np.ndarray, batch_size: int, workers: int
) -> list[str]:
    """Fills the two arrays row by row; returns the SHA-256 of each image file."""
    hashes: list[str] = []
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=_collate)
    with tqdm(total=len(dataset), desc="TSM features", unit="image", disable=None) as progress:
        for pixels, found in loader:
            if pixels is None:
                raise VITaskError(found[0])
            output = tsm(pixels.to(tsm.device))
            rows = slice(len(hashes), len(hashes) + len(found))
            features[rows] = tsm.tokens(output, tokens).cpu().numpy()
            logits[rows] = output.logits.cpu().numpy()
            hashes.extend(found)
            progress.update(len(found))
    return hashes


def _images_of(data: Sequence[str | Path]) -> list[str]:
    images: dict[str, None] = {}
    for path in data:
        named = [sample["image"] for sample in read_samples(path) if "vitask" in sample]
        if not named:
            raise VITaskError(f"data file {str(path)!r} has no sample with a 'vitask' block, so no image to extract")
        images.update(dict.fromkeys(named))
    return list(images)


def _check_sizes(tsm: TSM, directory: str | Path, data: Sequence[str | Path], folder: str | Path) -> None:
    """Refuses images of another size than the TSM's own; one that was imported has no record of them."""
    for path in data:
        for task, trained, found in differing(tsm.record.get("images"), sizes_of(read_samples(path), folder)):
            raise VITaskError(
                f"TSM {str(directory)!r} was trained on {trained[0]}x{trained[1]} images of task {task!r}, those of "
                f"{str(path)!r} are {found[0]}x{found[1]}; use the images of its training, or add --any-image-size to "
                "`vitask tsm extract` if that is meant"
            )


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise VITaskError(
            f"the features need {needed / 2**30:.1f} GiB, but {str(directory.parent)!r} has "
            f"{free / 2**30:.1f} GiB free; use --tokens cls or another disk"
        )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tsm", required=True, metavar="DIR", help="folder of the TSM")
    parser.add_argument("--data", required=True, nargs="+", metavar="JSON", help="LLaVA JSON files")
    parser.add_argument("--image-folder", required=True, metavar="DIR", help="folder the image paths are relative to")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokens", choices=TOKENS, default="cls", help="cls = the pooled feature (default); all = every patch feature"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per forward (default 64)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add_flag(parser)
    parser.add_argument(
        "--any-image-size", action="store_true", help="go on if the TSM was trained on images of another size"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    store = extract(
        args.tsm,
        args.data,
        args.image_folder,
        args.out,
        args.tokens,
        args.batch_size,
        args.workers,
        args.device,
        trust_code=args.trust_tsm_code,
        any_size=args.any_image_size,
    )
    tqdm.write(f"{len(store)} images, {store.length} token(s) of width {store.width} each, in {args.out}")
