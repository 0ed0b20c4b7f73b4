"""`vitask calibrate` on a checkpoint, and lmms-eval's `_score` task with `calibrated=True` on the same checkpoint."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluating import TASKS, load_tasks, open_model
from PIL import Image
from scipy.special import softmax
from trained import Trained

from vitask_plugin.cli import main
from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.evaluation.calibrated import Calibrations
from vitask_plugin.files import sha256_file
from vitask_plugin.inference import metrics
from vitask_plugin.inference.calibration import Scored, chosen_fit
from vitask_plugin.inference.metrics import Probabilities
from vitask_plugin.inference.thresholds import threshold
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import read_calibration
from vitask_plugin.report.results import read_results
from vitask_plugin.tsm.model import TSM

SCORES = "vitask_drawn_score"
ASKED = "falling stripes"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """40 validation images: `root` is $MEDMNIST_ROOT, `data` what `vitask data medmnist` writes of it."""
    root = tmp_path_factory.mktemp("calibrated")
    draw_dataset(root / "drawn.npz", seed=3, sizes={"train": 8, "val": 40, "test": 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        assert main(["data", "medmnist", "--task", "drawn", "--out", str(root / "data")]) == 0
    return SimpleNamespace(root=root, data=root / "data")


@pytest.fixture(scope="module")
def calibrated(trained: Trained, drawn: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The checkpoint after the command: its folder and what `calibration.json` says."""
    folder = shutil.copytree(trained.checkpoint, tmp_path_factory.mktemp("checkpoint") / "llava-calibrated")
    assert main(words(folder, drawn.data / "val.json", "--tsm", trained.tsm, *WISHES)) == 0
    return SimpleNamespace(
        folder=folder, tsm=trained.tsm, written=json.loads((folder / "calibration.json").read_text())
    )


WISHES = ("--sensitivity", ".9", "--positive", ASKED, "--error-rate", ".5")


def words(folder: Path, data: Path, *more: Any) -> list[str]:
    return ["calibrate", str(folder), "--data", str(data), "--device", "cpu", *map(str, more)]


