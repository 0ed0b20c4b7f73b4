"""`vitask data medmnist`: a MedMNIST 2D file (or the drawn set, of the same layout) as LLaVA JSON and images."""

import argparse
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitask_plugin.data.dataset import OUTPUT_FILES, SPLITS, Picture, summary, write_dataset
from vitask_plugin.data.instructions import DRAWN, LabelSet, label_set, label_sets
from vitask_plugin.data.merge import check_room, merge_in_place, say
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_replaceable
from vitask_plugin.options import check_number

SIZES = (28, 64, 128, 224)
ROOT = "MEDMNIST_ROOT"  # environment variable
ALLOW_MODIFIED = "MEDMNIST_ALLOW_MODIFIED"  # environment variable: 1 = files need not be the official ones
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def root(environment: Mapping[str, str] = os.environ) -> Path:
    """Folder of the data files: $MEDMNIST_ROOT, else the medmnist package's own default."""
    return Path(environment.get(ROOT) or "~/.medmnist").expanduser()


def load(labels: LabelSet, size: int = 28, splits: Sequence[str] = SPLITS) -> Arrays:
    """{split: (images uint8 [N, H, W] or [N, H, W, 3], labels int64 [N, 1] or, multi-label, [N, K])}.

    A file that is absent is downloaded by the medmnist package.

    Args:
        size: side of the images in pixels, one of `SIZES`.
        splits: those to read; the others take neither time nor memory.

    Raises:
        VITaskError: the file is absent and cannot be downloaded, is damaged, is not the official one (by its MD5,
            unless $MEDMNIST_ALLOW_MODIFIED is 1), or holds labels without a name.
    """
    path = data_file(labels, size)
    try:
        with np.load(path) as file:
            found = {split: (file[f"{split}_images"], file[f"{split}_labels"]) for split in splits}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise VITaskError(f"data file {str(path)!r} is damaged ({error}); delete it and run this again") from None
    _check_md5(labels, size, path)
    for split, (images, values) in found.items():
        _check(labels, path, split, images, values, size)
    return {split: (images, values.astype(np.int64)) for split, (images, values) in found.items()}


def file_name(labels: LabelSet, size: int = 28) -> str:
    """What MedMNIST calls the file of a data set."""
    return f"{labels.flag}.npz" if size == 28 else f"{labels.flag}_{size}.npz"


def data_file(labels: LabelSet, size: int = 28) -> Path:
    """The file of a data set, downloaded if it is absent.

    Raises:
        VITaskError: if it is absent and cannot be downloaded.
    """
    path = root() / file_name(labels, size)
    if path.is_file():
        return path
    if labels.flag == DRAWN.flag:
        raise VITaskError(f"data file {str(path)!r} does not exist; `vitask demo` draws it, or set MEDMNIST_ROOT")
    _download(labels, size, path)
    return path


