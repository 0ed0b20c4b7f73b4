"""`vitask data folder`: anybody's labelled images as LLaVA JSON and images.

Read are class folders (DIR/class/image, or DIR/train/class/image with val and test beside train), or a CSV file with
the header `image,label` or `image,label,split`.
"""

import argparse
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitask_plugin.data.dataset import SPLITS, Picture, summary, write_dataset
from vitask_plugin.data.instructions import MULTI_LABEL, LabelSet, check_choices
from vitask_plugin.data.pixels import Pixels
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
JUNK = ("thumbs.db", "desktop.ini")  # left by file browsers; names with a leading dot are passed over too


@dataclass(frozen=True)
class Row:
    """One labelled file: where it was named (for messages), its path, its class names, its split if one was given."""

    name: str
    path: Path
    labels: tuple[str, ...]
    split: str | None


def natural(name: str) -> str:
    """A class name as it is said: `basal_cell_carcinoma` -> `basal cell carcinoma`."""
    return " ".join(name.replace("_", " ").split())


def read_folder(folder: Path) -> tuple[list[Row], list[str]]:
    """The rows of class folders, and the class names in order of the alphabet.

    Raises:
        VITaskError: no class folders, an empty one, or a file outside of them.
    """
    tops = _entries(folder)
    parts: list[tuple[str | None, Path]] = [(SPLIT_NAMES[e.name.lower()], e) for e in tops if _is_split(e)]
    if parts:
        classes = [entry.name for entry in tops if entry.is_dir() and not _is_split(entry)]
        if classes or "train" not in [split for split, _ in parts]:
            wrong = f"{classes[0]!r} beside them" if classes else "no 'train'"
            raise VITaskError(
                f"folder {str(folder)!r} has split folders and {wrong}; expected train, val and test only"
            )
    else:
        parts = [(None, folder)]
    rows = [row for split, path in parts for row in _class_rows(folder, path, split)]
    names = sorted({label for row in rows for label in row.labels})
    if not names:
        raise VITaskError(
            f"folder {str(folder)!r} has no class folders; expected DIR/class/image or DIR/train/class/image"
        )
    return rows, names


def _class_rows(root: Path, folder: Path, split: str | None) -> Iterator[Row]:
    for entry in _entries(folder):
        if not entry.is_dir():
            if entry.suffix.lower() in Image.registered_extensions():
                raise VITaskError(f"image {str(entry)!r} lies in no class folder; move it into one")
            continue
        files = [file for file in sorted(entry.rglob("*")) if file.is_file() and not _is_junk(file)]
        if not files:
            raise VITaskError(
                f"class {entry.name!r} is empty: no file in {str(entry)!r}; add images or remove the folder"
            )
        for file in files:
            relative = file.relative_to(root)
            yield Row(repr(str(relative)), inside(root, str(relative)), (natural(entry.name),), split)


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not _is_junk(entry))


