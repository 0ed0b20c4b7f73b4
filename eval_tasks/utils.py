"""What the task files call: a data file becomes documents, answers and label likelihoods become metric values."""

import io
import os
from typing import Any

import datasets
import numpy as np
from PIL import Image

from vitask_plugin.data import medmnist
from vitask_plugin.data.instructions import instruction, label_set, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation import metrics
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.evaluation.metrics import Outcome, Probabilities
from vitask_plugin.files import sha256_file

macro_f1 = metrics.macro_f1
auc = metrics.auc
total = sum

_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "incomplete_question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "label": datasets.Value("int64"),
        "answers": datasets.Sequence(datasets.Value("string")),
        "kind": datasets.Value("string"),
        # As in training data; `vitask_llava` compares the choices with those it was trained on.
        "vitask": {
            "task": datasets.Value("string"),
            "label": datasets.Value("int64"),
            "choices": datasets.Sequence(datasets.Value("string")),
        },
    }
)


@exit_on_bad_input
def documents(stand_in: datasets.Dataset) -> datasets.Dataset:
    """The test split of the data file that the task's `dataset_name` names, in memory: nothing is written.

    Images are PNG bytes, which lose nothing and which every model of the harness can read.
    """
    known = label_set(stand_in.info.config_name)
    if known.multi_label:
        raise VITaskError(f"{known.flag!r} is a multi-label data set; there is no evaluation task for those yet")
    size = _size()
    images, labels = medmnist.load(known, size)["test"]
    choices = list(known.choices)
    answers = [response(choices, label) for label in range(len(choices))]
    rows = [
        {
            "image": {"bytes": _png(image), "path": None},
            "question": instruction(known.modality, choices),
            "incomplete_question": instruction(known.modality, None),
            "answer": answers[label],
            "label": label,
            "answers": answers,
            "kind": known.kind,
            "vitask": {"task": known.task, "label": label, "choices": choices},
        }
        for image, label in zip(images, labels[:, 0].tolist(), strict=True)
    ]
    path = medmnist.data_file(known, size)
    info = datasets.DatasetInfo(features=_FEATURES, download_checksums={str(path): {"checksum": sha256_file(path)}})
    return datasets.Dataset.from_list(rows, info=info)


def _size() -> int:
    """Side of the images in pixels, from $MEDMNIST_SIZE: it has to be the size of the training images."""
    size = os.environ.get("MEDMNIST_SIZE", "28")
    if size not in map(str, medmnist.SIZES):
        raise VITaskError(f"MEDMNIST_SIZE is {size!r}; it must be one of {', '.join(map(str, medmnist.SIZES))}")
    return int(size)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def answer_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Metric values of one free-form answer."""
    choices = doc["vitask"]["choices"]
    outcome = Outcome(doc["label"], metrics.parse_answer(results[0], choices))
    return {
        "accuracy": float(outcome.target == outcome.prediction),
        "exact_accuracy": float(outcome.target == metrics.parse_exact(results[0], choices)),
        "macro_f1": outcome,
        "unmapped": int(outcome.prediction is None),
    }


def score_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Metric values of one document's label likelihoods: (loss, greedy) for each choice, loss = the summed negative
    log-likelihood."""
    likely = metrics.probabilities([_loss(result) for result in results])
    outcome = Outcome(doc["label"], int(np.argmax(likely)))
    return {
        "accuracy": float(outcome.target == outcome.prediction),
        "macro_f1": outcome,
        "auc": Probabilities(doc["label"], likely, doc["kind"]),
    }


def _loss(result: Any) -> float:
    # lmms-eval 0.7.3 turns what is no text into text, so the pair arrives as "(1.5, False)".
    return float(result.strip("([").split(",")[0]) if isinstance(result, str) else result[0]
