"""The study: its plan, what is left of it after a stop, and one small study by its command, from archive to rows."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.tiny import make_tiny

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CLASSES = ("benign", "malignant", "normal")
SIZES = {"train": 24, "val": 10, "test": 12}
SMALL = ["steps=2", "tsm_arch=resnet10t", "tsm_image_size=32", "tsm_epochs=1", "folds=2", "bf16=False"]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def archive(path: Path) -> Path:
    """Drawn pictures as one of the study's archives."""
    drawn = draw_dataset(path.with_suffix(".npz"), seed=0, sizes={name: 2 * count for name, count in SIZES.items()})
    lines = ["image,label,group,split"]
    with np.load(drawn) as arrays, zipfile.ZipFile(path, "w") as opened:
        for split, count in SIZES.items():
            labels = arrays[f"{split}_labels"].ravel()
            chosen = [index for index in range(len(labels)) if labels[index] < len(CLASSES)][:count]
            for index in chosen:
                name = f"images/{split}{index}.png"
                file = path.with_name("picture.png")
                Image.fromarray(arrays[f"{split}_images"][index]).save(file)
                opened.write(file, name)
                lines.append(f"{name},{CLASSES[labels[index]]},{split}{index},{split}")
        opened.writestr("labels.csv", "\n".join(lines) + "\n")
    drawn.unlink()
    return path


