"""MedMNIST v2 and MedMNIST+ (2D): each image is classified in words.

`medmnist.json` holds a row per set: what its images are, its classes, and whether an image has several. The images
come from the files of the `medmnist` package, which it downloads from Zenodo and checks by their MD5.
"""

import io
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image

from vitask_plugin.data.instructions import Label, instruction, response
from vitask_plugin.evaluation.answers import parse_flexible
from vitask_plugin.inference.metrics import Outcome, hit, macro_f1, unmapped


def medmnist_process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """The test images of the set that the task's `dataset_name` names: `breastmnist`, or with a size `breastmnist_224`.

    Args:
        dataset: the rows of `medmnist.json`.
    """
    flag, _, size = dataset.info.config_name.partition("_")
    row = next(row for row in dataset if row["flag"] == flag)
    images, values = _load(flag, int(size or 28))
    choices, several = row["choices"], row["multi_label"]
    question = instruction(row["modality"], choices, multi_label=several)
    docs = []
    for index, (image, value) in enumerate(zip(images, values, strict=True)):
        labels = np.flatnonzero(value).tolist() if several else [int(value[0])]
        answer = response(choices, labels if several else labels[0])
        docs.append(
            {
                "image": {"bytes": _png(image), "path": None},
                "index": index,
                "question": question,
                "answer": answer,
                "labels": labels,
                "choices": choices,
                "multi_label": several,
            }
        )
    return datasets.Dataset.from_list(docs, features=_features())


def _features() -> datasets.Features:
    text, number = datasets.Value("string"), datasets.Value("int64")
    return datasets.Features(
        {
            "image": datasets.Image(),
            "index": number,
            "question": text,
            "answer": text,
            "labels": datasets.Sequence(number),
            "choices": datasets.Sequence(text),
            "multi_label": datasets.Value("bool"),
        }
    )


def _load(flag: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Test images [N, H, W] or [N, H, W, 3] and labels [N, 1] or, of several labels, [N, K]."""
    try:
        import medmnist
    except ImportError:
        raise ImportError("The MedMNIST tasks read the files of the medmnist package: pip install medmnist") from None

    # $MEDMNIST_ROOT for files that are elsewhere than ~/.medmnist, as on machines without a network.
    root = Path(os.environ.get("MEDMNIST_ROOT") or "~/.medmnist").expanduser()
    data_class = getattr(medmnist, medmnist.INFO[flag]["python_class"])
    path = root / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    accelerator = Accelerator()
    if accelerator.is_local_main_process and not path.is_file():
        root.mkdir(parents=True, exist_ok=True)
        data_class(split="test", download=True, root=str(root), size=size)
    accelerator.wait_for_everyone()
    data = data_class(split="test", root=str(root), size=size)
    return data.imgs, data.labels


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def medmnist_doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def medmnist_doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    kwargs = lmms_eval_specific_kwargs or {}
    return f"{kwargs.get('pre_prompt', '')}{doc['question']}{kwargs.get('post_prompt', '')}"


def medmnist_doc_to_messages(
    doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The image, then the question: for models with a chat template."""
    content = [{"type": "image", "url": image} for image in medmnist_doc_to_visual(doc)]
    content.append({"type": "text", "text": medmnist_doc_to_text(doc, lmms_eval_specific_kwargs)})
    return [{"role": "user", "content": content}]


def medmnist_process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The values of one answer. An answer that names no label, or two of one, is wrong."""
    prediction = parse_flexible(results[0], doc["choices"], multi_label=doc["multi_label"])
    target = doc["labels"] if doc["multi_label"] else doc["labels"][0]
    outcome = Outcome(_members(doc, target), _members(doc, prediction))
    return {"accuracy": hit(outcome), "macro_f1": outcome, "unmapped": outcome}


def _members(doc: dict[str, Any], label: Label | None) -> int | list[int] | None:
    """A class index; of several labels zeros and ones."""
    if not isinstance(label, list):
        return label
    return [int(index in label) for index in range(len(doc["choices"]))]


def medmnist_macro_f1(results: list[Outcome]) -> float:
    return macro_f1(results)


def medmnist_unmapped(results: list[Outcome]) -> int:
    return unmapped(results)
