"""`vitask tsm extract`: the TSM's features and logits of a data set, computed once and memory-mapped.

Each image's row is tied to the SHA-256 of the image file, and the whole store to the TSM's hash, so a changed image or
another TSM is noticed, never silently mismatched.

Shapes: I = images, E = tokens per image (1 for `cls`), F = width of a token, K_all = classes of all tasks.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vitask_plugin.arguments import FEATURE_DTYPES
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.data.preparation import seen_in
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_replaceable
from vitask_plugin.options import COUNT, COUNT_OR_NONE
from vitask_plugin.tsm.blocks import Blocks
from vitask_plugin.tsm.extraction import Extraction
from vitask_plugin.tsm.index_format import INDEX
from vitask_plugin.tsm.model import TOKENS
from vitask_plugin.tsm.shards import FEATURES_FILE, INDEX_FILE, LOGITS_FILE, OUTPUT_FILES
from vitask_plugin.tsm.trust import add_flag


class FeatureStore:
    """Features [I, E, F], float32 or float16 on disk, and logits [I, K_all], looked up by image path. Picklable.

    Attributes:
        tsm_hash: of the TSM they were computed with.
        tokens: `cls` or `all`.
        length: E. width: F. dtype: of the features on the disk.
    """

    def __init__(self, directory: str | Path, index: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.tsm_hash: str = index["tsm"]
        self.tokens: str = index["tokens"]
        images: dict[str, list[Any]] = index["images"]  # path -> [row, sha256 of the file]
        self._recorded = {name: index.get(name, {}) for name in ("features", "logits")}
        self._dtype = index.get("dtype", "float32")
        self._map()
        if {len(self._features.array), len(self._logits.array)} != {len(images)}:
            raise VITaskError(
                f"features {str(self.directory)!r} do not fit their index; run `vitask tsm extract` again"
            )
        self._rows = {image: row for image, (row, _) in images.items()}
        # Not as they are: a million hashes as texts are 100 MB, in every process.
        self._hashes = np.zeros((len(images), 32), np.uint8)
        for row, sha256 in images.values():
            self._hashes[row] = np.frombuffer(bytes.fromhex(sha256), np.uint8)
        self.length, self.width = self._features.array.shape[1:]
        self.dtype = self._dtype

    @classmethod
    def open(cls, directory: str | Path) -> "FeatureStore":
        """The store that `extract` wrote.

        Raises:
            VITaskError: if a file is missing or damaged.
        """
        return cls(directory, INDEX.read(Path(directory) / INDEX_FILE, "feature index"))

    def _map(self) -> None:
        features, logits = (_known(self._recorded[name]) for name in ("features", "logits"))
        self._features = Blocks(self.directory / FEATURES_FILE, self._dtype, 3, *features)
        self._logits = Blocks(self.directory / LOGITS_FILE, "float32", 2, *logits)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as the whole array: workers map the files themselves.
        return {name: value for name, value in self.__dict__.items() if name not in ("_features", "_logits")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __contains__(self, image: str) -> bool:
        return image in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, image: str, content_sha256: str) -> Tensor:
        """Features [E, F] float32 of an image, by its path in the JSON.

        Raises:
            VITaskError: if the image is not in the store, its file has other content than when it was extracted, or the
                features on the disk are no longer those.
        """
        self.check_image(image, content_sha256)
        return torch.from_numpy(np.array(self._features.row(self._rows[image]), np.float32))

    def check_image(self, image: str, content_sha256: str) -> None:
        """Refuses an image that is not in the store, or has other content than when it was extracted.

        Raises:
            VITaskError: naming it.
        """
        if self._hashes[self._row(image)].tobytes().hex() != content_sha256:
            raise VITaskError(
                f"image {image!r} has changed since its features in {str(self.directory)!r} were extracted; "
                "run `vitask tsm extract` again"
            )

    def logits(self, image: str) -> Tensor:
        """Logits [K_all] of an image.

        Raises:
            VITaskError: if the image is not in the store, or the logits on the disk are no longer those extracted.
        """
        return torch.from_numpy(np.array(self._logits.row(self._row(image))))

    def vectors(self, images: Sequence[str]) -> np.ndarray:
        """One feature for each image, float32 [N, F]: its token, or the mean of its tokens; files are not looked at.

        Raises:
            VITaskError: if an image is not in the store, or the file is no longer what was extracted.
        """
        found = np.empty((len(images), self.width), np.float32)
        for place, row in enumerate(map(self._row, images)):
            found[place] = self._features.row(row).mean(axis=0, dtype=np.float32)
        return found

    def _row(self, image: str) -> int:
        if image not in self._rows:
            raise VITaskError(
                f"features {str(self.directory)!r} hold nothing for image {image!r}; "
                "run `vitask tsm extract` on the data file that names it"
            )
        return self._rows[image]

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


def _known(recorded: dict[str, Any]) -> tuple[int | None, list[str] | None]:
    return recorded.get("rows"), recorded.get("sha256")


def extract(
    tsm_directory: str | Path,
    data: Sequence[str | Path],
    image_folder: str | Path,
    output: str | Path,
    tokens: str = "cls",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    trust_code: bool = False,
    any_size: bool = False,
) -> FeatureStore:
    """Computes features and logits of every image that a `vitask` sample of the data files names, each path once.

    Finished parts are kept beside `output` (see `shards`): after a kill, the same call goes on with them.

    Args:
        tsm_directory: what `TSM.save` wrote.
        data: LLaVA JSON files whose image paths are relative to `image_folder`.
        output: folder to write; an older store there is replaced at the end.
        tokens: `cls` or `all`. dtype: of the features on the disk, float32 or float16; logits are float32.
        batch_size: images per forward. workers: processes that read images; 0 = this one.
        trust_code: see `TSM.load`.
        any_size: go on if the images are of another size, or prepared in another way, than those that the TSM was
            trained on.

    Raises:
        VITaskError: an image is unreadable, leaves the folder or is not like the TSM's, a file has no
            `vitask` sample, the disk is too small, a feature does not fit the dtype, or the architecture has no patches
            for `all`.
    """
    check_replaceable(output, OUTPUT_FILES)
    extraction = Extraction(
        tsm_directory,
        _images_of(data),
        image_folder,
        output,
        tokens=tokens,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        device=device,
        trust_code=trust_code,
    )
    if not any_size:
        for path in data:
            extraction.check_images(seen_in(read_samples(path), image_folder, path))
    extraction.compute()
    extraction.finish()
    return FeatureStore.open(output)


def _images_of(data: Sequence[str | Path]) -> list[str]:
    images: dict[str, None] = {}
    for path in data:
        named = [sample["image"] for sample in read_samples(path) if "vitask" in sample]
        if not named:
            raise VITaskError(f"data file {str(path)!r} has no sample with a 'vitask' block, so no image to extract")
        images.update(dict.fromkeys(named))
    return list(images)


def add_flags(parser: argparse.ArgumentParser, known: str) -> None:
    """The flags of every command in which a TSM looks at images. `known`: what their size is compared with."""
    add = parser.add_argument
    add("--batch-size", type=int, action=COUNT, default=64, metavar="N", help="images per forward (default 64)")
    add(
        "--workers",
        type=int,
        action=COUNT_OR_NONE,
        default=0,
        metavar="N",
        help="processes that read images (default 0)",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add_flag(parser)
    add("--any-image-size", action="store_true", help=f"go on if the images are unlike those {known}")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tsm", required=True, metavar="DIR", help="folder of the TSM")
    add("--data", required=True, nargs="+", metavar="JSON", help="LLaVA JSON files")
    add("--image-folder", required=True, metavar="DIR", help="folder the image paths are relative to")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--tokens", choices=TOKENS, default="cls", help="cls = the pooled feature (default); all = every patch feature")
    add("--dtype", choices=FEATURE_DTYPES, default="float32", help="of the features on the disk; float16 halves them")
    add_flags(parser, "of the TSM's training")
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
        args.dtype,
        trust_code=args.trust_tsm_code,
        any_size=args.any_image_size,
    )
    tqdm.write(f"{len(store)} images, {store.length} token(s) of width {store.width} each, in {args.out}")
