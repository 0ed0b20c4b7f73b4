"""Anybody's labelled images as documents: a split of $VITASK_FOLDER, which `vitask data folder` wrote."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from vitask_plugin.eval_tasks import utils

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.instructions import answers_of, instruction, read_samples, response
from vitask_plugin.data.label_file import LABELS_FILE, check_sample, read_labels
from vitask_plugin.data.preparation import recorded
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.files import inside


@exit_on_bad_input
def documents(stand_in: datasets.Dataset) -> datasets.Dataset:
    """The samples of FOLDER/test.json, or val.json, as documents.

    Args:
        stand_in: its split is the one wanted.

    Raises:
        VITaskError: $VITASK_FOLDER is not set or not such a folder, see `read`.
    """
    folder = named_folder()
    return read(folder, str(stand_in.split), folder.name)


def read(folder: Path, split: str, name: str) -> datasets.Dataset:
    """A split of one data set, every image of it read and looked at.

    The words come from FOLDER/labels.json, so that both instructions, with and without the label set, are there
    whichever of them the samples hold.

    Args:
        name: of the folder, in what is logged of a sample.

    Raises:
        VITaskError: it is no data set, an image is damaged, or the two files name different labels.
    """
    labels = read_labels(folder, "VITASK_FOLDER's label set")
    choices, several = labels["choices"], labels["type"] == MULTI_LABEL
    pixels = recorded(labels, folder / LABELS_FILE)
    texts = {
        "question": instruction(labels["modality"], choices, multi_label=several),
        "incomplete_question": instruction(labels["modality"], None),
        "candidates": answers_of(choices, multi_label=several),
        "file": f"{name}/{split}.json",
        "split": split,
        "kind": labels["type"],
        "pixels": None if pixels is None else json.dumps(pixels),
    }
    digest = hashlib.sha256()
    rows = []
    for index, sample in enumerate(tqdm(_samples(folder, split, labels), desc=name, unit="image", disable=None)):
        path = inside(folder / "images", sample["image"])
        data = read_bytes(path)
        decode(data, path)
        digest.update(hashlib.sha256(data).digest())
        block = {name: sample["vitask"][name] for name in ("task", "label", "choices")}
        answer = response(choices, block["label"])
        image = {"bytes": None, "path": str(path)}
        # Folders of earlier versions do not say which file an image was made of.
        known = {"source": _text(sample.get("source")), "group": sample["vitask"].get("group")}
        rows.append({"image": image, "index": index, "answer": answer, "vitask": block, **known, **texts})
    # lmms-eval's response cache for `vitask_llava` looks at the checksum.
    checksums = {str(folder): {"checksum": digest.hexdigest()}}
    texts_of_own = dict.fromkeys(("pixels", "source", "group"), datasets.Value("string"))
    features = datasets.Features({**utils._features(several), **texts_of_own})
    info = datasets.DatasetInfo(features=features, download_checksums=checksums)
    return utils.judged(rows, info, split)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None  # in JSON of other makers it may be anything


def named_folder() -> Path:
    """$VITASK_FOLDER.

    Raises:
        VITaskError: it is not set.
    """
    name = os.environ.get("VITASK_FOLDER")
    if not name:
        raise VITaskError(
            "VITASK_FOLDER is not set; it names the folder to evaluate on, which `vitask data folder ... --out DIR` "
            "wrote, or for several sets `vitask data merge`"
        )
    return Path(name).resolve()


def _samples(folder: Path, split: str, labels: dict[str, Any]) -> list[dict[str, Any]]:
    path = folder / f"{split}.json"
    if not path.is_file():
        words = "--val X" if split == "val" else "--test X, or with --val 0 --test 1"
        raise VITaskError(f"VITASK_FOLDER {str(folder)!r} has no {split} split; write it with {words}")
    samples = [sample for sample in read_samples(path) if "vitask" in sample]
    for sample in samples:
        check_sample(sample, labels, path)
    if not samples:
        raise VITaskError(f"{str(path)!r} has no sample with a 'vitask' block; write it with `vitask data folder`")
    return samples
