"""`vitask data merge`: several data sets, and general instruction data, as one data argument. No image is copied.

C/{train,val,test}.json   C/images/SET -> C/SET/images   C/SET -> the data set   C/labels.json: its label set, by SET
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitask_plugin.data.dataset import OUTPUT_FILES, SPLITS
from vitask_plugin.data.label_file import LABELS_FILE, sets_in
from vitask_plugin.data.parts import IMAGES, Part, check_apart, read_parts
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_creatable, write_json
from vitask_plugin.formats.json_list import write_items
from vitask_plugin.formats.json_text import read_json


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    also: Sequence[str | Path] = (),
    also_images: Sequence[str | Path] = (),
    allow_duplicates: bool = False,
) -> list[Part]:
    """Writes a folder of several data sets; an earlier one in `out` is replaced at the end.

    Args:
        folders: written by `vitask data medmnist` or `folder`.
        also: LLaVA JSON files of general instruction data, for training. also_images: their image folders, one for all
            or one for each; files of text alone need none.
        allow_duplicates: go on if an image that one set is judged by is in another one's training data.

    Raises:
        VITaskError: what is given is no data set, or two of them do not go together (`parts`).
    """
    _check_out(Path(out))
    parts = read_parts(folders, also, also_images)
    if not allow_duplicates:
        check_apart(parts)
    with atomic_directory(out) as directory:
        for part in parts:
            if part.folder is not None:
                _link(directory / part.name, part.folder, Path(out))
        _write(directory, parts, Path(out))
    return parts


def merge_in_place(out: str | Path, names: Sequence[str], *, allow_duplicates: bool = False) -> list[Part]:
    """The same of data sets that were written as OUT/NAME, into OUT.

    Without `labels.json`, which comes last, the folder is not finished.
    """
    out = Path(out)
    parts = read_parts([out / name for name in names])
    if not allow_duplicates:
        check_apart(parts)
    (out / LABELS_FILE).unlink(missing_ok=True)
    for split in SPLITS:
        (out / f"{split}.json").unlink(missing_ok=True)
    shutil.rmtree(out / IMAGES, ignore_errors=True)
    _write(out, parts, out)
    return parts


def check_room(out: str | Path, names: Sequence[str]) -> None:
    """Refuses a folder for `merge_in_place` that holds anything but an earlier output, before the sets are written.

    Args:
        names: every name that a set there may have.

    Raises:
        VITaskError: naming what is in the way.
    """
    out = Path(out)
    check_creatable(out)
    if not out.exists():
        return
    found = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    foreign = sorted(found - {*OUTPUT_FILES, *names})
    if not foreign and LABELS_FILE in found and not _merged(out):
        foreign = [LABELS_FILE]  # of one data set
    if not foreign and IMAGES in found and not all(map(Path.is_symlink, (out / IMAGES).iterdir())):
        foreign = [IMAGES]  # with images in it, and not links alone
    if foreign:
        raise VITaskError(
            f"{str(out)!r} already holds {foreign[0]!r}, which is not of an earlier output of several sets; choose "
            "another folder"
        )


def _check_out(out: Path) -> None:
    """Refuses to replace anything but what `merge` has written: the data sets themselves lie elsewhere."""
    check_creatable(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    linked = {name for name in _merged(out) if (out / name).is_symlink()}
    found = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    foreign = sorted(found - {*OUTPUT_FILES, *linked}) if linked else sorted(found)
    if foreign:
        raise VITaskError(
            f"{str(out)!r} already holds {foreign[0]!r}, which is not an earlier output of this command; choose "
            "another folder"
        )


def _merged(out: Path) -> dict[str, Any]:
    path = out / LABELS_FILE
    return sets_in(read_json(path, "label set")) if path.is_file() else {}


def _write(directory: Path, parts: Sequence[Part], out: Path) -> None:
    """`directory` becomes `out`, or is it."""
    (directory / IMAGES).mkdir()
    for part in parts:
        if part.folder is not None:
            os.symlink(os.path.join("..", part.name, IMAGES), directory / IMAGES / part.name)
        elif part.images is not None:
            _link(directory / IMAGES / part.name, part.images, out / IMAGES)
    for split in SPLITS:
        rows = [sample for part in parts for sample in part.samples.get(split, ())]
        if rows:
            write_items(directory / f"{split}.json", rows)
    kept = {"task", "choices", "modality", "type", "pixels"}
    sets = {part.name: {key: part.labels[key] for key in part.labels if key in kept} for part in parts if part.labels}
    write_json(directory / LABELS_FILE, {"sets": sets})


def _link(path: Path, target: Path, folder: Path) -> None:
    """A relative link, for both may be moved together.

    Args:
        folder: where the link will lie in the end.
    """
    os.symlink(os.path.relpath(os.path.realpath(target), os.path.realpath(folder)), path)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="data sets, written by `vitask data medmnist` or `folder`")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--also", nargs="+", default=[], metavar="JSON", help="general instruction data for training, in LLaVA's JSON")
    add("--also-images", nargs="+", default=[], metavar="DIR", help="its image folder: one for all files, or one each")
    add("--allow-duplicates", action="store_true", help="go on if one set is judged by training images of another")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    parts = merge(
        args.folders, args.out, also=args.also, also_images=args.also_images, allow_duplicates=args.allow_duplicates
    )
    say(parts, args.out)


def say(parts: Sequence[Part], out: str | Path) -> None:
    """What was merged, a line for each part."""
    for part in parts:
        tqdm.write(part.summary())
    sets = sum(part.folder is not None for part in parts)
    tqdm.write(
        f"{sets} data set{'s' * (sets != 1)} in {out}: train on {Path(out) / 'train.json'} and {Path(out) / IMAGES}, "
        "judge with the lmms-eval tasks vitask_sets and vitask_sets_score (VITASK_FOLDER)"
    )
