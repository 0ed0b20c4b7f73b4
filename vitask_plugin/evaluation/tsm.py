"""The TSM by itself on labelled images: what it says of each, as a document of our lmms-eval tasks.

K = classes of one task, K_all = columns of the TSM's head, N = samples of one task.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitask_plugin.data.comparison import check_prepared, looks, tasks_alike
from vitask_plugin.data.instructions import kind_of, label_sets, read_samples
from vitask_plugin.data.label_file import LABELS_FILE, sets_in
from vitask_plugin.data.medmnist import SIZES, file_name
from vitask_plugin.data.names import look
from vitask_plugin.data.preparation import seen_in
from vitask_plugin.data.sizes import sizes_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.tsm.device import as_device, memory_error_as
from vitask_plugin.tsm.joint import Tasks, columns
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.samples import LabelledImage, batches, make_loader, read_labelled

SPLITS = ("test", "val")
FOLDER_TASK = "vitask_folder"
ANYWAY = "judge them with `vitask tsm evaluate --any-image-size` if that is meant"


@dataclass(frozen=True)
class JudgedTask:
    """One data set, judged by the TSM.

    Attributes:
        name: the lmms-eval task whose documents these are: `medmnist_breast`, or `vitask_folder` of one's own images.
        task: of the data.
        documents: of that task, without image and question; `file`, `split` and `index` say which image it is.
        log_likelihoods: float64 [N, K], multi-label [N, K + 1] (the last is "no finding"): nats.
        available: samples that there are without a limit.
    """

    name: str
    task: str
    documents: list[dict[str, Any]]
    log_likelihoods: np.ndarray
    available: int

    @property
    def title(self) -> str:
        """What a report calls the data set: its task, or the folder of one's own."""
        return self.documents[0]["file"].rpartition("/")[0] if self.name == FOLDER_TASK else self.name

    @property
    def choices(self) -> list[str]:
        return self.documents[0]["vitask"]["choices"]


