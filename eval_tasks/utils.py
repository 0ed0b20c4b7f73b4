"""What the task files call: a data file becomes documents, answers and label likelihoods become metric values."""

import functools
import io
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from loguru import logger
from PIL import Image

from vitask_plugin.data import medmnist
from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import Label, answers_of, instruction, label_set, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation import intervals
from vitask_plugin.evaluation.answers import parse_flexible, parse_strict
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.evaluation.metric_list import INTERVAL, METRICS, STRICT, of_outcomes, of_probabilities
from vitask_plugin.files import digest_of
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome, Probabilities

# Documents ---------------------------------------------------------------------------------------------------------


@exit_on_bad_input
def documents(stand_in: datasets.Dataset) -> datasets.Dataset:
    """A split of the data file that the task's `dataset_name` names, in memory: nothing is written.

    Images are PNG bytes, which lose nothing and which every model of the harness can read.

    Args:
        stand_in: its name and split are those wanted.
    """
    known = label_set(stand_in.info.config_name)
    size = _size()
    split = str(stand_in.split)
    images, values = medmnist.load(known, size, (split,))[split]
    path = medmnist.data_file(known, size)
    choices = list(known.choices)
    candidates = answers_of(choices, multi_label=known.multi_label)
    rows = []
    for index, (image, value) in enumerate(zip(images, values, strict=True)):
        label = np.flatnonzero(value).tolist() if known.multi_label else int(value[0])
        rows.append(
            {
                "image": {"bytes": _png(image), "path": None},
                "question": instruction(known.modality, choices, multi_label=known.multi_label),
                "incomplete_question": instruction(known.modality, None),
                "answer": response(choices, label),
                "candidates": candidates,
                "file": path.name,
                "split": split,
                "index": index,
                "kind": known.kind,
                "vitask": {"task": known.task, "label": label, "choices": choices},
            }
        )
    # lmms-eval's response cache for `vitask_llava` looks at the checksum.
    info = datasets.DatasetInfo(
        features=_features(known.multi_label), download_checksums={str(path): {"checksum": medmnist.md5(path)}}
    )
    return judged(rows, info, split)


def judged(rows: list[dict[str, Any]], info: datasets.DatasetInfo, split: str) -> datasets.Dataset:
    """The documents; lmms-eval's table does not show their split, so the log says it where it is not test."""
    if not rows:
        raise VITaskError(f"{next(iter(info.download_checksums))!r} has no image in its {split} split; judge another")
    if split != "test":
        logger.info(f"{rows[0]['vitask']['task']}: judged on the {len(rows)} images of the {split} split")
    return datasets.Dataset.from_list(rows, info=info)


def _features(multi_label: bool) -> datasets.Features:
    text, number = datasets.Value("string"), datasets.Value("int64")
    return datasets.Features(
        {
            "image": datasets.Image(),
            "question": text,
            "incomplete_question": text,
            "answer": text,
            "candidates": datasets.Sequence(text),
            "file": text,
            "split": text,
            "index": number,
            "kind": text,
            # As in training data; `vitask_llava` compares the choices with those it was trained on.
            "vitask": {
                "task": text,
                "label": datasets.Sequence(number) if multi_label else number,
                "choices": datasets.Sequence(text),
            },
        }
    )


def _size() -> int:
    """Side of the images in pixels, from $MEDMNIST_SIZE: it has to be the size of the training images."""
    size = os.environ.get("MEDMNIST_SIZE", "28")
    if size not in map(str, medmnist.SIZES):
        raise VITaskError(f"MEDMNIST_SIZE is {size!r}; it must be one of {', '.join(map(str, medmnist.SIZES))}")
    return int(size)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# One document's metric values --------------------------------------------------------------------------------------


