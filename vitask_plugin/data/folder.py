"""`vitask data folder`: anybody's labelled images as LLaVA JSON and images.

Read are class folders (DIR/class/image, or DIR/train/class/image with val and test beside train), or a CSV file with a
column of images and one of labels: by default those of the header `image,label` or `image,label,split`.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitask_plugin.data.class_folders import ClassFolders
from vitask_plugin.data.class_names import check_choices, check_task
from vitask_plugin.data.dataset import OUTPUT_FILES, SPLITS, Picture, summary, write_dataset
from vitask_plugin.data.instructions import LabelSet, kind_of
from vitask_plugin.data.names import look, shown
from vitask_plugin.data.pixels import Pixels
from vitask_plugin.data.preparation import window_of
from vitask_plugin.data.rows import GroupPattern, Row, in_one_spelling, natural
from vitask_plugin.data.splits import assign_splits, check_apart, check_grouped, group_counts, quality
from vitask_plugin.data.tables import Columns, Table
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, check_replaceable
from vitask_plugin.options import SEED


@dataclass(frozen=True)
class Grouping:
    """What images share that have to stay in one split, and what is let pass.

    Attributes:
        column: a column of the CSV. pattern: a regular expression for the image's name (see `GroupPattern`).
        allow_shared: go on if given splits share a group.
        allow_ungrouped: take each image without a group as a group of its own.
    """

    column: str | None = None
    pattern: str | None = None
    allow_shared: bool = False
    allow_ungrouped: bool = False


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
                    _refuse_label(row, label, choices)
            try:
                image, jpeg = pixels.read(row.path)
            except VITaskError as error:
                raise VITaskError(f"{row.name}: {error}") from None
            indices = sorted(numbers[label] for label in row.labels)
            label = indices if multi_label else indices[0]
            yield Picture(row.name, split, f"{position:05d}", label, image, row.group, jpeg, row.source)


def task_name(path: Path) -> str:
    """What a data set is called that nobody gave a name: letters and digits of a folder's name or a CSV's.

    Raises:
        VITaskError: there are none.
    """
    whole = path.resolve()
    name = re.sub(r"\W+", "_", whole.name.lower().removesuffix(".csv")).strip("_")
    if not name:
        raise VITaskError(f"{str(path)!r} has no letter in its name to call the task by; give it a name with --task")
    return name


def _refuse_label(row: Row, label: str, choices: Sequence[str]) -> None:
    alike = next((name for name in choices if look(name) == look(label)), None)
    hint = "" if alike is None else f"; it looks like {shown(alike)}, so write them alike"
    raise VITaskError(f"{row.name}: label {shown(label)} is unknown; expected one of {', '.join(choices)}{hint}")


def convert(
    source: str | Path,
    output: str | Path,
    *,
    modality: str,
    task: str | None = None,
    choices: Sequence[str] | None = None,
    image_folder: str | Path | Sequence[str | Path] | None = None,
    columns: Columns | None = None,
    grouping: Grouping | None = None,
    multi_label: bool = False,
    ordinal: bool = False,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    complete: bool = True,
    allow_duplicates: bool = False,
    drop_duplicates: bool = False,
    window: Window | None = None,
    of_8_bits: bool | None = None,
    frame: int | None = None,
    max_side: int | None = None,
) -> tuple[LabelSet, dict[str, int]]:
    """Reads class folders or a CSV file and writes the data set.

    Args:
        source: folder or CSV file.
        modality: what stands before "image" in the instruction.
        task: name of the task; None = name of the output folder.
        choices: class names in the order of their label ids, read as folder names are (`natural`); None = those found,
            in order of the alphabet.
        image_folder: what a CSV's paths are relative to, one folder or several; None = the CSV's folder.
        columns: which column of a CSV holds what; None = `image`, `label` and, if there is one, `split`.
        grouping: which images have to stay in one split; None = any image may be in any.
        multi_label: any number of classes per image (CSV only).
        ordinal: the classes are grades, in the order of `choices`; evaluated with the quadratic kappa too.
        window, of_8_bits, frame, max_side: see `pixels.Pixels`.

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
    check_replaceable(output, OUTPUT_FILES)
    source, grouping = Path(source), grouping or Grouping()
    if Path(output).resolve().is_relative_to(source.resolve()):
        raise VITaskError(f"--out {str(output)!r} lies in the folder that is read, {str(source)!r}; write it elsewhere")
    folders = [image_folder] if isinstance(image_folder, str | Path) else image_folder or [source.parent]
    found = _read(source, [Path(folder) for folder in folders], columns, grouping, multi_label, choices or ())
    choices = found.classes if choices is None else [natural(name) for name in choices]
    check_choices(choices, f"data set {str(source)!r}")
    kind = kind_of(choices, multi_label=multi_label, ordinal=ordinal)
    # The output folder's name, by which the data set goes in evaluation too.
    name = task_name(Path(output)) if task is None else task
    check_task(name)
    labels = LabelSet(flag=name, task=name, modality=modality, choices=tuple(choices), kind=kind)
    rows = _split(found.rows, str(source), grouping, val, test, seed)
    pixels = _pixels(rows, window=window, of_8_bits=of_8_bits, frame=frame, max_side=max_side)
    counts = write_dataset(
        output,
        labels,
        pictures(rows, choices, multi_label, pixels),
        complete=complete,
        total=len(rows),
        allow_duplicates=allow_duplicates,
        drop_duplicates=drop_duplicates,
        pixels=pixels.record(),
    )
    return labels, counts


