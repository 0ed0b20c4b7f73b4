"""Judging on the val split: the right rows, named in everything that is written, and never in one row with test."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lmms_output import write_file, write_run
from medmnist.evaluator import getACC, getAUC
from PIL import Image
from sklearn.metrics import f1_score

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.report.results import on_split, read_results, split_of

TASKS = Path(__file__).parents[2] / "eval_tasks"


def load(name: str) -> Any:
    from lmms_eval.tasks import TaskManager, get_task_dict

    return get_task_dict([name], TaskManager("ERROR", include_path=str(TASKS), include_defaults=False))[name]


# Documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["drawn", "breastmnist", "chestmnist", "retinamnist"])
@pytest.mark.parametrize("split", ["val", "test", None])
def test_documents_are_the_rows_of_the_split(data, split, tmp_path, monkeypatch):
    write_file(tmp_path, data)
    with np.load(tmp_path / f"{data}.npz") as file:
        arrays = dict(file)
    for name in ("val_images", "val_labels"):
        arrays[name] = np.roll(arrays[name], 1, axis=0)[:9]
    np.savez(tmp_path / f"{data}.npz", **arrays)
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    monkeypatch.delenv("MEDMNIST_SPLIT", raising=False)
    if split:
        monkeypatch.setenv("MEDMNIST_SPLIT", split)
    task = load("vitask_drawn" if data == "drawn" else f"medmnist_{data.removesuffix('mnist')}")
    task.build_all_requests(limit=None, rank=0, world_size=1)
    split = split or "test"
    rows, images, labels = task.eval_docs, arrays[f"{split}_images"], arrays[f"{split}_labels"]
    assert len(rows) == len(labels) == {"val": 9, "test": 24}[split]
    for row, image, label, request in zip(rows, images, labels, task.instances, strict=True):
        expected = np.flatnonzero(label).tolist() if data == "chestmnist" else int(label[0])
        assert (row["vitask"]["label"], row["split"], request.args[5]) == (expected, split, split)
        assert np.array_equal(np.asarray(row["image"]), image)
    assert task.dump_config()["test_split"] == split


@pytest.mark.parametrize(("variable", "task"), [("MEDMNIST_SPLIT", "vitask_drawn"), ("VITASK_SPLIT", "vitask_folder")])
@pytest.mark.parametrize("value", ["train", "Val", "validation"])
def test_another_split_is_one_sentence(variable, task, value, drawn_root, drawn_data, monkeypatch):
    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))
    monkeypatch.setenv("VITASK_FOLDER", str(drawn_data))
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"{variable} is '{value}'; it must be test .the default. or val"):
        load(task)


def test_a_folders_val_split(drawn_data, tmp_path, monkeypatch):
    folder = shutil.copytree(drawn_data, tmp_path / "mine")
    monkeypatch.setenv("VITASK_FOLDER", str(folder))
    monkeypatch.setenv("VITASK_SPLIT", "val")
    rows, expected = load("vitask_folder").eval_docs, json.loads((folder / "val.json").read_text())
    assert [row["vitask"] for row in rows] == [sample["vitask"] for sample in expected]
    assert {(row["file"], row["split"]) for row in rows} == {("mine/val.json", "val")}
    for row, sample in zip(rows, expected, strict=True):
        with Image.open(folder / "images" / sample["image"]) as image:
            assert np.array_equal(np.asarray(row["image"]), np.asarray(image))
    (folder / "val.json").unlink()
    with pytest.raises(SystemExit, match="has no val split; write it with --val X"):
        load("vitask_folder")


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_checkpoint, drawn_root) -> SimpleNamespace:
    """One checkpoint judged on test and then on val, with one response cache; {split: results folder}."""
    from lmms_eval.__main__ import cli_evaluate

    root = tmp_path_factory.mktemp("judged")
    words = ["--model", "vitask_llava", "--model_args", f"pretrained={tiny_checkpoint}", "--batch_size", "8"]
    words += ["--tasks", "vitask_drawn,vitask_drawn_score", "--include_path", str(TASKS), "--device", "cpu"]
    words += ["--gen_kwargs", "max_new_tokens=4", "--log_samples", "--use_cache", str(root / "cache")]
    for split in ("test", "val"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEDMNIST_ROOT", str(drawn_root))
            patch.setenv("MEDMNIST_SPLIT", split)
            patch.setattr(sys, "argv", ["lmms-eval", *words, "--output_path", str(root / split)])
            cli_evaluate()
    with np.load(drawn_root / "drawn.npz") as file:
        labels = {split: file[f"{split}_labels"] for split in ("test", "val")}
    return SimpleNamespace(root=root, labels=labels)


@pytest.mark.parametrize("split", ["test", "val"])
def test_figures_are_those_of_the_splits_arrays(split, judged):
    """Nothing of the other split: neither its rows nor, from the cache, its answers."""
    results = read_results(judged.root / split)
    labels = judged.labels[split]
    scored = results[on_split("vitask_drawn_score", split)]
    probabilities = np.array([answer.probabilities for answer in scored.answers.values()])
    assert scored.metrics["accuracy"] == pytest.approx(getACC(labels, probabilities, DRAWN.kind))
    assert scored.metrics["auc"] == pytest.approx(getAUC(labels, probabilities, DRAWN.kind))
    guessed = probabilities.argmax(1)
    assert scored.metrics["macro_f1"] == pytest.approx(f1_score(labels[:, 0], guessed, average="macro"))
    assert scored.images == (len(labels), len(labels)) and scored.split == scored.data.split == split
    other = read_results(judged.root / {"test": "val", "val": "test"}[split])
    theirs = next(result for task, result in other.items() if task.endswith("_score"))
    likely = {answer.log_likelihoods for answer in theirs.answers.values()}
    assert likely.isdisjoint(answer.log_likelihoods for answer in scored.answers.values())


def test_results_and_samples_name_the_split(judged):
    for split in ("test", "val"):
        (path,) = (judged.root / split).rglob("*_results.json")
        record = json.loads(path.read_text())
        assert {config["test_split"] for config in record["configs"].values()} == {split}
        lines = [line for each in (judged.root / split).rglob("*.jsonl") for line in each.read_text().splitlines()]
        assert {json.loads(line)["n"]["split"] for line in lines} == {split} and lines


def test_the_harness_own_cache_keys_differ_too(tmp_path, drawn_root, monkeypatch):
    """Those that any model has: its task's configuration names the split."""
    from lmms_eval.caching.response_cache import ResponseCache

    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))
    prints = []
    for split in ("test", "val"):
        monkeypatch.setenv("MEDMNIST_SPLIT", split)
        tasks = {"vitask_drawn": load("vitask_drawn")}
        cache = ResponseCache.create(str(tmp_path / "cache"), model="dummy", model_args="", task_dict=tasks)
        prints.append(cache._task_fingerprints["vitask_drawn"])
    assert prints[0] != prints[1]


