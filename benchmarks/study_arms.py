"""From a run of `study.py` to its rows: the arm is made, and judged on val and test, without and with EP.

The scores of each image lie beside the rows in the work folder, for what is made of two models' answers.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from study_data import file_of
from study_distil import distilled
from study_head import headed
from study_judging import Judge, figures, labels_of
from study_plan import ARMS, Arm, Run
from study_probe import probed
from study_training import Bench

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.tsm import log_likelihoods
from vitask_plugin.files import atomic_directory
from vitask_plugin.tsm.features import FeatureStore

JUDGED = ("val", "test")
Scores = dict[tuple[str, bool, bool], np.ndarray]  # (split, complete instruction, with EP) -> [N, K]


def folder_of(bench: Bench, run: Run, key: str) -> Path:
    return bench.work / "runs" / f"{run.name}-{key}"


def rows_of(bench: Bench, data: Path, run: Run, key: str, splits: tuple[str, ...] = JUDGED) -> list[dict[str, Any]]:
    """The rows of a run without what all rows have: `ep`, `instructions`, the splits' figures and the time.

    Args:
        key: digest of the run's configuration. splits: that are read.
    """
    arm, began, computed = ARMS[run.arm], time.monotonic(), time.process_time()
    scores, more = _scores(bench, data, run, arm, splits)
    spent = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - computed, 1)}
    tsm = {} if arm.kind in ("tsm", "linear_probe", "untuned") else _tsm_scores(bench, data, run.seed, splits)
    rows = []
    for complete, ep in dict.fromkeys((complete, ep) for _, complete, ep in scores):
        row: dict[str, Any] = {"ep": ep, "instructions": "complete" if complete else "incomplete"}
        for split in splits:
            labels, kind = labels_of(file_of(data, split))
            row[split] = figures(scores[split, complete, ep], labels, kind, tsm.get((split, True, False)))
        rows.append({**row, **more, **spent})
    with atomic_directory(folder_of(bench, run, key)) as temporary:
        named = {f"{split}-{int(complete)}-{int(ep)}": one for (split, complete, ep), one in scores.items()}
        save_file({name: np.ascontiguousarray(one) for name, one in named.items()}, temporary / "scores.safetensors")
        (temporary / "rows.json").write_text(json.dumps(rows))
    return rows


def _scores(bench: Bench, data: Path, run: Run, arm: Arm, splits: tuple[str, ...]) -> tuple[Scores, dict[str, Any]]:
    if arm.kind == "tsm":
        return _tsm_scores(bench, data, run.seed, splits), {"train": _tsm_on_training(bench, data, run.seed)}
    if arm.kind == "linear_probe":
        return probed(bench, data, splits)
    if arm.kind == "class_head":
        return headed(bench, data, run, splits)
    if arm.kind == "distilled":
        store = FeatureStore.open(bench.features(data, bench.tsm(data, run.seed, 0)))
        return distilled(bench, data, run, splits, _logits(store, file_of(data, "train")))
    if arm.kind == "average":
        return _average(bench, data, run, arm, splits), {}
    none = VITaskArguments(vitask=True, vitask_ep="none")
    if arm.kind == "untuned":
        return _judged(bench, data, bench.model, none, splits), {}
    if arm.kind == "vanilla":
        checkpoint, spent = bench.vanilla(data, run, arm)
        return _judged(bench, data, checkpoint, none, splits), {"training": spent}
    checkpoint, spent = bench.vitask(data, run, arm)
    given: dict[str, Any] = {}
    if arm.exemplar != "learned":
        tsm = bench.tsm(data, run.seed, bench.settings.folds if arm.folds else 0)
        given = {"vitask_tsm": str(tsm), "vitask_features": str(bench.features(data, tsm))}
    vitask = VITaskArguments(vitask=True, vitask_ep=arm.exemplar, **given)
    return _judged(bench, data, checkpoint, vitask, splits), {"training": spent}


def _judged(bench: Bench, data: Path, checkpoint: Path, vitask: VITaskArguments, splits: tuple[str, ...]) -> Scores:
    judge = Judge.of(checkpoint, vitask, batch=bench.settings.judge_batch, bf16=bench.settings.bf16)
    found: Scores = {}
    for split in splits:
        for complete in (True, False):
            scores = judge.scores(file_of(data, split, complete=complete), data / "images")
            found |= {(split, complete, ep): one for ep, one in scores.items()}
    return found


def _tsm_scores(bench: Bench, data: Path, seed: int, splits: tuple[str, ...]) -> Scores:
    """Of the one without folds, which all arms of a set and seed are compared with."""
    store = FeatureStore.open(bench.features(data, bench.tsm(data, seed, 0)))
    return {(split, True, False): _logits(store, file_of(data, split)) for split in splits}


def _logits(store: FeatureStore, file: Path) -> np.ndarray:
    images = [sample["image"] for sample in read_samples(file) if "vitask" in sample]
    return log_likelihoods(torch.stack([store.logits(image) for image in images]).numpy(), multi_label=False)


def _tsm_on_training(bench: Bench, data: Path, seed: int) -> dict[str, Any]:
    """Accuracy on the very images it was trained on, which are those that the VLM sees its features of."""
    store = FeatureStore.open(bench.features(data, bench.tsm(data, seed, 0)))
    file = file_of(data, "train")
    labels, _ = labels_of(file)
    return {"n": len(labels), "accuracy": round(float((_logits(store, file).argmax(1) == labels).mean()), 4)}


def _average(bench: Bench, data: Path, run: Run, arm: Arm, splits: tuple[str, ...]) -> Scores:
    """The mean of the probabilities of a tuned model and of the TSM, as log-probabilities."""
    other = Run(run.data, arm.of, run.seed)
    found = sorted(bench.work.glob(f"runs/{other.name}-*/scores.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise VITaskError(
            f"{run.name} is made of the scores of {other.name}, which has not been run; add --arms {arm.of}"
        )
    saved, tsm = load_file(found[-1]), _tsm_scores(bench, data, run.seed, splits)
    scores = {}
    for split in splits:
        mine = tsm[split, True, False]
        for complete in (True, False):
            own = saved[f"{split}-{int(complete)}-0"]
            own = own - np.logaddexp.reduce(own, axis=1, keepdims=True)
            scores[split, complete, False] = np.logaddexp(own, mine) - np.log(2)
    return scores