def _pixels(rows: Sequence[Row], **how: Any) -> Pixels:
    files = tqdm(rows, desc="Looking at image files", unit="image", disable=None, leave=False)
    return Pixels(((row.path, row.name, row.split == "train", row.labels) for row in files), **how)


def _read(
    source: Path,
    folders: Sequence[Path],
    columns: Columns | None,
    grouping: Grouping,
    multi_label: bool,
    choices: Sequence[str],
) -> ClassFolders | Table:
    pattern = None if grouping.pattern is None else GroupPattern(grouping.pattern)
    if source.is_file():
        for folder in folders:
            check_folder(folder, "image folder")
        columns = replace(columns or Columns(), group=grouping.column, pattern=pattern)
        return Table(source, folders, multi_label=multi_label, columns=columns, choices=choices)
    if not source.is_dir():
        raise VITaskError(f"{str(source)!r} is neither a folder nor a CSV file; check the path")
    if multi_label:
        raise VITaskError(f"--multi-label needs a CSV file, and {str(source)!r} is a folder; list its images in one")
    if grouping.column is not None or columns is not None:
        flag = "--group" if grouping.column is not None else "the name of a column or suffix"
        raise VITaskError(
            f"{flag} is for a CSV file, and {str(source)!r} is a folder; --group-pattern finds groups in file names"
        )
    return ClassFolders(source, pattern)