def judge(
    tsm_directory: str | Path,
    data: str | Path,
    image_folder: str | Path,
    split: str | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    trust_code: bool = False,
    any_size: bool = False,
    limit: int | None = None,
) -> list[JudgedTask]:
    """What a TSM says of every sample with a `vitask` block, task by task.

    Args:
        data: LLaVA JSON, of one task or several.
        split: test or val; None = as the file is called.
        batch_size: images per forward. workers: processes that read images; 0 = this one.
        trust_code: see `TSM.load`.
        any_size: go on if the images are not like those that the TSM was trained on.
        limit: only the first so many samples of each data set, as lmms-eval's `--limit`; None = all.

    Raises:
        VITaskError: no split or no sample, an unreadable image or one unlike the TSM's, or a task whose label set is
            none of the TSM's.
    """
    split = _split(data, split)
    images = read_labelled([data], [image_folder], training=False)
    samples = [sample for sample in read_samples(data) if "vitask" in sample]
    tsm = TSM.load(tsm_directory, as_device(device), trust_code=trust_code)
    sets = _sets_of(Path(data))
    groups: dict[tuple[str, str], list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault((sample["vitask"]["task"], _set_of(sample, sets)), []).append(position)
    available = {key: len(positions) for key, positions in groups.items()}
    groups = {key: positions[:limit] for key, positions in groups.items()}
    first = {task: samples[positions[0]]["vitask"] for (task, _), positions in groups.items()}
    answering = {task: _answering(tsm.record["tasks"], block, tsm_directory, data) for task, block in first.items()}
    if not any_size:
        check_prepared(tsm.trained_on, seen_in(samples, image_folder, data), ANYWAY)
    taken = sorted(position for positions in groups.values() for position in positions)
    places = {position: place for place, position in enumerate(taken)}
    read = [images[position] for position in taken]
    logits = _logits(tsm, read, answering, batch_size=batch_size, workers=workers)
    sides = sizes_of(samples, image_folder)
    judged = []
    for (task, own_set), positions in groups.items():
        block, name = first[task], answering[task]
        own = columns(tsm.record["tasks"], name)
        order = _order(tsm.record["tasks"][name]["choices"], block["choices"])
        rows = [places[position] for position in positions]
        scores = log_likelihoods(logits[rows, own][:, order], multi_label=isinstance(block["label"], list))
        called, file, kind = _source(Path(data), split, block, sides[task], own_set, sets)
        documents = [
            {"file": file, "split": split, "index": index, "kind": kind, **_own(samples[position])}
            for index, position in zip(_rows(task, split, positions, samples), positions, strict=True)
        ]
        judged.append(JudgedTask(called, task, documents, scores, available[task, own_set]))
    return judged


def log_likelihoods(logits: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Logits [N, K] of one task -> log-probabilities (nats) of its answers, float64.

    [N, K] of a softmax; of independent labels [N, K + 1]: each label alone, and last none of them, so that
    `metrics.probabilities` gives back each label's sigmoid.
    """
    logits = logits.astype(np.float64)
    if not multi_label:
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    none = -np.logaddexp(0, logits).sum(axis=1, keepdims=True)
    return np.hstack([none + logits, none])


def _split(data: str | Path, given: str | None) -> str:
    split = given or Path(data).stem
    if split not in SPLITS:
        raise VITaskError(
            f"data file {str(data)!r} does not say by its name which split it holds; give --split {' or '.join(SPLITS)}"
            " (figures on training images would say what was memorised)"
        )
    return split


def _answering(tasks: Tasks, block: Mapping[str, Any], tsm: str | Path, data: str | Path) -> str:
    """Which of the TSM's tasks has the label set of a `vitask` block."""
    wanted, several = looks(block["choices"]), isinstance(block["label"], list)
    label_sets = {name: entry["choices"] for name, entry in tasks.items()}
    alike = [
        name
        for name in tasks_alike(label_sets, block["task"], block["choices"])
        if looks(label_sets[name]) == wanted and tasks[name]["multi_label"] == several
    ]
    if not alike:
        known = "; ".join(f"{name} ({', '.join(names)})" for name, names in label_sets.items())
        raise VITaskError(
            f"data file {str(data)!r} has the task {block['task']!r} with the labels {', '.join(block['choices'])}"
            f"{', several to an image' * several}, and TSM {str(tsm)!r} has no task of these labels but {known}; judge "
            "the TSM that was trained on them"
        )
    if len({columns(tasks, name).start for name in alike}) > 1:
        raise VITaskError(
            f"data file {str(data)!r} has the task {block['task']!r}, and TSM {str(tsm)!r} knows its labels as "
            f"{', '.join(alike)}, each with a head of its own; write the data with `--task` and the one that is meant"
        )
    return alike[0]


def _order(own: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each of the wanted names stands among the TSM's own, which look alike in any order."""
    places = {look(name): place for place, name in enumerate(own)}
    return [places[look(name)] for name in wanted]


def _logits(
    tsm: TSM, images: Sequence[LabelledImage], answering: Mapping[str, str], *, batch_size: int, workers: int
) -> np.ndarray:
    """Float32 [all samples, K_all]."""
    # The loader knows tasks of the TSM alone; of the labels nothing is needed here.
    named = [
        LabelledImage(image.path, {**image.block, "task": answering[image.block["task"]]}, image.source)
        for image in images
    ]
    how = {"batch_size": batch_size, "workers": workers, "seed": 0}
    loader = make_loader(named, tsm.record["tasks"], tsm.preprocessing(), training=False, **how)
    sentence = f"out of memory on {tsm.device} with {batch_size} images in a batch; give a smaller --batch-size"
    with memory_error_as(sentence), torch.no_grad():
        found = [tsm(batch.pixels).logits.cpu().numpy() for batch in batches(loader, tsm.device, "TSM")]
    logits = np.concatenate(found)
    wrong = ~np.isfinite(logits).all(axis=1)
    if wrong.any():
        raise VITaskError(
            f"image {str(images[int(wrong.argmax())].path)!r} has a logit that is not finite; train or import the TSM "
            "again"
        )
    return logits


def _own(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a document has of its sample, the owner's name for the image and its group among it where they are known."""
    block = {name: sample["vitask"][name] for name in ("task", "label", "choices")}
    source = sample.get("source")
    return {
        "vitask": block,
        "source": source if isinstance(source, str) else None,
        "group": sample["vitask"].get("group"),
    }


def _sets_of(data: Path) -> dict[str, dict[str, Any]]:
    """The label sets beside a data file, by the name of each data set that was merged into it; "" = of one set."""
    path = data.parent / LABELS_FILE
    labels = read_json(path, "label set beside the data file,") if path.is_file() else {}
    return sets_in(labels) or {"": labels if isinstance(labels, dict) else {}}


def _set_of(sample: Mapping[str, Any], sets: Mapping[str, Any]) -> str:
    """Of a file that several sets were merged into, ids begin with the set's name and a slash."""
    name = str(sample.get("id")).partition("/")[0]
    return name if name in sets else ""


def _source(
    data: Path, split: str, block: Mapping[str, Any], sizes: Mapping[str, Any], own: str, sets: Mapping[str, Any]
) -> tuple[str, str, str]:
    """(lmms-eval task, data file, kind) under which an evaluation of a VLM on the same images is logged.

    labels.json beside the file tells; without it, a label set of MedMNIST's is taken to be MedMNIST's.

    Args:
        own: the set's name. sets: see `_sets_of`.
    """
    labels = sets.get(own) or {}
    labels = labels if labels.get("task") == block["task"] else {}
    known = label_sets().get(block["task"])
    known = known if known and list(known.choices) == list(block["choices"]) else None
    guessed = kind_of(block["choices"], multi_label=isinstance(block["label"], list))
    kind = labels.get("type") or (known.kind if known else guessed)
    folder = data.resolve().parent.name
    if own:
        alone = sum(other.get("task") == block["task"] for other in sets.values()) == 1
        return known.task if known and alone else f"vitask_{own}", f"{folder}/{own}/{split}.json", kind
    if known and (labels.get("file") or not labels):
        return known.task, labels.get("file") or file_name(known, _side(sizes)), kind
    # A label set beside the file is of one task; several without one have no other names than their own.
    return FOLDER_TASK, f"{folder if labels else block['task']}/{split}.json", kind


def _side(sizes: Mapping[str, Any]) -> int:
    """The smallest of MedMNIST's sizes that holds the images."""
    return next((size for size in SIZES if size >= max(sizes["width"][1], sizes["height"][1])), SIZES[-1])


def _rows(task: str, split: str, positions: Sequence[int], samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """The samples' rows in their split: as their ids say, if all do and no two are one, else in the order of the file.

    A file that was put together from several, or cut, still names the rows that other runs were judged on.
    """
    pattern = re.compile(rf"(?:.*/)?{re.escape(task)}-{split}-(\d+)")
    found = [pattern.fullmatch(str(samples[position].get("id"))) for position in positions]
    rows = [int(match[1]) for match in found if match]
    return rows if len(set(rows)) == len(positions) else list(range(len(positions)))
