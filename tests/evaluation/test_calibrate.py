"""`vitask calibrate` on a checkpoint, and lmms-eval's `_score` task with `calibrated=True` on the same checkpoint."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluating import TASKS, open_model
from scipy.special import softmax
from trained import Trained, make_tsm

from vitask_plugin.cli import main
from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.files import sha256_file
from vitask_plugin.inference.calibration import Scored, chosen_fit
from vitask_plugin.inference.thresholds import threshold
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import read_calibration
from vitask_plugin.report.results import on_split, read_results
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


def judged(root: Path, output: Path, split: str, **model_args: Any) -> Any:
    """What lmms-eval's command says of a split."""
    from lmms_eval.__main__ import cli_evaluate

    given = ",".join(f"{name}={value}" for name, value in model_args.items())
    command = ["--model", "vitask_llava", "--model_args", given, "--tasks", SCORES, "--include_path", str(TASKS)]
    command += ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        patch.setenv("MEDMNIST_SPLIT", split)
        patch.setattr(sys, "argv", ["lmms-eval", *command])
        cli_evaluate()
    return read_results(output)[on_split(SCORES, split)]


def scores(result: Any) -> np.ndarray:
    return np.array([answer.log_likelihoods for answer in result.answers.values()])


@pytest.mark.parametrize("ep", [False, True])
def test_it_is_fitted_on_what_the_score_task_gives(
    ep: bool, calibrated: SimpleNamespace, drawn: SimpleNamespace, tmp_path: Path
) -> None:
    found = judged(drawn.root, tmp_path, "val", pretrained=calibrated.folder, tsm=calibrated.tsm, ep=ep)
    images = Scored(scores(found), np.array([answer.label for answer in found.answers.values()]))
    block = next(block for block in calibrated.written["calibrations"] if block["ep"] is ep)
    assert block["task"] == DRAWN.task and block["classes"] == list(DRAWN.choices)
    assert block["question"].startswith("Analyze the given drawn texture image. The possible diagnoses are:")
    blank = Calibration(DRAWN.task, ep, DRAWN.choices, 1.0, (0.0,) * 4)
    expected, choice = chosen_fit(blank, images, range(40))
    assert block["about"]["choice"]["bias"] == choice.bias
    assert block["temperature"] == pytest.approx(expected.temperature, rel=1e-4)
    assert block["bias"] == pytest.approx(expected.bias, abs=1e-4)
    figures = block["about"]["figures"]
    # Before: on all images, whichever fold they are in.
    assert figures["ece"]["before"] == pytest.approx(found.metrics["ece"], abs=1e-5)
    assert figures["accuracy"]["before"] == pytest.approx(found.metrics["accuracy"])
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


@pytest.mark.parametrize("ep", [False, True])
def test_the_score_task_uses_it(ep: bool, calibrated: SimpleNamespace, drawn: SimpleNamespace, tmp_path: Path) -> None:
    how = {"pretrained": calibrated.folder, "tsm": calibrated.tsm, "ep": ep}
    plain = judged(drawn.root, tmp_path / "plain", "test", **how)
    used = judged(drawn.root, tmp_path / "used", "test", **how, calibrated=True)
    block = next(block for block in calibrated.written["calibrations"] if block["ep"] is ep)
    expected = softmax(scores(plain) / block["temperature"] + np.array(block["bias"]), axis=1)
    found = np.array([answer.probabilities for answer in used.answers.values()])
    assert found.shape == (12, 4) and np.abs(found - expected).max() < 1e-6
    before = np.array([answer.probabilities for answer in plain.answers.values()])
    assert np.abs(found - before).max() > 0.01


def test_a_run_asks_for_the_calibration_that_fits_it(
    calibrated: SimpleNamespace, drawn: SimpleNamespace, tmp_path: Path
) -> None:
    other = tmp_path / "tsm"
    make_tsm(other, seed=9)
    broken = shutil.copytree(calibrated.folder, tmp_path / "llava-broken")
    with_tsm = {"pretrained": broken, "tsm": calibrated.tsm, "calibrated": True}

    def refused(**model_args: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            judged(drawn.root, tmp_path / "out", "test", **model_args)
        return str(stopped.value.code)

    blocks = {block["ep"]: block for block in calibrated.written["calibrations"]}

    def rewritten(*changed: dict[str, Any]) -> None:
        (broken / "calibration.json").write_text(json.dumps({**calibrated.written, "calibrations": changed}))

    assert "exemplars of another TSM than the one in use" in refused(**with_tsm | {"tsm": other}, swap="force")
    rewritten(blocks[False])
    assert "no calibration of task 'vitask_drawn' with exemplars; fit one with `vitask calibrate --tsm DIR`" in refused(
        **with_tsm
    )
    rewritten(blocks[True] | {"classes": blocks[True]["classes"][::-1]})
    assert "and the calibration of task 'vitask_drawn' is for ['falling stripes.'" in refused(**with_tsm)
    rewritten(blocks[True] | {"question": "What is it?"})
    assert "is for the answers to 'What is it?'" in refused(**with_tsm)
    for given, sentence in (
        ({"calibrated": "perhaps"}, "calibrated='perhaps' is neither True nor False"),
        ({"calibrated": True, "contrast": 0.5}, "which contrast=0.5 changes"),
    ):
        with pytest.raises(SystemExit) as stopped:
            open_model(broken, **given)
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
