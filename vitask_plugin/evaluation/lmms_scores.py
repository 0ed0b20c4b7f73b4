"""The label scores of a data file's images, by our models of lmms-eval in this process: exactly what a `_score` task
gives for the same images and the same question."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lmms_eval.api.instance import Instance

from vitask_plugin.data.instructions import answers_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.harness import as_error
from vitask_plugin.evaluation.lmms_base import VITaskModel
from vitask_plugin.evaluation.validation_data import TaskImages
from vitask_plugin.record.host import host_of


def open_model(checkpoint: str | Path, **model_args: Any) -> VITaskModel:
    """The model of the checkpoint's host.

    Args:
        model_args: see `VITaskModel`.

    Raises:
        VITaskError: one of them, or the checkpoint, is no good.
    """
    if host_of(checkpoint) == "hf":
        from vitask_plugin.evaluation.lmms_hf import VITaskHF as Model
    else:
        from vitask_plugin.evaluation.lmms_llava import VITaskLlava as Model
    with as_error():
        return Model(pretrained=str(checkpoint), **model_args)


def label_scores(model: VITaskModel, asked: TaskImages, *, ep: bool) -> np.ndarray:
    """Summed log-likelihoods (nats) of the answers, float64 [N, C]; of several labels the last one is "no finding".

    Args:
        ep: with exemplars, which the model then has to have.

    Raises:
        VITaskError: an image that cannot be read, or is unlike those of training; a score that is not finite.
    """
    answers = answers_of(asked.classes, multi_label=asked.multi_label)
    # The model looks at each place once, and another file's images may be unlike these.
    place = asked.task, f"{asked.images[0].source}, {'with' if ep else 'without'} exemplars"
    model.task_dict[place[0]] = {place[1]: _documents(asked)}
    requests = [
        Instance(
            request_type="loglikelihood",
            arguments=(asked.question, answer, _image, number, *place),
            idx=index,
            metadata={"task": asked.task, "doc_id": number, "repeats": 1},
        )
        for number in range(len(asked.images))
        for index, answer in enumerate(answers)
    ]
    prompting = model.prompting
    try:
        model.prompting = prompting if ep else None
        with as_error():
            losses = [loss for loss, _ in model.loglikelihood(requests)]
    finally:
        model.prompting = prompting
    scores = -np.array(losses).reshape(len(asked.images), len(answers))
    wrong = ~np.isfinite(scores).all(axis=1)
    if wrong.any():
        raise VITaskError(
            f"image {str(asked.images[int(wrong.argmax())].path)!r}: the model's label scores are not all finite; "
            "check its weights, or try another dtype"
        )
    return scores


def _image(document: dict[str, Any]) -> list[Any]:
    return [document["image"]]


def _documents(asked: TaskImages) -> datasets.Dataset:
    number, text = datasets.Value("int64"), datasets.Value("string")
    label = datasets.Sequence(number) if asked.multi_label else number
    features = {
        "image": datasets.Image(),
        "pixels": text,
        "vitask": {"task": text, "label": label, "choices": datasets.Sequence(text)},
    }
    pixels = None if asked.pixels is None else json.dumps(asked.pixels)
    rows = [
        {
            "image": {"bytes": None, "path": str(image.path)},
            "pixels": pixels,
            "vitask": {name: image.block[name] for name in ("task", "label", "choices")},
        }
        for image in asked.images
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))
