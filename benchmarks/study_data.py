"""The sets of `study.py`, as `vitask data` writes them, with and without the label set in the instruction."""

import os
import zipfile
from pathlib import Path

from study_plan import DataSet
from study_work import command, made_once

from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.data.instructions import instruction, read_samples
from vitask_plugin.data.label_file import read_labels
from vitask_plugin.data.medmnist import ROOT
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, atomic_path, sha256_file, write_json

SPLITS = ("train", "val", "test")
INCOMPLETE = "incomplete"  # what a split's file name ends with


def source_of(one: DataSet, root: Path) -> Path:
    """The archive of a set: below the root, or in a folder of it.

    Raises:
        VITaskError: there is none.
    """
    found = next((path for path in (root / one.file, *sorted(root.glob(f"*/{one.file}"))) if path.is_file()), None)
    if found is None:
        raise VITaskError(
            f"--data-root {str(root)!r} holds no {one.file}; put it there, or leave {one.name} out (--sets)"
        )
    return found


def digest_of_set(one: DataSet, root: Path) -> str:
    return sha256_file(source_of(one, root))[:16]


def written(one: DataSet, root: Path, work: Path) -> Path:
    """The folder of a set, written if it is not there yet."""
    source = source_of(one, root)
    folder = work / "data" / one.name
    with made_once(folder) as missing:
        if missing:
            _write(one, source, folder, work)
    for split in ("val", "test"):
        with made_once(file_of(folder, split, complete=False)) as missing:
            if missing:
                _write_incomplete(folder, split)
    return folder


def file_of(folder: Path, split: str, *, complete: bool = True) -> Path:
    return folder / (f"{split}.json" if complete else f"{split}-{INCOMPLETE}.json")


def _write(one: DataSet, source: Path, folder: Path, work: Path) -> None:
    if one.medmnist:
        os.environ[ROOT] = str(source.parent)
        command("data", "medmnist", "--task", source.stem, "--out", folder, "--allow-duplicates")
        return
    unpacked = work / "unpacked" / one.name
    with made_once(unpacked) as missing:
        if missing:
            with zipfile.ZipFile(source) as archive, atomic_directory(unpacked) as temporary:
                archive.extractall(temporary)
    words = ["--modality", one.modality, "--task", one.name, *one.flags]
    if one.labels:
        words += ["--labels", ",".join(one.labels)]
    command("data", "folder", unpacked / "labels.csv", "--out", folder, "--allow-duplicates", *words)


def _write_incomplete(folder: Path, split: str) -> None:
    samples = read_samples(file_of(folder, split))
    question = instruction(read_labels(folder, "label set")["modality"], None)
    for sample in samples:
        sample["conversations"][0]["value"] = f"{IMAGE_TOKEN}\n{question}"
    with atomic_path(file_of(folder, split, complete=False)) as path:
        write_json(path, samples)