def _split(rows: Sequence[Row], source: str, grouping: Grouping, val: float, test: float, seed: int) -> list[Row]:
    """Rows that all have a split, by groups if these are asked for; says how near they came to the shares."""
    grouped = grouping.column is not None or grouping.pattern is not None
    if grouped:
        check_grouped(rows, source, grouping.allow_ungrouped)
        rows = in_one_spelling(rows, source)
    result = assign_splits(rows, val, test, seed)
    if grouped:
        check_apart(result, grouping.allow_shared)
        counts = ", ".join(f"{count} {split}" for split, count in group_counts(result).items())
        asked = {"train": 1 - val - test, "val": val, "test": test} if all(row.split is None for row in rows) else {}
        near = quality(result, {split: share for split, share in asked.items() if share})
        tqdm.write(f"groups: {counts}; {near}")
    return result


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="DIR_OR_CSV",
        help="DIR/class/image, or DIR/{train,val,test}/class/image, or a CSV with the columns image,label[,split]",
    )
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--modality", required=True, metavar="TEXT", help='what the images are: "Analyze the given TEXT image."')
    add("--task", metavar="NAME", help="name of the task (default: name of the --out folder)")
    add("--labels", metavar="A,B,C", help="class names in order of their ids (default: those found, by alphabet)")
    add(
        "--image-folder",
        nargs="+",
        metavar="DIR",
        help="CSV: what paths are relative to, one folder or several (default: the CSV's)",
    )
    add("--image-column", metavar="NAME", help="CSV: column of the images (default image)")
    add("--label-column", metavar="NAME", help="CSV: column of the labels (default label)")
    add("--split-column", metavar="NAME", help="CSV: column of the splits (default: split, if there is one)")
    add("--image-suffix", metavar="TEXT", help='CSV: what images\' names lack, such as ".jpg"')
    add("--group", metavar="COLUMN", help="CSV: images equal in it (patient, lesion, slide) stay in one split")
    add(
        "--group-pattern",
        metavar="REGEX",
        help="finds the group in a file's name, or with a / in its path: whole match or (capture group)",
    )
    add("--allow-ungrouped", action="store_true", help="take each image without a group as a group of its own")
    add("--allow-shared-groups", action="store_true", help="go on if a group is in two given splits")
    add("--multi-label", action="store_true", help='CSV only: labels separated by ";" or "|", none = no finding')
    add("--ordinal", action="store_true", help="the classes are grades, in the order of --labels: quadratic kappa")
    add("--val", type=float, default=0.1, metavar="X", help="share of images if there is no val split (default 0.1)")
    add("--test", type=float, default=0.1, metavar="X", help="share of images if there are no splits (default 0.1)")
    add("--seed", type=int, action=SEED, default=0, metavar="N", help="of the random split (default 0)")
    add("--incomplete", action="store_true", help="instructions without the label set")
    add("--allow-duplicates", action="store_true", help="go on if the same image is in two splits")
    add("--drop-duplicates", action="store_true", help="leave it out of train then (of val, if it is in test too)")
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values that become black and white (default: of more than 8 bits, percentiles of the training images)",
    )
    windows.add_argument(
        "--window-from",
        metavar="DIR_OR_JSON",
        help="the window of another set: its folder or labels.json, for images that are only evaluated",
    )
    add("--frame", type=int, metavar="N", help="page or frame of files that have several (default 0, the first)")
    add("--max-side", type=int, metavar="PIXELS", help="scale images down to this longer side (default: as they are)")
    parser.set_defaults(run=run)


def _window(args: argparse.Namespace) -> dict[str, Any]:
    if args.window_from is not None:
        window, of_8_bits = window_of(args.window_from)
        return {"window": window, "of_8_bits": of_8_bits}
    return {"window": None if args.window is None else Window(*args.window)}


def run(args: argparse.Namespace) -> None:
    named = {"image": args.image_column, "label": args.label_column, "split": args.split_column}
    named = {**named, "suffix": args.image_suffix}
    given = {name: value for name, value in named.items() if value is not None}
    labels, counts = convert(
        args.source,
        args.out,
        modality=args.modality,
        task=args.task,
        choices=None if args.labels is None else args.labels.split(","),
        image_folder=args.image_folder,
        columns=Columns(**given) if given else None,
        grouping=Grouping(args.group, args.group_pattern, args.allow_shared_groups, args.allow_ungrouped),
        multi_label=args.multi_label,
        ordinal=args.ordinal,
        val=args.val,
        test=args.test,
        seed=args.seed,
        complete=not args.incomplete,
        allow_duplicates=args.allow_duplicates,
        drop_duplicates=args.drop_duplicates,
        **_window(args),
        frame=args.frame,
        max_side=args.max_side,
    )
    tqdm.write(summary(counts, labels, args.out))
