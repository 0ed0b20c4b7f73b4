"""`vitask tsm evaluate`: the TSM alone, in figures that agree with the network's and lmms-eval's, and in its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lmms_output import _template, write_file, write_own_folder, write_run
from PIL import Image
from trained import make_tsm

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN, label_set
from vitask_plugin.evaluation.tsm import log_likelihoods
from vitask_plugin.inference import metrics
from vitask_plugin.report import read_results
from vitask_plugin.report.runs import read_runs
from vitask_plugin.tsm.backbone import build_timm, timm_options
from vitask_plugin.tsm.model import TSM


@pytest.fixture(scope="module")
def tsm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the drawn data, untrained, its head far enough from zero that it prefers different classes. Read only."""
    folder = tmp_path_factory.mktemp("model") / "tsm"
    made = make_tsm(folder)
    with torch.no_grad():
        made._network.head.weight.mul_(30)
    made.save(folder)
    return folder


def words(tsm: Path, data: Path, out: Path, *more: str, folder: Path | None = None) -> list[str]:
    images = ["--image-folder", str(folder or data.parent / "images")]
    return ["tsm", "evaluate", "--tsm", str(tsm), "--data", str(data), *images, "--out", str(out), *more]


@pytest.fixture(scope="module")
def judged(tsm: Path, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn test split, judged in batches that do not divide it. Read only."""
    out = tmp_path_factory.mktemp("judged") / "tsm-alone"
    assert main(words(tsm, drawn_data / "test.json", out, "--batch-size", "5", "--device", "cpu")) == 0
    return out


def raw(output: Path, task: str) -> list[dict]:
    (path,) = output.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_figures_are_those_of_the_network(judged: Path, tsm: Path, drawn_data: Path) -> None:
    """One image after the other, by the network's own probabilities."""
    network, samples = TSM.load(tsm), json.loads((drawn_data / "test.json").read_text())
    targets = [sample["vitask"]["label"] for sample in samples]
    outcomes, probabilities = [], []
    for sample, target in zip(samples, targets, strict=True):
        with Image.open(drawn_data / "images" / sample["image"]) as image, torch.no_grad():
            row = network.probabilities(network(network.preprocess(image)[None]).logits, DRAWN.task)[0].tolist()
        outcomes.append(metrics.Outcome(target, row.index(max(row))))
        probabilities.append(metrics.Probabilities(target, row, DRAWN.kind))
    found = read_results(judged)
    answered, scored = found[DRAWN.task], found[f"{DRAWN.task}_score"]
    assert 0 < metrics.accuracy(outcomes) < 1 and len({outcome.prediction for outcome in outcomes}) > 1
    for result in (answered, scored):
        assert result.metrics["accuracy"] == metrics.accuracy(outcomes)
        assert result.metrics["macro_f1"] == metrics.macro_f1(outcomes)
        assert result.metrics["n"] == len(targets) == 16
    assert scored.metrics["auc"] == pytest.approx(metrics.auc(probabilities), abs=1e-9)
    assert answered.metrics["unmapped"] == 0


def test_a_limit_takes_the_first_images_of_each_set(several: Path, tmp_path: Path) -> None:
    """As lmms-eval's own does, with the answers of the whole run."""
    out = tmp_path / "few"
    assert main(words(several / "tsm", several / "val.json", out, "--limit", "2", folder=several)) == 0
    whole, few = read_results(several / "out"), read_results(out)
    assert few.keys() == whole.keys() and len(few) == 6
    for task, result in few.items():
        assert result.metrics["n"] == 2 == len(result.answers) < len(whole[task].answers)
        assert set(result.answers) == set(sorted(whole[task].answers)[-2:])  # the file has them in reverse
        for index, answer in result.answers.items():
            assert answer.prediction == whole[task].answers[index].prediction
        assert result.images == (2, len(whole[task].answers)) and whole[task].images[0] == whole[task].images[1]
    (file,) = out.rglob("*_results.json")
    assert json.loads(file.read_text())["config"]["limit"] == 2


def many_label_tsm(folder: Path, *names: str) -> TSM:
    """Untrained, of several of our tasks at once."""
    torch.manual_seed(2)
    known = [label_set(name) for name in names]
    tasks = {one.task: {"choices": list(one.choices), "multi_label": one.multi_label} for one in known}
    width = sum(len(one.choices) for one in known)
    options = timm_options("test_vit", width, 32)
    record = {"source": {"timm": "test_vit", "options": options}, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    network = build_timm("test_vit", width, options)
    with torch.no_grad():
        network.head.weight.mul_(30)
    made = TSM(network, record | {"tasks": tasks})
    made.save(folder)
    return made


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tsm/, one.json with three tasks of different kinds, their images and MedMNIST's files. Read only."""
    root = tmp_path_factory.mktemp("several")
    names = ("chestmnist", "retinamnist", "breastmnist")
    many_label_tsm(root / "tsm", *names)
    samples = []
    for name in names:
        write_file(root / "medmnist", name, 60)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEDMNIST_ROOT", str(root / "medmnist"))
            patch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
            write = ["data", "medmnist", "--task", name, "--out", str(root / name), "--allow-duplicates"]
            assert main(write) == 0
        found = json.loads((root / name / "val.json").read_text())
        samples += [sample | {"image": f"{name}/images/{sample['image']}"} for sample in found[::-1]]
    (root / "val.json").write_text(json.dumps(samples))
    assert main(words(root / "tsm", root / "val.json", root / "out", folder=root)) == 0
    return root


def test_each_metric_is_aggregated_as_the_tasks_say(several: Path) -> None:
    from vitask_plugin.evaluation.tsm import judge
    from vitask_plugin.judge_tsm import _defined, lines_of, metrics_of

    _, aggregations = _template()
    seen = set()
    for one in judge(several / "tsm", several / "val.json", several):
        for lines in lines_of(one):
            figures = metrics_of(lines)
            assert set(figures) == {name for name in aggregations if name in lines[0]}
            assert figures == {name: _defined(aggregations[name]([line[name] for line in lines])) for name in figures}
            seen |= set(figures)
    assert seen == set(aggregations)


def test_several_tasks_in_one_file_are_a_row_each(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_results(several / "out")
    tasks = ("medmnist_chest", "medmnist_retina", "medmnist_breast")
    assert set(found) == {f"{task}@val{ending}" for task in tasks for ending in ("", "_score")}
    assert all(result.metrics["n"] == 60 for result in found.values())
    tsm = TSM.load(several / "tsm")
    for task in tasks:
        # A file that was put together in another order still names the rows of MedMNIST's file.
        result = found[f"{task}@val_score"]
        data = several / result.data.file.removesuffix(".npz")
        assert (several / "medmnist" / result.data.file).is_file() and result.data.split == "val"
        for index, sample in enumerate(json.loads((data / "val.json").read_text())):
            with Image.open(data / "images" / sample["image"]) as image:
                logits = tsm(tsm.preprocess(image)[None]).logits
            assert result.answers[index].label == sample["vitask"]["label"]
            probabilities = tsm.probabilities(logits, task)[0].tolist()
            assert result.answers[index].probabilities == pytest.approx(probabilities, abs=1e-5)
            words = found[f"{task}@val"].answers[index]
            assert words.prediction == words.strict == result.answers[index].prediction
    assert main(words_of(several, "shown")) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in (*tasks, "quadratic", "subset", "its classes", "0.48\u20130.54"))
    assert shown.count("label (row)") == 2  # not of several labels


def words_of(several: Path, out: str) -> list[str]:
    return words(several / "tsm", several / "val.json", several / out, folder=several)


def test_log_likelihoods_are_those_of_the_answers() -> None:
    logits = np.array([[0.3, -1.2, 2.0], [-3.0, 0.0, 900.0]], dtype=np.float32)
    alone = log_likelihoods(logits, multi_label=False)
    assert np.exp(alone).sum(axis=1) == pytest.approx([1, 1]) and np.isfinite(alone).all()
    likely = 1 / (1 + np.exp(-logits[0].astype(float)))
    together = np.exp(log_likelihoods(logits, multi_label=True)[0])
    assert together[-1] == pytest.approx(np.prod(1 - likely))
    assert together[1] == pytest.approx(likely[1] * (1 - likely[0]) * (1 - likely[2]))


def test_the_report_has_its_row_beside_a_vlm(judged: Path, drawn_root: Path, tmp_path, monkeypatch) -> None:
    """Which the report pairs with it image by image: file, split, rows, labels and choices have to be the same."""
    write_run(tmp_path / "vlm", {"drawn": 1.0}, drawn_root, variants=("", "score"))
    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))
    alone, vlm = read_runs([judged, tmp_path / "vlm"])
    assert (alone.name, alone.ep, alone.training) == ("tsm-alone", False, None)
    for task in (DRAWN.task, f"{DRAWN.task}_score"):
        one, other = alone.tasks[task], vlm.tasks[task]
        assert one.data == other.data and one.answers.keys() == other.answers.keys()
        assert {i: a.label for i, a in one.answers.items()} == {i: a.label for i, a in other.answers.items()}
    page = tmp_path / "report.html"
    assert main(["report", str(judged), str(tmp_path / "vlm"), "--out", str(page)]) == 0
    assert "tsm-alone" in page.read_text()