def answer_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Metric values of one free-form answer: of its flexible reading, and as `..._strict` of its strict one."""
    choices, several = doc["vitask"]["choices"], doc["kind"] == MULTI_LABEL
    flexible = parse_flexible(results[0], choices, multi_label=several)
    return reading_results(doc, flexible, parse_strict(results[0], choices, multi_label=several))


def reading_results(doc: dict[str, Any], flexible: Label | None, strict: Label | None) -> dict[str, Any]:
    """Metric values of one answer by its two readings."""
    return {
        "n": {**_record(doc, flexible), "strict": strict},
        "unmapped": int(flexible is None),
        f"unmapped{STRICT}": int(strict is None),
        **_outcome_values(doc, flexible),
        **_outcome_values(doc, strict, STRICT),
    }


@exit_on_bad_input
def score_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Metric values of one document's likelihoods: (loss, greedy) of each candidate answer, loss = the negative
    log-likelihood in nats, summed over its tokens by `vitask_llava` (stock models may give the mean)."""
    losses = [_loss(result) for result in results]
    if not np.isfinite(losses).all():
        raise VITaskError(
            f"{doc['file']}, {doc['split']} row {doc['index']}: the model gives the labels the losses {losses}, not "
            "all of them finite; check its weights, or try another dtype"
        )
    likely = metrics.probabilities(losses, doc["kind"])
    decided = metrics.decide(likely, doc["kind"])
    prediction = np.flatnonzero(decided).tolist() if doc["kind"] == MULTI_LABEL else decided
    record = {**_record(doc, prediction), "log_likelihoods": [-loss for loss in losses], "probabilities": likely}
    item = Probabilities(_member(doc, doc["vitask"]["label"]), likely, doc["kind"])
    probable = {f"{name}{ending}": item for name in of_probabilities() for ending in ("", INTERVAL)}
    return {"n": record, **_outcome_values(doc, prediction), **probable}


def document_hash(doc: dict[str, Any]) -> str:
    """Hex SHA-256 of which document it is: its image's file, split and row, its task and label."""
    return digest_of({name: doc[name] for name in ("file", "split", "index", "vitask")})


def _record(doc: dict[str, Any], prediction: Label | None) -> dict[str, Any]:
    """What a report needs to know of one sample; it is logged as the value of `n`."""
    label, choices = doc["vitask"]["label"], doc["vitask"]["choices"]
    return {
        **{name: doc[name] for name in ("file", "split", "index", "kind")},
        **{name: doc[name] for name in ("source", "group") if doc.get(name) is not None},
        **{"choices": choices, "label": label, "prediction": prediction},
    }


def _outcome_values(doc: dict[str, Any], prediction: Label | None, suffix: str = "") -> dict[str, Any]:
    outcome = Outcome(_member(doc, doc["vitask"]["label"]), _member(doc, prediction))
    items = dict.fromkeys(of_outcomes(doc["kind"]), outcome)
    if "quadratic_kappa" in items:
        items["quadratic_kappa"] = metrics.farthest(outcome, len(doc["vitask"]["choices"]))
    right = metrics.hit(outcome)
    # Numbers where there are some: the harness makes standard errors of its own from them.
    values = {**items, "accuracy": right, "subset_accuracy": float(right == 1)}
    return {
        **{f"{name}{suffix}": value for name, value in values.items()},
        **{f"{name}{suffix}{INTERVAL}": item for name, item in items.items()},
    }


def _member(doc: dict[str, Any], label: Label | None) -> int | list[int] | None:
    """A label as `metrics` take it: an index, or of a multi-label document zeros and ones."""
    if label is None or isinstance(label, int):
        return label
    return [int(index in label) for index in range(len(doc["vitask"]["choices"]))]


def _loss(result: Any) -> float:
    # lmms-eval 0.7.3 turns what is no text into text, so the pair arrives as "(1.5, False)".
    return float(result.strip("([").split(",")[0]) if isinstance(result, str) else result[0]


# All documents' metrics ----------------------------------------------------------------------------------------------

count = len
total = sum
mean = statistics.fmean


def aggregation(name: str) -> Callable[[Sequence[Any]], Any]:
    """What makes one number of all documents' values of a metric, of its strict reading, or of its interval."""
    metric = name.removesuffix(INTERVAL)
    whole = metric.removesuffix(STRICT)
    return METRICS[whole].over if metric == name else functools.partial(intervals.interval, whole)


def __getattr__(name: str) -> Callable[[Sequence[Any]], Any]:
    """What else the task files name: see `aggregation`."""
    if name.removesuffix(INTERVAL) not in METRICS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return aggregation(name)


def mean_over_sets(values: Sequence[Any], sizes: Sequence[int], weight_by_size: bool) -> Any:
    """A group's metric: the plain mean over its data sets, large and small alike, or the interval of that mean."""
    return intervals.interval_of_mean(values) if isinstance(values[0], list) else statistics.fmean(values)


def total_over_sets(values: Sequence[int], sizes: Sequence[int], weight_by_size: bool) -> int:
    """A group's count."""
    return sum(values)
