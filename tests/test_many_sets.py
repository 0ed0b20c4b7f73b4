"""Twelve drawn sets of every kind, and general data: one TSM, one run on two processes, twelve rows and the mean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from curves import history
from mixture import flags, turns
from ranks import launch
from twelve import SETS, training_images

from vitask_plugin.cli import main
from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.drawn import task_texts
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.evaluation.intervals import interval_of_mean
from vitask_plugin.llava.tiny import make_tiny_llava
from vitask_plugin.record.checkpoint import read_record
from vitask_plugin.tsm.features import FeatureStore
from vitask_plugin.tsm.model import TSM

TASKS = Path(__file__).parents[1] / "eval_tasks"


@pytest.fixture(scope="module")
def merged(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, and general data: images of another folder, and text alone."""
    root = tmp_path_factory.mktemp("merged")
    asked = turns("<image>\nWhat is this?", "Noise.")
    samples = [{"id": str(n), "image": f"train/{n:05d}.png", "conversations": asked} for n in range(4)]
    samples += [{"id": f"text-{n}", "conversations": turns("Hello.", "Good morning.")} for n in range(4)]
    (root / "mix.json").write_text(json.dumps(samples))
    also = ["--also", str(root / "mix.json"), "--also-images", str(twelve / "bloodmnist" / "images")]
    folders = [str(twelve / known.flag) for known in SETS]
    assert main(["data", "merge", *folders, *also, "--out", str(root / "all")]) == 0
    return root / "all"