def test_own_images_go_by_the_task_of_ones_own_folder(tsm: Path, drawn_root: Path, tmp_path: Path) -> None:
    """An external set, whose labels stand in another order than the TSM's."""
    write_own_folder(tmp_path / "lab", "drawn", drawn_root)
    data = json.loads((tmp_path / "lab" / "test.json").read_text())
    order = [2, 0, 3, 1]
    choices = [DRAWN.choices[index].upper() for index in order]
    for sample in data:
        sample["vitask"] |= {"task": "lab", "choices": choices, "label": order.index(sample["vitask"]["label"])}
    turned = shutil.copytree(tmp_path / "lab", tmp_path / "turned")
    (turned / "test.json").write_text(json.dumps(data))
    labels = json.loads((turned / "labels.json").read_text()) | {"task": "lab", "choices": choices}
    (turned / "labels.json").write_text(json.dumps(labels))
    for folder in ("lab", "turned"):
        assert main(words(tsm, tmp_path / folder / "test.json", tmp_path / "out" / folder)) == 0
    lab, other = (read_results(tmp_path / "out" / name) for name in ("lab", "turned"))
    assert (set(lab), set(other)) == (
        {"vitask_lab", "vitask_lab_score"},
        {"vitask_turned", "vitask_turned_score"},
    )
    one, two = lab["vitask_lab_score"], other["vitask_turned_score"]
    assert one.metrics["accuracy"] == two.metrics["accuracy"] > 0 and one.metrics["auc"] == two.metrics["auc"]
    for index, answer in one.answers.items():
        assert two.answers[index].probabilities == pytest.approx([answer.probabilities[i] for i in order])
    (file,) = (tmp_path / "out" / "lab").rglob("*_samples_vitask_folder.jsonl")
    assert json.loads(file.read_text().splitlines()[0])["n"]["file"] == "lab/test.json"
    write_run(tmp_path / "vlm", {"drawn": 1.0}, drawn_root, own=tmp_path / "lab", variants=("", "score"))
    assert len(read_runs([tmp_path / "out" / "lab", tmp_path / "vlm"])) == 2  # on the same data