def scored(model: Any, root: Path, split: str) -> list[dict[str, Any]]:
    """What the harness' own task records of each image of a split: label, log-likelihoods, probabilities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_SPLIT", split)
        task = load_tasks(model, root, SCORES)[SCORES]
    answers: dict[int, list[Any]] = {}
    for instance, answer in zip(task.instances, model.loglikelihood(task.instances), strict=True):
        answers.setdefault(instance.args[3], []).append(answer)
    documents = list(task.dataset[task.config.test_split])
    return [task.process_results(documents[number], answers[number])["n"] for number in sorted(answers)]


def column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in records])


def block_of(calibrated: SimpleNamespace, ep: bool) -> dict[str, Any]:
    return next(block for block in calibrated.written["calibrations"] if block["ep"] is ep)


@pytest.mark.parametrize("ep", [False, True])
def test_it_is_fitted_on_what_the_score_task_gives(
    ep: bool, calibrated: SimpleNamespace, drawn: SimpleNamespace
) -> None:
    records = scored(open_model(calibrated.folder, tsm=calibrated.tsm, ep=ep), drawn.root, "val")
    images, block = Scored(column(records, "log_likelihoods"), column(records, "label")), block_of(calibrated, ep)
    assert block["task"] == DRAWN.task and block["classes"] == list(DRAWN.choices)
    assert block["question"].startswith("Analyze the given drawn texture image. The possible diagnoses are:")
    blank = Calibration(DRAWN.task, ep, DRAWN.choices, 1.0, (0.0,) * 4)
    expected, choice = chosen_fit(blank, images, range(40))
    assert block["about"]["choice"]["bias"] == choice.bias
    assert block["temperature"] == pytest.approx(expected.temperature, rel=1e-4)
    assert block["bias"] == pytest.approx(expected.bias, abs=1e-4)
    figures = block["about"]["figures"]
    # Before: on all images, whichever fold they are in.
    items = [Probabilities(record["label"], record["probabilities"], record["kind"]) for record in records]
    assert figures["ece"]["before"] == pytest.approx(metrics.ece(items), abs=1e-5)
    assert figures["nll"]["before"] == pytest.approx(metrics.nll(items), abs=1e-5)
    assert figures["accuracy"]["before"] == (column(records, "prediction") == images.targets).mean()
    assert figures["nll"]["after"] < figures["nll"]["before"]  # random weights are sure, and wrong
    low, high = figures["nll"]["difference_ci95"]
    assert low <= figures["nll"]["difference"] <= high
    (own,) = block["thresholds"]
    positive = images.targets == DRAWN.choices.index(ASKED)
    likely = expected.probabilities(images.scores)[:, DRAWN.choices.index(ASKED)]
    assert own["value"] == pytest.approx(threshold(likely, positive, "sensitivity", 0.9), abs=1e-4)
    assert own["positive"] == ASKED and own["sensitivity"]["value"] >= 0.9
    assert own["sensitivity"]["images"] == own["held_out"]["sensitivity"]["images"] == positive.sum()
    assert block["abstention"]["wished"] == 0.5 and (block["abstention"]["error"]["value"] or 0) <= 0.5


def scaled(records: list[dict[str, Any]], block: dict[str, Any]) -> np.ndarray:
    return softmax(column(records, "log_likelihoods") / block["temperature"] + np.array(block["bias"]), axis=1)


def test_the_score_task_uses_it(calibrated: SimpleNamespace, drawn: SimpleNamespace) -> None:
    plain, used = (
        scored(open_model(calibrated.folder, calibrated=given), drawn.root, "test") for given in (False, True)
    )
    found = column(used, "probabilities")
    assert found.shape == (12, 4) and np.abs(found - scaled(plain, block_of(calibrated, False))).max() < 1e-6
    assert np.abs(found - column(plain, "probabilities")).max() > 0.01


def test_the_command_of_lmms_eval_uses_it_with_exemplars(
    calibrated: SimpleNamespace, drawn: SimpleNamespace, tmp_path: Path
) -> None:
    from lmms_eval.__main__ import cli_evaluate

    plain = scored(open_model(calibrated.folder, tsm=calibrated.tsm), drawn.root, "test")
    given = f"pretrained={calibrated.folder},tsm={calibrated.tsm},calibrated=True"
    command = ["--model", "vitask_llava", "--model_args", given, "--tasks", SCORES, "--include_path", str(TASKS)]
    command += ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(drawn.root))
        patch.setattr(sys, "argv", ["lmms-eval", *command])
        cli_evaluate()
    found = np.array([answer.probabilities for answer in read_results(tmp_path)[SCORES].answers.values()])
    assert found.shape == (12, 4) and np.abs(found - scaled(plain, block_of(calibrated, True))).max() < 1e-6


def test_a_run_asks_for_the_calibration_that_fits_it(
    calibrated: SimpleNamespace, drawn: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(calibrated.folder, tmp_path / "llava-broken")
    model = open_model(broken, tsm=calibrated.tsm, calibrated=True)

    def refused(*changed: dict[str, Any], tsm: str = model.tsm.hash) -> str:
        (broken / "calibration.json").write_text(json.dumps({**calibrated.written, "calibrations": changed}))
        model.calibrations, model._announced = Calibrations(broken, tsm, None), set()
        with pytest.raises(SystemExit) as stopped:
            scored(model, drawn.root, "test")
        return str(stopped.value.code)

    prompted = block_of(calibrated, True)
    known = model.calibrations.of(DRAWN.task, True)
    assert (known.temperature, known.tsm) == (prompted["temperature"], model.tsm.hash)
    assert "is for ['falling stripes.'" in refused(prompted | {"classes": prompted["classes"][::-1]})
    assert "is for the answers to 'What is it?'" in refused(prompted | {"question": "What is it?"})
    # Before anything is scored:
    monkeypatch.setattr(model, "score", lambda *_: pytest.fail("the model was asked"))
    assert "exemplars of another TSM than the one in use" in refused(prompted, tsm="1234")
    sentence = "no calibration of task 'vitask_drawn' with exemplars; fit one with `vitask calibrate --tsm DIR`"
    assert sentence in refused(block_of(calibrated, False))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"calibrated": "perhaps"}, "calibrated='perhaps' is neither True nor False"),
        ({"calibrated": True, "contrast": 0.5}, "which contrast=0.5 changes"),
    ],
)
def test_arguments_that_contradict_are_refused(given: dict[str, Any], sentence: str, trained: Trained) -> None:
    with pytest.raises(SystemExit) as stopped:
        open_model(trained.checkpoint, **given)
    assert sentence in str(stopped.value.code)


def test_what_is_not_fit_to_learn_from_is_refused(
    trained: Trained, drawn: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained.checkpoint, tmp_path / "llava-other")
    data = shutil.copytree(drawn.data, tmp_path / "data")
    record = json.loads((folder / "vitask.json").read_text())

    def refused(name: str, *more: Any) -> str:
        assert main(words(folder, data / name, *more)) == 1
        return capsys.readouterr().err

    def trained_on(name: str) -> None:
        (folder / "vitask.json").write_text(json.dumps(record | {"run": {"data": sha256_file(data / name)}}))

    assert "is a test split by its name" in refused("test.json")
    trained_on("val.json")
    assert "is what the checkpoint was trained on" in refused("val.json")
    samples = json.loads((data / "val.json").read_text())
    (data / "mixed.json").write_text(json.dumps(samples[:1] + json.loads((data / "train.json").read_text())))
    trained_on("mixed.json")
    assert "mixed.json' share 1 images, the first being" in refused("val.json")
    trained_on("train.json")
    assert "share 1 images" in refused("val.json", "--judge", data / "mixed.json")
    (data / "few.json").write_text(json.dumps(samples[:12]))
    assert "on at least 20 images, or groups of images, and there are 12" in refused("few.json")
    assert "no class of task 'vitask_drawn'" in refused("val.json", "--sensitivity", ".9", "--positive", "oak")
    assert "is of use with --sensitivity or --specificity" in refused("val.json", "--positive", ASKED)
    assert "--sensitivity is 1.5; it must be at most 1" in refused("val.json", "--sensitivity", "1.5")
    assert "has no task 'other'; give --task vitask_drawn" in refused("val.json", "--task", "other")
    assert not (folder / "calibration.json").exists()


def test_images_that_judge_are_of_the_size_of_training_too(
    trained: Trained, drawn: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained.checkpoint, tmp_path / "llava-other")
    larger = tmp_path / "larger"
    for sample in json.loads((drawn.data / "test.json").read_text()):
        path = larger / "images" / sample["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(drawn.data / "images" / sample["image"]) as image:
            image.resize((48, 48)).save(path)
    judge = shutil.copy(drawn.data / "test.json", larger)
    record = json.loads((folder / "vitask.json").read_text())
    record["images"] = {DRAWN.task: {"width": [28, 28], "height": [28, 28]}}
    (folder / "vitask.json").write_text(json.dumps(record))
    assert main(words(folder, drawn.data / "val.json", "--judge", judge)) == 1
    assert "48x48" in capsys.readouterr().err


def test_other_images_can_judge(
    trained: Trained, drawn: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained.checkpoint, tmp_path / "llava-other")
    assert main(words(folder, drawn.data / "val.json", "--judge", drawn.data / "test.json", "--specificity", ".8")) == 0
    shown = capsys.readouterr().out
    (block,) = json.loads((folder / "calibration.json").read_text())["calibrations"]
    assert block["ep"] is False and block["about"]["judged_by"]["path"] == str(drawn.data / "test.json")
    assert [one["positive"] for one in block["thresholds"]] == list(DRAWN.choices)
    counts = [one["held_out"][name]["images"] for one in block["thresholds"] for name in ("sensitivity", "specificity")]
    assert sum(counts) == 4 * 12
    assert f"Temperature {block['temperature']:.3f}" in shown and "held out: sensitivity" in shown
    assert "the checkpoint does not tell what it was trained on" in shown
    assert read_calibration(folder, DRAWN.task, False).temperature == block["temperature"]
    assert read_calibration(folder, DRAWN.task, True, tsm=TSM.load(trained.tsm, "cpu").hash) is None
