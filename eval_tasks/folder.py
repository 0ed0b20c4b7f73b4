"""Anybody's labelled images as documents: a split of $VITASK_FOLDER, which `vitask data folder` wrote."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from vitask_plugin.eval_tasks import utils

from vitask_plugin.data.dataset import LABELS_FILE, read_labels
from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.instructions import (
    MULTI_LABEL,
    NO_FINDING,
    instruction,
    read_samples,
    response,
)
from vitask_plugin.data.names import same_names
from vitask_plugin.data.preparation import recorded
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.files import inside


@exit_on_bad_input
def documents(stand_in: datasets.Dataset) -> datasets.Dataset:
    """The samples of FOLDER/test.json, or val.json, as documents, every image of them read and looked at.

    The words come from FOLDER/labels.json, so that both instructions, with and without the label set, are there
    whichever of them the samples hold.

    Args:
        stand_in: its split is the one wanted.

    Raises:
        VITaskError: $VITASK_FOLDER is not set or not such a folder, an image is damaged, or the two files name
            different labels.
    """
    folder, split = _folder(), str(stand_in.split)
    labels = read_labels(folder, "VITASK_FOLDER's label set")
    choices, several = labels["choices"], labels["type"] == MULTI_LABEL
    pixels = recorded(labels, folder / LABELS_FILE)
    texts = {
        "question": instruction(labels["modality"], choices, multi_label=several),
        "incomplete_question": instruction(labels["modality"], None),
        "candidates": [f"{name}." for name in ([*choices, NO_FINDING] if several else choices)],
        "file": f"{folder.name}/{split}.json",
        "split": split,
        "kind": labels["type"],
        "pixels": None if pixels is None else json.dumps(pixels),
    }
    digest = hashlib.sha256()
    rows = []
    for index, sample in enumerate(tqdm(_samples(folder, split, labels), desc=folder.name, unit="image", disable=None)):
        path = inside(folder / "images", sample["image"])
        data = read_bytes(path)
        decode(data, path)
        digest.update(hashlib.sha256(data).digest())
        block = {name: sample["vitask"][name] for name in ("task", "label", "choices")}
        answer = response(choices, block["label"])
        image = {"bytes": None, "path": str(path)}
        rows.append({"image": image, "index": index, "answer": answer, "vitask": block, **texts})
    # lmms-eval's response cache for `vitask_llava` looks at the checksum.
    checksums = {str(folder): {"checksum": digest.hexdigest()}}
    features = datasets.Features({**utils._features(several), "pixels": datasets.Value("string")})
    info = datasets.DatasetInfo(features=features, download_checksums=checksums)
    return utils.judged(rows, info, split)


def _folder() -> Path:
    name = os.environ.get("VITASK_FOLDER")
    if not name:
        raise VITaskError(
            "VITASK_FOLDER is not set; it names the folder to evaluate on, which `vitask data folder ... --out DIR` "
            "wrote"
        )
    return Path(name).resolve()


def _samples(folder: Path, split: str, labels: dict[str, Any]) -> list[dict[str, Any]]:
    path = folder / f"{split}.json"
    if not path.is_file():
        words = "--val X" if split == "val" else "--test X, or with --val 0 --test 1"
        raise VITaskError(f"VITASK_FOLDER {str(folder)!r} has no {split} split; write it with {words}")
    samples = [sample for sample in read_samples(path) if "vitask" in sample]
    several = labels["type"] == MULTI_LABEL
    for sample in samples:
        block = sample["vitask"]
        if isinstance(block["label"], list) != several:
            raise VITaskError(
                f"{str(path)!r}, sample {sample.get('id')!r}: the label is {block['label']!r}, and {LABELS_FILE} has "
                f"the type {labels['type']!r}; write the folder again"
            )
        if block["task"] != labels["task"] or not same_names(block["choices"], labels["choices"]):
            raise VITaskError(
                f"{str(path)!r}, sample {sample.get('id')!r}: task {block['task']!r} with the labels "
                f"{block['choices']!r} is not that of {LABELS_FILE}, {labels['task']!r} with {labels['choices']!r}; "
                "write the folder again"
            )
    if not samples:
        raise VITaskError(f"{str(path)!r} has no sample with a 'vitask' block; write it with `vitask data folder`")
    return samples