def test_two_own_sets_in_one_file(tsm: Path, drawn_data: Path, tmp_path: Path) -> None:
    """Both are `vitask_folder` to lmms-eval, and neither may hide the other."""
    samples = json.loads((drawn_data / "test.json").read_text())
    for number, sample in enumerate(samples):
        sample["vitask"]["task"] = ("north", "south")[number % 2]
    (tmp_path / "both.json").write_text(json.dumps(samples))
    images = drawn_data / "images"
    assert main(words(tsm, tmp_path / "both.json", tmp_path / "out", "--split", "val", folder=images)) == 0
    (run,) = read_runs([tmp_path / "out"])
    assert set(run.tasks) == {f"vitask_{name}@val{end}" for name in ("north", "south") for end in ("", "_score")}


def test_sets_that_were_merged_are_rows_of_their_own(several: Path, tmp_path: Path) -> None:
    """In the layout of a folder of several sets: two hospitals with the same task are two of them."""
    samples, sets = [], {}
    for name, source in {"breast": "breastmnist", "north": "retinamnist", "south": "retinamnist"}.items():
        sets[name] = json.loads((several / source / "labels.json").read_text())
        for sample in json.loads((several / source / "test.json").read_text()):
            image = f"{source}/images/{sample['image']}"
            samples.append(sample | {"id": f"{name}/{sample['id']}", "image": image})
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "labels.json").write_text(json.dumps({"sets": sets}))
    (tmp_path / "all" / "test.json").write_text(json.dumps(samples[::-1]))
    assert main(words(several / "tsm", tmp_path / "all" / "test.json", tmp_path / "out", folder=several)) == 0
    found = read_results(tmp_path / "out")
    names = {"medmnist_breast": "breast", "vitask_north": "north", "vitask_south": "south"}
    assert set(found) == {f"{task}{ending}" for task in names for ending in ("", "_score")}
    for task, name in names.items():
        result = found[task]
        assert result.data.file == f"all/{name}/test.json" and result.data.kind == sets[name]["type"]
        own = [sample for sample in samples if sample["id"].startswith(f"{name}/")]
        assert [result.answers[row].label for row in range(60)] == [sample["vitask"]["label"] for sample in own]


SEVERAL = {"label": "as a list"}


@pytest.mark.parametrize(
    ("name", "change", "found", "expected"),
    [
        ("data.json", {}, "does not say by its name which split it holds", "give --split test or val"),
        ("train.json", {}, "'train.json'", "give --split test or val"),
        ("test.json", {"choices": ["a", "b", "c", "d"]}, "with the labels a, b, c, d", "horizontal stripes"),
        ("test.json", SEVERAL, "several to an image", "judge the TSM that was trained on them"),
    ],
)
def test_refused(
    name: str, change: dict, found: str, expected: str, tsm: Path, drawn_data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples = json.loads((drawn_data / "test.json").read_text())
    for sample in samples:
        sample["vitask"] |= change if change is not SEVERAL else {"label": [sample["vitask"]["label"]]}
    Path(name).write_text(json.dumps(samples))
    assert main(words(tsm, Path(name), tmp_path / "out", folder=drawn_data / "images")) == 1
    error = capsys.readouterr().err
    assert found in error and expected in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