def _is_junk(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in JUNK


def _is_split(path: Path) -> bool:
    return path.is_dir() and path.name.lower() in SPLIT_NAMES


def read_csv(path: Path, image_folder: Path, multi_label: bool) -> tuple[list[Row], list[str]]:
    """The rows of a CSV file, and the class names in order of the alphabet. Class names of a multi-label file are
    separated by ";", and an empty cell means that none applies.

    Raises:
        VITaskError: naming file and row.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            header = reader.fieldnames or []
            if not {"image", "label"} <= set(header) <= {"image", "label", "split"}:
                raise VITaskError(f"{str(path)!r}: the header is {header}; expected image,label or image,label,split")
            rows = [_csv_row(path, reader.line_num, cells, image_folder, multi_label) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise VITaskError(f"{str(path)!r} is not a CSV file in UTF-8 ({error}); save it as one") from None
    if not rows:
        raise VITaskError(f"{str(path)!r} has a header and no rows; add one row per image")
    first: dict[Path, Row] = {}
    for row in rows:
        if first.setdefault(row.path, row) is not row:
            raise VITaskError(f"{row.name} is the same file as {first[row.path].name}; list each image once")
    return rows, sorted({label for row in rows for label in row.labels})


def _csv_row(path: Path, line: int, cells: dict[str, str | None], image_folder: Path, multi_label: bool) -> Row:
    where = f"{str(path)!r}, row {line}"
    if None in cells or None in cells.values():
        raise VITaskError(f"{where}: has more or fewer cells than the header; quote cells that hold a comma")
    image, label = cells["image"].strip(), cells["label"]
    if not image:
        raise VITaskError(f"{where}: no image; name its file")
    name = f"{where} ({image!r})"
    labels = tuple(natural(part) for part in (label.split(";") if multi_label else [label]) if natural(part))
    if not labels and not multi_label:
        raise VITaskError(f"{name}: no label; name its class")
    if len(set(labels)) != len(labels):
        raise VITaskError(f"{name}: names a class twice")
    split = cells.get("split")
    if split is not None and split.strip().lower() not in SPLIT_NAMES:
        raise VITaskError(f"{name}: split {split!r} is unknown; expected train, val or test")
    try:
        file = inside(image_folder, image)
    except VITaskError as error:
        raise VITaskError(f"{where}: {error}") from None
    return Row(name, file, labels, None if split is None else SPLIT_NAMES[split.strip().lower()])


def assign_splits(rows: Sequence[Row], val: float, test: float, seed: int) -> list[Row]:
    """Rows that all have a split.

    Rows without one are split at random, class by class, so that the shares are right in each class. Given splits are
    kept; only where val is missing, it is taken out of train.

    Args:
        val, test: shares of all images; 0 = none. `val` 0 and `test` 1: a set for evaluation alone.

    Raises:
        VITaskError: if a class has too few images to be in every split.
    """
    test_only = (val, test) == (0, 1)
    if not test_only and not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise VITaskError(
            f"--val {val} and --test {test} leave nothing to train on; their sum must be below 1, or for a set to "
            "evaluate on alone --val 0 --test 1"
        )
    given = {row.split for row in rows} - {None}
    if test_only and not given:
        return [replace(row, split="test") for row in rows]
    if "val" in given or (given and not val):
        return list(rows)
    shares = {"val": val} if given else {"val": val, "test": test}
    shares = {split: share for split, share in shares.items() if share}
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if row.split in (None, "train"):
            groups.setdefault(row.labels, []).append(index)
    result = [replace(row, split=row.split or "train") for row in rows]
    generator = np.random.default_rng(seed)
    if any(len(labels) != 1 for labels in groups):
        # Combinations of several labels are mostly unique, so there is nothing to stratify by.
        groups = {(): [index for members in groups.values() for index in members]}
    for labels, members in groups.items():
        if len(members) <= len(shares):
            what = f"class {labels[0]!r}" if labels else "the data set"
            raise VITaskError(
                f"{what} has {len(members)} image(s), too few for {len(shares) + 1} splits; "
                "add images, or use --val 0 and --test 0"
            )
        order = generator.permutation(members)
        start = 0
        for split, share in shares.items():
            count = max(1, round(share * len(members)))
            for index in order[start : start + count]:
                result[index] = replace(result[index], split=split)
            start += count
    return result


def pictures(rows: Sequence[Row], choices: Sequence[str], multi_label: bool, pixels: Pixels) -> Iterator[Picture]:
    """The rows' images as `pixels` reads them, in the order of the splits.

    Raises:
        VITaskError: naming the row, if its label is unknown or its image unreadable.
    """
    numbers = {name: index for index, name in enumerate(choices)}
    for split in SPLITS:
        for position, row in enumerate(row for row in rows if row.split == split):
            for label in row.labels:
                if label not in numbers:
                    raise VITaskError(f"{row.name}: label {label!r} is unknown; expected one of {', '.join(choices)}")
            try:
                image, jpeg = pixels.read(row.path)
            except VITaskError as error:
                raise VITaskError(f"{row.name}: {error}") from None
            indices = sorted(numbers[label] for label in row.labels)
            yield Picture(row.name, split, f"{position:05d}", indices if multi_label else indices[0], image, jpeg)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    modality: str,
    task: str | None = None,
    choices: Sequence[str] | None = None,
    image_folder: str | Path | None = None,
    multi_label: bool = False,
    ordinal: bool = False,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    complete: bool = True,
    allow_duplicates: bool = False,
    window: tuple[float, float] | None = None,
    frame: int | None = None,
    max_side: int | None = None,
) -> tuple[LabelSet, dict[str, int]]:
    """Reads class folders or a CSV file and writes the data set.

    Args:
        source: folder or CSV file.
        modality: what stands before "image" in the instruction.
        task: name of the task; None = name of the source.
        choices: class names in the order of their label ids, read as folder names are (`natural`); None = those found,
            in order of the alphabet.
        image_folder: what a CSV's paths are relative to; None = the CSV's folder.
        multi_label: any number of classes per image (CSV only).
        ordinal: the classes are grades, in the order of `choices`; evaluated with the quadratic kappa too.
        window, frame, max_side: see `pixels.Pixels`.

    Returns:
        The label set, and the number of images per split.

    Raises:
        VITaskError: naming file and row. Nothing is left behind.
    """
    if ordinal and multi_label:
        raise VITaskError("--ordinal and --multi-label exclude each other: an image has one grade; give one of them")
    if ordinal and choices is None:
        raise VITaskError(
            "--ordinal needs the order of the grades, which the alphabet does not tell; add --labels LOWEST,...,HIGHEST"
        )
    source = Path(source)
    if Path(output).resolve().is_relative_to(source.resolve()):
        raise VITaskError(f"--out {str(output)!r} lies in the folder that is read, {str(source)!r}; write it elsewhere")
    if source.is_dir():
        if multi_label:
            raise VITaskError(
                f"--multi-label needs a CSV file, and {str(source)!r} is a folder; list its images in one"
            )
        rows, found = read_folder(source)
    elif source.is_file():
        rows, found = read_csv(source, Path(image_folder or source.parent), multi_label)
    else:
        raise VITaskError(f"{str(source)!r} is neither a folder nor a CSV file; check the path")
    choices = found if choices is None else [natural(name) for name in choices]
    check_choices(choices, f"data set {str(source)!r}")
    single = "ordinal-regression" if ordinal else "binary-class" if len(choices) == 2 else "multi-class"
    kind = MULTI_LABEL if multi_label else single
    name = task or re.sub(r"\W+", "_", source.resolve().stem.lower()).strip("_")
    labels = LabelSet(flag=name, task=name, modality=modality, choices=tuple(choices), kind=kind)
    rows = assign_splits(rows, val, test, seed)
    pixels = _pixels(rows, window, frame, max_side)
    counts = write_dataset(
        output,
        labels,
        pictures(rows, choices, multi_label, pixels),
        complete=complete,
        total=len(rows),
        allow_duplicates=allow_duplicates,
        pixels=pixels.record(),
    )
    return labels, counts


def _pixels(rows: Sequence[Row], window: tuple[float, float] | None, frame: int | None, max_side: int | None) -> Pixels:
    files = tqdm(rows, desc="Looking at image files", unit="image", disable=None, leave=False)
    return Pixels(
        ((row.path, row.name, row.split == "train") for row in files),
        window=None if window is None else Window(*window),
        frame=frame,
        max_side=max_side,
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="DIR_OR_CSV",
        help="DIR/class/image, or DIR/{train,val,test}/class/image, or a CSV with the header image,label[,split]",
    )
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--modality", required=True, metavar="TEXT", help='what the images are: "Analyze the given TEXT image."')
    add("--task", metavar="NAME", help="name of the task (default: name of the folder or CSV)")
    add("--labels", metavar="A,B,C", help="class names in order of their ids (default: those found, by alphabet)")
    add("--image-folder", metavar="DIR", help="what a CSV's paths are relative to (default: the CSV's folder)")
    add("--multi-label", action="store_true", help='CSV only: labels separated by ";", none = no finding')
    add("--ordinal", action="store_true", help="the classes are grades, in the order of --labels: quadratic kappa")
    add("--val", type=float, default=0.1, metavar="X", help="share of images if there is no val split (default 0.1)")
    add("--test", type=float, default=0.1, metavar="X", help="share of images if there are no splits (default 0.1)")
    add("--seed", type=int, default=0, metavar="N", help="of the random split (default 0)")
    add("--incomplete", action="store_true", help="instructions without the label set")
    add("--allow-duplicates", action="store_true", help="go on if the same image is in two splits")
    add(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values of more than 8 bits that become black and white (default: percentiles of the training images)",
    )
    add("--frame", type=int, metavar="N", help="page or frame of files that have several (default 0, the first)")
    add("--max-side", type=int, metavar="PIXELS", help="scale images down to this longer side (default: as they are)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    labels, counts = convert(
        args.source,
        args.out,
        modality=args.modality,
        task=args.task,
        choices=None if args.labels is None else args.labels.split(","),
        image_folder=args.image_folder,
        multi_label=args.multi_label,
        ordinal=args.ordinal,
        val=args.val,
        test=args.test,
        seed=args.seed,
        complete=not args.incomplete,
        allow_duplicates=args.allow_duplicates,
        window=args.window,
        frame=args.frame,
        max_side=args.max_side,
    )
    tqdm.write(summary(counts, labels, args.out))