def study(folder: Path, *more: str) -> str:
    words = ["--data-root", folder, "--model", folder / "tiny", "--work", folder / "work", "--seeds", "1"]
    words += ["--rows", folder / "rows.jsonl", "--sets", "busi", *more, "--set", *SMALL]
    command = [sys.executable, str(BENCHMARKS / "study.py"), *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    logs = "".join(path.read_text() for path in (folder / "work/logs").glob("*.log")) if ended.returncode else ""
    assert ended.returncode == 0, ended.stdout + ended.stderr + logs
    return ended.stdout


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_small_study_leaves_its_rows_and_goes_on(tmp_path: Path) -> None:
    archive(tmp_path / "busi.zip")
    texts = ["Analyze the given breast ultrasound image. The possible diagnoses are:", *CLASSES]
    make_tiny(tmp_path / "tiny", family="llava", texts=texts, seed=0)
    arms = "tsm,untuned,linear_probe,vanilla,average,class_head,soft_label_distillation"
    study(tmp_path, "--arms", arms)
    rows = rows_of(tmp_path / "rows.jsonl")
    counts = {arm: sum(row["arm"] == arm for row in rows) for arm in arms.split(",")}
    once = {"tsm": 1, "linear_probe": 1}  # what reads no instruction
    assert counts == {arm: once.get(arm, 2) for arm in counts}
    for row in rows:
        assert {
            "data",
            "arm",
            "seed",
            "ep",
            "instructions",
            "val",
            "test",
            "config",
            "digest",
            "versions",
        } <= row.keys()
        for split in ("val", "test"):
            found = row[split]
            right = [a == b for a, b in zip(found["answers"], found["labels"], strict=True)]
            assert len(right) == found["n"] == SIZES[split]
            assert found["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    # What is there is not run again; what is new is, and shares the TSM.
    tsm = next((tmp_path / "work/tsm").iterdir())
    before = tsm.stat().st_mtime_ns
    said = study(tmp_path, "--arms", "tsm,vanilla,vitask")
    assert "3 runs, 1 of them without rows" in said
    more = rows_of(tmp_path / "rows.jsonl")[len(rows) :]
    assert {(row["arm"], row["ep"], row["instructions"]) for row in more} == {
        ("vitask", ep, words) for ep in (False, True) for words in ("complete", "incomplete")
    }
    assert tsm.stat().st_mtime_ns == before
    apart = more[0]["test"]["where_they_differ"]
    tsm_answers = next(row for row in rows if row["arm"] == "tsm")["test"]["answers"]
    differing = sum(a != b for a, b in zip(more[0]["test"]["answers"], tsm_answers, strict=True))
    assert sum(apart.values()) == differing


def test_a_cut_study_is_balanced() -> None:
    from study_plan import ARMS, FEW_SETS, MAIN, SETS, plan

    sets = [name for name in SETS if name != "breast"]
    runs = plan(sets, list(ARMS), 5)
    assert len({run.name for run in runs}) == len(runs)
    first = len(MAIN) * len(sets)
    assert {(run.data, run.arm) for run in runs[:first]} == {(data, arm) for data in sets for arm in MAIN}
    assert all(run.seed == 0 for run in runs[:first])
    seeds = [run.seed for run in runs]
    assert seeds == sorted(seeds)
    for data in sets:
        assert sum((run.data, run.arm) == (data, "vitask") for run in runs) == 5
    others = [run for run in runs if run.arm == "rda"]
    assert {run.data for run in others} == {*FEW_SETS} and {run.seed for run in others} == {0, 1, 2}


def test_another_setting_is_another_run() -> None:
    from study_plan import Run, Settings, config_of, digest, undone

    run, sources = Run("busi", "vitask", 0), {"model": "a", "tower": "t", "data": "b"}
    key = digest(config_of(run, Settings(), sources))
    row = {"data": "busi", "arm": "vitask", "seed": 0, "digest": key}
    assert list(undone([run], {run.name: key}, [row])) == []
    for changed in (
        config_of(run, Settings(steps=7), sources),
        config_of(run, Settings(), {**sources, "model": "c"}),
        config_of(Run("busi", "rda", 0), Settings(), sources),
    ):
        assert list(undone([run], {run.name: digest(changed)}, [row])) == [run]
    # A TSM is the same whatever is tuned.
    tsm = Run("busi", "tsm", 0)
    assert config_of(tsm, Settings(), sources) == config_of(tsm, Settings(steps=7), {**sources, "model": "c"})
    assert config_of(tsm, Settings(), sources) != config_of(tsm, Settings(tsm_epochs=7), sources)
    probe = Run("busi", "linear_probe", 0)
    assert config_of(probe, Settings(), sources) == config_of(probe, Settings(steps=7), {**sources, "model": "c"})
    assert config_of(probe, Settings(), sources) != config_of(probe, Settings(), {**sources, "tower": "c"})


def test_settings_by_name() -> None:
    from study import settings_of

    found = settings_of(["steps=7", "bf16=False", "learning_rate=2e-4"])
    assert (found.steps, found.bf16, found.learning_rate) == (7, False, 2e-4)
    with pytest.raises(VITaskError, match="no setting 'stepz'"):
        settings_of(["stepz=7"])
    with pytest.raises(VITaskError, match="steps is a int"):
        settings_of(["steps=many"])


def test_who_is_right_where_the_answers_differ() -> None:
    from study_judging import against

    labels = np.array([0, 1, 2, 1, 0])
    found = against(np.array([0, 1, 2, 0, 1]), np.array([0, 2, 1, 1, 2]), labels)
    assert found == {"agrees_with_tsm": 0.2, "where_they_differ": {"model_right": 2, "tsm_right": 1, "neither": 1}}


def test_the_class_head_reads_the_last_token_of_each_row(drawn_data: Path, tiny_hf: Any) -> None:
    """Not a pad: rows of other lengths beside it change nothing."""
    from study_head import ClassBatches, Headed, Questions
    from study_training import TrainingArguments

    from vitask_plugin.data.instructions import read_samples
    from vitask_plugin.hf import loading
    from vitask_plugin.training.batches import pad_of

    tiny = tiny_hf("llava")
    samples = read_samples(drawn_data / "val.json")[:3]
    samples[1]["conversations"][0]["value"] += " Answer in a word or two, and say nothing else."
    args = TrainingArguments(output_dir="unused", lora_enable=True, lora_r=4, use_cpu=True)
    headed = Headed(loading.add_lora(tiny.model(), args, projector=True), classes=4).eval()
    torch.nn.init.normal_(headed.head.weight)
    rows = Questions(samples, str(drawn_data / "images"), tiny.template, 512)
    batches = ClassBatches(pad_of(tiny.template.tokenizer))
    assert len({len(row["input_ids"]) for row in rows}) == 2
    assert tiny.template.tokenizer.decode(rows[0]["input_ids"]).endswith("ASSISTANT:")
    with torch.no_grad():
        together = headed(**batches([rows[number] for number in range(3)]))
        alone = torch.cat([headed(**batches([rows[number]]))["logits"] for number in range(3)])
    torch.testing.assert_close(together["logits"], alone, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([sample["vitask"]["label"] for sample in samples])
    assert together["loss"] == torch.nn.functional.cross_entropy(together["logits"], labels)


def test_soft_labels_are_of_the_scores_that_judge(drawn_data: Path, tiny_hf: Any) -> None:
    from study_distil import NONE, Taught
    from study_judging import Judge, SplitSamples
    from study_training import TrainingArguments

    from vitask_plugin.hf import loading

    tiny = tiny_hf("llava")
    args = TrainingArguments(output_dir="unused", lora_enable=True, lora_r=4, use_cpu=True)
    adapted = loading.add_lora(tiny.model(), args, projector=True).eval()
    samples = SplitSamples(drawn_data / "val.json", drawn_data / "images", tiny.template, NONE)
    soft = torch.randn(len(samples), 4).log_softmax(-1)
    taught = Taught(adapted, tiny.template, samples, soft)
    scores = taught.scores(range(len(samples)))
    judged = Judge(adapted, tiny.template, NONE, batch=3, bf16=False).scores(
        drawn_data / "val.json", drawn_data / "images"
    )
    np.testing.assert_allclose(scores.detach().numpy(), judged[False], atol=1e-4)
    found = taught(torch.tensor([1, 4]))["loss"]
    labels = [samples.list_data_dict[number]["vitask"]["label"] for number in (1, 4)]
    expected = []
    for number, label in zip((1, 4), labels, strict=True):
        own = torch.from_numpy(judged[False][number]).log_softmax(-1)
        target = soft[number].double().exp()
        expected.append(-own[label] + (target * (target.log() - own)).sum())
    assert float(found.detach()) == pytest.approx(float(sum(expected) / 2), abs=1e-3)
    found.backward()
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in adapted.parameters())
