"""lmms-eval's output folders without a model: drawn answers and likelihoods go through the tasks' own functions."""

import argparse
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from vitask_plugin.eval_tasks import folder as folder_task
from vitask_plugin.eval_tasks import utils

from vitask_plugin import eval_tasks
from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data import folder as data_folder
from vitask_plugin.data.instructions import LabelSet, label_set, response
from vitask_plugin.record.checkpoint import save_record

DATE = "20260101_000000"


def write_file(root: Path, data: str, images: int = 24, *, seed: int = 0, side: int = 28) -> None:
    """A data file of the layout of MedMNIST's in `root`: every label has images, and images differ by label."""
    known = label_set(data)
    generator = np.random.default_rng(seed)
    if known.multi_label:
        labels = (generator.random((images, len(known.choices))) < 0.2).astype(np.uint8)
        labels[0] = 0
    else:
        labels = (np.arange(images) % len(known.choices)).astype(np.uint8)[:, None]
    pixels = generator.integers(0, 120, (images, side, side, 3), dtype=np.uint8) + 9 * labels[:, :1, None, None]
    arrays = {
        f"{split}_{what}": x
        for split in ("train", "val", "test")
        for what, x in (("images", pixels), ("labels", labels))
    }
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / f"{known.flag}.npz", **arrays)


def write_own_folder(out: Path, data: str, root: Path) -> None:
    """The images of a data file as `vitask data folder` writes an external set: the test split alone."""
    known = label_set(data)
    with np.load(root / f"{known.flag}.npz") as file:
        for index, (pixels, label) in enumerate(zip(file["test_images"], file["test_labels"], strict=True)):
            path = out.with_name(f"{out.name}-source") / known.choices[label[0]].replace(" ", "_") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    words = [str(out.with_name(f"{out.name}-source")), "--out", str(out), "--modality", known.modality]
    words += ["--task", known.task, "--val", "0", "--test", "1", "--labels", ",".join(known.choices)]
    parser = argparse.ArgumentParser()
    data_folder.configure(parser)
    data_folder.run(parser.parse_args(words))


def write_run(
    folder: Path,
    data: Mapping[str, float],
    root: Path,
    *,
    model_args: str = "pretrained=somewhere/llava",
    model: str = "vitask_llava",
    variants: tuple[str, ...] = ("", "incomplete", "score"),
    date: str = DATE,
    limit: int | None = None,
    samples: bool = True,
    seed: int = 0,
    own: Path | None = None,
    split: str = "test",
) -> Path:
    """What lmms-eval writes below `folder` for a model that is right as often as it is made to be.

    Args:
        data: {flag: how far the true label's score is raised above the noise}, 0 = chance.
        root: folder with the data files (see `write_file`).
        split: what is judged.
        own: a folder (see `write_own_folder`) that the task `vitask_folder` judges in place of the one data file.

    Returns:
        The results file.
    """
    target = folder / "somewhere__llava"
    target.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"results": {}, "configs": {}, "versions": {}, "n-samples": {}, "group_subtasks": {}}
    record["config"] = {"model": model, "model_args": model_args, "limit": limit}
    record["model_name_sanitized"] = target.name
    for number, (flag, skill) in enumerate(data.items()):
        known = label_set(flag)
        documents = _own_documents(own, split) if own else _documents(known, root, split)
        for variant in variants:
            base = "vitask_folder" if own else known.task
            task = f"{base}_{variant}" if variant else base
            generator = np.random.default_rng([seed, number, len(variant)])
            lines = [_line(document, known, variant, skill, generator) for document in documents[:limit]]
            version, aggregations = _template()
            figures = {
                name: aggregations[name]([line[name] for line in lines]) for name in aggregations if name in lines[0]
            }
            record["results"][task] = {f"{name},none": value for name, value in figures.items()} | {"alias": task}
            record["versions"][task] = version
            record["configs"][task] = {"task": task, "test_split": split}
            record["n-samples"][task] = {"original": len(documents), "effective": len(lines)}
            if samples:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (target / f"{date}_samples_{task}.jsonl").write_text(text)
    path = target / f"{date}_results.json"
    path.write_text(json.dumps(record))
    return path


@lru_cache(maxsize=1)
def _template() -> tuple[float, dict[str, Any]]:
    """Version and aggregations, as lmms-eval reads them."""
    from lmms_eval.utils import load_yaml_config

    template = load_yaml_config(str(Path(eval_tasks.__path__[0], "_template.yaml")), mode="full")
    return template["metadata"]["version"], {row["metric"]: row["aggregation"] for row in template["metric_list"]}


def _documents(known: LabelSet, root: Path, split: str) -> list[dict[str, Any]]:
    with np.load(root / f"{known.flag}.npz") as file:
        labels = file[f"{split}_labels"]
    return [
        {
            "file": f"{known.flag}.npz",
            "split": split,
            "index": index,
            "kind": known.kind,
            "vitask": {
                "task": known.task,
                "label": np.flatnonzero(row).tolist() if known.multi_label else int(row[0]),
                "choices": list(known.choices),
            },
        }
        for index, row in enumerate(labels)
    ]


def _own_documents(own: Path, split: str) -> list[dict[str, Any]]:
    with mock.patch.dict(os.environ, {"VITASK_FOLDER": str(own)}):
        return folder_task.documents(SimpleNamespace(split=split)).remove_columns("image").to_list()


def _line(
    document: dict[str, Any], known: LabelSet, variant: str, skill: float, generator: np.random.Generator
) -> dict[str, Any]:
    label = document["vitask"]["label"]
    scores = generator.normal(0, 1, len(known.choices) + known.multi_label)
    scores[label if label != [] else -1] += skill * (0.7 if variant == "incomplete" else 1)
    if variant == "score":
        results: list[Any] = [(float(-score), False) for score in np.log(np.exp(scores) / np.exp(scores).sum())]
        logged: Any = [str(result) for result in results]
        values = utils.score_results(document, results)
    else:
        if known.multi_label:
            answer: Any = np.flatnonzero(scores[:-1] > max(scores[-1], 1.0)).tolist()
        else:
            answer = int(scores.argmax())
        # Some answers are sentences, and some say nothing.
        logged = response(known.choices, answer)
        if document["index"] % 7 == 3:
            logged = f"The image shows {logged}"
        if document["index"] % 11 == 5:
            logged = "I cannot tell."
        values = utils.answer_results(document, [logged])
    return {"doc_id": document["index"], "target": str(label), "filtered_resps": logged, "input": "...", **values}


def write_record(folder: Path, flags: Mapping[str, Any]) -> Path:
    """The record that training leaves beside a checkpoint, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    save_record(folder, VITaskArguments(**flags), None, None, {}, "v1")
    return folder