@pytest.fixture(scope="module")
def tsm(merged: Path) -> Path:
    """One head for all of them, two epochs on the CPU."""
    out = merged.parent / "tsm"
    data = ["--data", str(merged / "train.json"), "--val", str(merged / "val.json")]
    words = ["--image-folder", str(merged / "images"), "--arch", "test_vit", "--image-size", "32", "--epochs", "2"]
    assert main(["tsm", "train", *data, *words, "--device", "cpu", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def features(merged: Path, tsm: Path) -> Path:
    out = merged.parent / "features"
    data = ["--data", str(merged / "train.json"), "--image-folder", str(merged / "images")]
    assert main(["tsm", "extract", "--tsm", str(tsm), *data, "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_one_tsm_knows_all_tasks(merged, tsm, features):
    record = TSM.load(tsm).record
    assert {task: tuple(entry["choices"]) for task, entry in record["tasks"].items()} == {
        known.task: known.choices for known in SETS
    }
    # The organ sets share their labels, and with them their columns, as in the paper.
    assert max(e["first_column"] + len(e["choices"]) for e in record["tasks"].values()) == 70
    metrics = json.loads((tsm / "metrics.json").read_text())
    assert set(record["images"]) == {known.task for known in SETS} and len(metrics["history"]) == 2
    store = FeatureStore.open(features)
    task_images = {s["image"] for s in read_samples(merged / "train.json") if "vitask" in s}
    assert len(store) == len(task_images) == 519 and all(image in store for image in task_images)


@pytest.fixture(scope="module")
def trained(merged: Path, tsm: Path, features: Path, zero) -> Path:
    """Stage 1, then stage 2, each 3 steps of 16 samples on two processes under ZeRO-2."""
    texts = [text for known in SETS for text in task_texts(known)]
    tiny = make_tiny_llava(merged.parent / "tiny-llava", texts=texts, seed=0, hidden_size=64, layers=2)
    outputs = []
    for stage in (1, 2):
        output = merged.parent / f"llava-stage{stage}"
        start = ["--model_name_or_path", str(outputs[0]), "--vitask_connector_path", str(outputs[0])] if outputs else []
        more = [
            *("--deepspeed", zero("zero2"), "--per_device_train_batch_size", "8", "--max_steps", "3"),
            *("--vitask_tsm", str(tsm), "--vitask_stage", str(stage), *start),
            *("--vitask_class_balance", "0.5", "--vitask_set_temperature", "2", "--seed", "1"),
        ]
        ended = launch(2, flags(tiny, merged, features, output, *more), merged.parent / f"logs-{stage}")
        assert ended.statuses == [0, 0], ended.text
        outputs.append(output)
    return outputs[-1]


def test_both_stages_train_on_everything(trained, merged):
    stage_1, stage_2 = (history(merged.parent / f"llava-stage{stage}") for stage in (1, 2))
    assert len(stage_1) == len(stage_2) == 3
    assert all({"loss_vanilla", "loss_ep", "loss_rda"} <= entry.keys() for entry in stage_1)
    assert all({"loss_vanilla", "loss_crt"} <= entry.keys() for entry in stage_2)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in stage_1 + stage_2)
    log = (merged.parent / "logs-1" / "rank-0.log").read_text()
    said = {line.split(": ")[1] for line in log.splitlines() if line.startswith("vitask: an epoch draws ")}
    assert len(said) == 12
    # By the roots of their sizes: tissue has a third of all images, retina a hundredth.
    roots = {known.task: training_images(known) ** 0.5 for known in SETS}
    for known in SETS:
        draws = 519 * roots[known.task] / sum(roots.values())
        words = f"{round(draws) if draws >= 10 else round(draws, 1)} samples for the {training_images(known)}"
        assert f"an epoch draws {words} of {known.task}" in said
    assert "an epoch holds data without a task as it is: 8 samples" in log
    assert set(read_record(trained)["tasks"]) == {known.task for known in SETS}


@pytest.fixture(scope="module")
def judged(trained: Path, tsm: Path, merged: Path) -> Path:
    """One command for all of them, with exemplars."""
    output = merged.parent / "results"
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "vitask_llava", "--include_path", TASKS, "--device", "cpu"),
        *("--model_args", f"pretrained={trained},tsm={tsm}", "--tasks", "vitask_sets,vitask_sets_score"),
        *("--gen_kwargs", "max_new_tokens=8", "--batch_size", "32", "--output_path", output, "--log_samples"),
    ]
    environment = {**os.environ, "VITASK_FOLDER": str(merged), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and list(output.rglob("*_results.json")), done.stdout + done.stderr
    assert "exemplars: 16 of 16 documents of 'medmnist_chest'" in done.stdout + done.stderr
    return output


@pytest.mark.parametrize("ending", ["", "_score"])
def test_twelve_rows_and_the_mean(ending, judged, merged):
    (path,) = judged.rglob("*_results.json")
    record = json.loads(path.read_text())
    figures, group = record["results"], f"vitask_sets{ending}"
    rows = {task for task in figures if not task.startswith("vitask_sets") and task.endswith("_score") == bool(ending)}
    assert rows == {f"{known.task}{ending}" for known in SETS}
    for known in SETS:
        expected = read_samples(merged / known.flag / "test.json")
        (log,) = judged.rglob(f"*_samples_{known.task}{ending}.jsonl")
        logged = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda line: line["doc_id"])
        assert [line["n"]["label"] for line in logged] == [sample["vitask"]["label"] for sample in expected]
        assert {(line["n"]["file"], line["n"]["kind"]) for line in logged} == {
            (f"all/{known.flag}/test.json", known.kind)
        }
        own = figures[f"{known.task}{ending}"]
        assert own["n,none"] == len(expected) and ("quadratic_kappa,none" in own) == (known.flag == "retinamnist")
    for figure in ["accuracy", "macro_f1", "subset_accuracy"] + ["auc"] * bool(ending):
        values = [figures[row][f"{figure},none"] for row in rows]
        assert figures[group][f"{figure},none"] == pytest.approx(sum(values) / 12), figure
        ends = [figures[f"{known.task}{ending}"][f"{figure}_ci95,none"] for known in SETS]
        assert figures[group][f"{figure}_ci95,none"] == pytest.approx(interval_of_mean(ends))
    assert any(known.kind == MULTI_LABEL for known in SETS)


def test_the_report_names_the_sets_and_the_mean(judged, merged, monkeypatch):
    monkeypatch.setenv("VITASK_FOLDER", str(merged))
    out = merged.parent / "report.html"
    assert main(["report", str(judged), "--out", str(out), "--markdown"]) == 0
    text = out.with_suffix(".md").read_text()
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert all(known.task.removeprefix("medmnist_") in lines for known in SETS)
    assert "mean of 12 sets" in lines and {r"vitask\_sets", r"vitask\_sets\_score"} <= set(lines)
    page = out.read_text()
    assert "they are not shown" not in page and page.count('src="data:image/') > 12  # wrongly answered images