def _download(labels: LabelSet, size: int, path: Path) -> None:
    import medmnist

    data_class = getattr(medmnist, medmnist.INFO[labels.flag]["python_class"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data_class(split="train", download=True, root=str(path.parent), size=size)
    except (Exception, KeyboardInterrupt) as error:
        path.unlink(missing_ok=True)  # a download that broke off leaves its beginning
        if isinstance(error, KeyboardInterrupt):
            raise
        raise VITaskError(
            f"data file {str(path)!r} does not exist and cannot be downloaded; connect to the network, or put the file "
            f"there from {medmnist.INFO[labels.flag][_url_key(size)]} (MEDMNIST_ROOT names the folder)"
        ) from None


def license_of(labels: LabelSet) -> str | None:
    """What the images are published under, as the medmnist package says it; None of drawn ones."""
    from medmnist.info import INFO

    return INFO[labels.flag]["license"] if labels.flag in INFO else None


def _url_key(size: int) -> str:
    return "url" if size == 28 else f"url_{size}"


def md5(path: Path) -> str:
    """The MD5 of a file, as medmnist identifies its files. A file that has not changed is read once per process."""
    status = path.stat()
    return _md5(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _md5(path: Path, size: int, modified: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_md5(labels: LabelSet, size: int, path: Path) -> None:
    """Refuses a file that is not the one figures are published on: results on it could not be compared."""
    if labels.flag == DRAWN.flag or os.environ.get(ALLOW_MODIFIED) == "1":
        return
    from medmnist.info import INFO

    expected, found = INFO[labels.flag]["MD5" if size == 28 else f"MD5_{size}"], md5(path)
    if found != expected:
        raise VITaskError(
            f"data file {str(path)!r} is not the official one: its MD5 is {found}, and medmnist.INFO has {expected}; "
            f"delete it to have the official file downloaded, or set {ALLOW_MODIFIED}=1 to use it as it is"
        )


def _check(labels: LabelSet, path: Path, split: str, images: np.ndarray, values: np.ndarray, size: int) -> None:
    classes = len(labels.choices)
    width = classes if labels.multi_label else 1
    shapes = ((len(images), size, size), (len(images), size, size, 3)) if images.ndim else ()
    whole = images.dtype == np.uint8 and images.shape in shapes and len(images) > 0
    if not whole or values.shape != (len(images), width) or values.dtype.kind not in "iub":
        raise VITaskError(
            f"data file {str(path)!r}: {split} images {images.dtype} {images.shape} and labels {values.dtype} "
            f"{values.shape} are not uint8 images of {size}x{size} pixels, grey or RGB, with whole numbers as labels "
            f"[N, {width}]; delete it and run this again"
        )
    highest = 1 if labels.multi_label else classes - 1
    wrong = np.argwhere((values < 0) | (values > highest))
    if len(wrong):
        row = int(wrong[0][0])
        raise VITaskError(
            f"data file {str(path)!r}, {split} row {row}: label {values[row].tolist()} is unknown; "
            f"{labels.flag} has the labels 0 to {highest}"
        )


def pictures(labels: LabelSet, arrays: Arrays, limit: int | None = None) -> Iterator[Picture]:
    """The images of the arrays, of each split the first `limit`; a name says which row of which split it is."""
    for split in SPLITS:
        images, values = arrays[split]
        for index in range(len(images[:limit])):
            row = values[index]
            label = np.flatnonzero(row).tolist() if labels.multi_label else int(row[0])
            name = f"{labels.flag} {split} row {index}"
            yield Picture(name, split, f"{index:05d}", label, Image.fromarray(images[index]))


def convert(
    task: str,
    output: str | Path,
    *,
    size: int = 28,
    limit: int | None = None,
    complete: bool = True,
    allow_duplicates: bool = False,
    drop_duplicates: bool = False,
) -> tuple[LabelSet, dict[str, int]]:
    """Reads a MedMNIST file and writes the data set.

    Args:
        task: any name that `instructions.label_set` knows.
        size: side of the images in pixels, one of `SIZES`.
        limit: only the first images of each split; None = all.

    Returns:
        The label set, and the number of images per split.

    Raises:
        VITaskError: see `load` and `dataset.write_dataset`. Nothing is left behind.
    """
    check_replaceable(output, OUTPUT_FILES)
    if limit is not None:
        check_number("--limit", limit, 1)
    labels = label_set(task)
    arrays = load(labels, size)
    counts = write_dataset(
        output,
        labels,
        pictures(labels, arrays, limit),
        complete=complete,
        total=sum(len(images[:limit]) for images, _ in arrays.values()),
        allow_duplicates=allow_duplicates,
        drop_duplicates=drop_duplicates,
        file=file_name(labels, size),
    )
    return labels, counts


def configure(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(known.flag for known in label_sets().values())
    add = parser.add_argument
    add(
        "--task",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"{names} (also without `mnist`): one, several, or `all` twelve, which become one data argument: see "
        "`vitask data merge`",
    )
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--size", type=int, choices=SIZES, default=28, help="side of the images in pixels (default 28)")
    add("--incomplete", action="store_true", help="instructions without the label set")
    add("--limit", type=int, metavar="N", help="only the first N images of each split")
    add("--allow-duplicates", action="store_true", help="go on if the same image is in two splits")
    add("--drop-duplicates", action="store_true", help="leave it out of train then (of val, if it is in test too)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    names = [name for word in args.task for name in word.split(",") if name]
    sets = several(names)
    if not sets:
        _write(names[0] if names else "", args.out, args)
        return
    check_room(args.out, [known.flag for known in label_sets().values()])
    sizes = {labels.flag: data_file(labels, args.size).stat().st_size for labels in sets}
    for labels in sorted(sets, key=lambda labels: sizes[labels.flag]):  # what is refused early costs little
        _write(labels.flag, Path(args.out) / labels.flag, args)
    names = [labels.flag for labels in sets]
    say(merge_in_place(args.out, names, allow_duplicates=args.allow_duplicates), args.out)


def several(names: Sequence[str], flag: str = "--task") -> list[LabelSet]:
    """The data sets of a list of names; none where it is one name, of one data set.

    Args:
        flag: that named them.

    Raises:
        VITaskError: a name is unknown, or a set is there twice.
    """
    if len(names) == 1 and names[0] != "all":
        return []
    found: dict[str, LabelSet] = {}
    for name in names:
        for labels in (
            [known for known in label_sets().values() if known != DRAWN] if name == "all" else [label_set(name)]
        ):
            if labels.flag in found:
                raise VITaskError(f"{flag} names {labels.flag!r} twice; name each data set once")
            found[labels.flag] = labels
    return list(found.values())


def _write(task: str, output: str | Path, args: argparse.Namespace) -> None:
    labels, counts = convert(
        task,
        output,
        size=args.size,
        limit=args.limit,
        complete=not args.incomplete,
        allow_duplicates=args.allow_duplicates,
        drop_duplicates=args.drop_duplicates,
    )
    tqdm.write(summary(counts, labels, output))
    if (name := license_of(labels)) is not None:
        tqdm.write(f"{labels.flag} is published under {name}")