# The report ----------------------------------------------------------------------------------------------------------


def report(folder: Path, *runs: str) -> str:
    words = [str(folder / run) for run in runs]
    assert main(["report", *words, "--out", str(folder / "r.html"), "--markdown", "--csv"]) == 0
    return (folder / "r.md").read_text().replace("\\_", "_").replace("\\|", "|")


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """Two runs on test, and the first of them on val in the same folder as on test."""
    write_file(tmp_path, "retinamnist", 15)
    with np.load(tmp_path / "retinamnist.npz") as file:
        arrays = dict(file)
    arrays["val_images"], arrays["val_labels"] = arrays["val_images"][:10] // 2 + 100, arrays["val_labels"][:10][::-1]
    np.savez(tmp_path / "retinamnist.npz", **arrays)
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    for run, seed in (("one", 1), ("two", 2)):
        write_run(tmp_path / run, {"retinamnist": 1.0}, tmp_path, seed=seed)
        write_run(tmp_path / f"{run}-val", {"retinamnist": 1.0}, tmp_path, seed=seed, split="val")
    write_run(tmp_path / "one", {"retinamnist": 1.0}, tmp_path, seed=1, split="val", date="20260102_000000")
    return tmp_path


def test_val_and_test_are_rows_of_their_own(written):
    text = report(written, "one", "two")
    main = text[text.index("## Main results") :]
    heads = re.findall(r"^\| (retina[^|]*) \| [^|]*\d", main[: main.index("\n## ")], re.M)
    assert heads == ["retina", "retina (val)"]
    assert "**On the val split**" in text and "## retina (val)" in text
    # The paper's figures are of test.
    assert len(re.findall(r"^\| retina \|.*\*0\.472 / 0\.424\*", text, re.M)) == 1
    assert not re.search(r"^\| retina \(val\) \|.*\*0\.", text, re.M)
    overview = text[text.index("## Runs") : text.index("## Main")]
    assert "| 1 | test, val | all |" in overview and "| 1 | test | all |" in overview
    rows = csv.DictReader((written / "r.csv").read_text().splitlines())
    counts = {(row["run"], row["task"], row["split"]): row["value"] for row in rows if row["metric"] == "n"}
    variants = ("medmnist_retina", "medmnist_retina_incomplete", "medmnist_retina_score")
    expected = {("one", "test"): "15", ("one", "val"): "10", ("two", "test"): "15"}
    assert counts == {(run, task, split): n for (run, split), n in expected.items() for task in variants}


def test_choosing_on_test_is_said_where_runs_are_compared_on_test(written):
    sentence = "choosing among them by these figures is choosing on the test split"
    for runs, said in {("one", "two"): 1, ("two",): 0, ("one-val", "two-val"): 0, ("two", "one-val"): 0}.items():
        assert report(written, *runs).count(sentence) == said, runs
        assert (written / "r.html").read_text().count(sentence) == said, runs


def test_pictures_are_of_the_split(written):
    from vitask_plugin.report.gallery import _images

    with np.load(written / "retinamnist.npz") as file:
        for split, folder in (("test", "two"), ("val", "two-val")):
            result = read_results(written / folder)[on_split("medmnist_retina", split)]
            found = _images(result.data, {row: answer.label for row, answer in result.answers.items()})
            for row, image in found.items():
                assert np.array_equal(np.asarray(image), file[f"{split}_images"][row])
    report(written, "two-val")
    page = (written / "r.html").read_text()
    assert "val image " in page and "test image " not in page


def test_results_of_an_earlier_version_are_of_test(written):
    (path,) = (written / "two").rglob("*_results.json")
    record = json.loads(path.read_text())
    del record["configs"]
    path.write_text(json.dumps(record))
    for samples in path.parent.glob("*.jsonl"):
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            del line["n"]["split"]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {result.split for result in read_results(written / "two").values()} == {"test"}
    assert "medmnist_retina" in read_results(written / "two")


def test_without_samples_the_results_file_says_it(written):
    for samples in (written / "two-val").rglob("*.jsonl"):
        samples.unlink()
    assert "medmnist_retina@val_score" in read_results(written / "two-val")


@pytest.mark.parametrize("task", ["medmnist_retina", "medmnist_retina_score", "vitask_my_set_incomplete", "medmnist"])
def test_names(task):
    assert on_split(task, "test") == task and split_of(task) == (task, "test")
    assert on_split(task, "val") != task and split_of(on_split(task, "val")) == (task, "val")
