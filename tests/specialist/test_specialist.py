"""`Specialist`: the probabilities of lmms-eval's own `_score` run on the same images, on both hosts, with exemplars and
without; their average; images that cannot be read.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import TASKS
from PIL import Image
from trained import Trained, make_trained

from vitask_plugin import Specialist, VITaskError
from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.inference.asking import Query
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import connector_hash, write_calibration
from vitask_plugin.specialist.prediction import Prediction

SCORES = f"{DRAWN.task}_score"


@pytest.fixture(scope="module", params=["llava", "hf"])
def trained(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_hf: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    plain = tiny_checkpoint if request.param == "llava" else tiny_hf("qwen3_vl").folder
    return make_trained(tmp_path_factory.mktemp(request.param), plain, "cls")


@pytest.fixture(scope="module")
def files(drawn_data: Path) -> list[Path]:
    return [drawn_data / "images" / sample["image"] for sample in json.loads((drawn_data / "test.json").read_text())]


def by_lmms_eval(trained: Trained, root: Path, **more: Any) -> list[dict[str, Any]]:
    """What the harness logs of each image."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    host = "vitask_llava" if "LlavaLlama" in (trained.checkpoint / "config.json").read_text() else "vitask_hf"
    given = {"pretrained": trained.checkpoint, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        found = simple_evaluate(
            model=host,
            model_args=",".join(f"{name}={value}" for name, value in given.items()),
            tasks=[SCORES],
            batch_size=3,
            device="cpu",
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        )
    return [sample["n"] for sample in sorted(found["samples"][SCORES], key=lambda sample: sample["doc_id"])]


def table(predictions: list[Any]) -> np.ndarray:
    return np.array([list(one.probabilities.values()) for one in predictions])


def test_probabilities_are_those_of_lmms_eval(trained: Trained, files: list[Path], drawn_root: Path) -> None:
    specialist = Specialist.load(trained.checkpoint, tsm=trained.tsm, device="cpu")
    assert specialist.classes == DRAWN.choices
    expected, found = {}, {}
    for ep, more in {False: {}, True: {"tsm": trained.tsm}}.items():
        logged = by_lmms_eval(trained, drawn_root, **more)
        expected[ep] = np.array([entry["probabilities"] for entry in logged])
        said = specialist.predict(files, ep=ep, batch_size=5)
        found[ep] = table(said)
        assert np.abs(found[ep] - expected[ep]).max() < 1e-6
        assert [one.label for one in said] == [DRAWN.choices[entry["prediction"]] for entry in logged]
        assert [one.image for one in said] == list(map(str, files))
        entropies = -(expected[ep] * np.log(expected[ep])).sum(axis=1)
        assert [one.entropy for one in said] == pytest.approx(entropies, abs=1e-5)
    assert np.abs(found[True] - found[False]).max() > 1e-3
    both = table(specialist.predict(files, ep="average", batch_size=4))
    assert np.abs(both - (expected[False] + expected[True]) / 2).max() < 1e-6
    assert np.array_equal(table(specialist.predict(files, batch_size=5)), found[True])


@pytest.fixture(scope="module")
def specialist(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Specialist:
    made = make_trained(tmp_path_factory.mktemp("alone"), tiny_checkpoint, "cls")
    return Specialist.load(made.checkpoint, tsm=made.tsm, device="cpu")


def test_pictures_and_arrays_are_what_their_files_are(specialist: Specialist, files: list[Path]) -> None:
    pictures = [Image.open(path) for path in files[:3]]
    expected = table(specialist.predict(files[:3]))
    for given in (pictures, [np.asarray(picture.convert("RGB")) for picture in pictures]):
        said = specialist.predict(given)
        assert np.array_equal(table(said), expected) and [one.image for one in said] == [
            "image 0",
            "image 1",
            "image 2",
        ]
    assert specialist.predict([]) == []


def test_what_cannot_be_read_is_a_prediction_with_an_error(
    specialist: Specialist, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "note.png").write_text("no image")
    deep = np.full((8, 8), 30000, np.uint16)
    given = [files[0], tmp_path / "note.png", files[1], tmp_path / "absent.png", deep, np.zeros(3), files[2]]
    said = specialist.predict(given, batch_size=2)
    assert [one.error is None for one in said] == [True, False, True, False, False, False, True]
    assert "note.png' cannot be read (not an image" in said[1].error and "No such file" in said[3].error
    assert (
        "image '4' holds float32 values" in said[4].error and "image '5' is no picture (ndarray (3,)" in said[5].error
    )
    assert all(one.label is None and one.probabilities == {} for one in said if one.error)
    whole = [said[0], said[2], said[6]]
    assert np.abs(table(whole) - table(specialist.predict(files[:3]))).max() < 1e-6


def test_deep_images_go_through_the_window_of_training(
    specialist: Specialist, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the record has it, or as given: the picture is the one of 8 bits that it was made of."""
    plain = Image.open(files[0]).convert("L")
    deep = np.asarray(plain).astype(np.uint16) * 16 + 1000
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    record = json.loads(Path(specialist.folder, "vitask.json").read_text())
    sides = {"width": [32, 32], "height": [32, 32], "images": 24}
    record["images"] = {DRAWN.task: {**sides, "pixels": {"window": [1000, 1000 + 255 * 16]}}}
    changed = shutil.copytree(specialist.folder, tmp_path / "llava-changed")
    (changed / "vitask.json").write_text(json.dumps(record))
    expected = table(specialist.predict([plain], ep=False))
    recorded = Specialist.load(changed, device="cpu")
    given = Specialist.load(specialist.folder, device="cpu", window=(1000, 1000 + 255 * 16))
    for one in (recorded, given):
        said = one.predict([tmp_path / "deep.tif", tmp_path / "float.tif", deep])
        assert np.array_equal(table(said), np.repeat(expected, 3, axis=0))
    with pytest.raises(VITaskError, match=r"--window 5 2 is empty"):
        Specialist.load(specialist.folder, device="cpu", window=(5, 2))


def test_the_question_is_that_of_training_or_of_a_label_set(
    specialist: Specialist, tiny_checkpoint: Path, drawn_data: Path, files: list[Path], tmp_path: Path
) -> None:
    changed = shutil.copytree(specialist.folder, tmp_path / "llava-changed")
    record = json.loads((changed / "vitask.json").read_text())
    asked = {"text": "Which stripes are in the image?", "multi_label": False}
    (changed / "vitask.json").write_text(json.dumps({**record, "questions": {DRAWN.task: asked}}))
    own, usual = (Specialist.load(folder, device="cpu").predict(files[:2]) for folder in (changed, specialist.folder))
    assert np.abs(table(own) - table(usual)).max() > 1e-6
    labelled = Specialist.load(changed, device="cpu", labels=drawn_data).predict(files[:2])
    assert np.array_equal(table(labelled), table(usual))
    untuned = Specialist.load(tiny_checkpoint, device="cpu", labels=drawn_data / "labels.json")
    assert untuned.classes == DRAWN.choices and not untuned.has_exemplars
    assert np.array_equal(table(untuned.predict(files[:2])), table(usual))  # the weights are the same
    renamed = {**record, "tasks": {"mine": ["a", "b"]}}
    (changed / "vitask.json").write_text(json.dumps(renamed))
    with pytest.raises(VITaskError, match="did not record how task 'mine' was asked; give --labels"):
        Specialist.load(changed, device="cpu")


def test_calibration_is_used_where_there_is_one(specialist: Specialist, files: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(specialist.folder, tmp_path / "llava-calibrated")
    tsm = specialist._model.tsm.hash
    bias = (0.5, 0.0, -0.25, 0.0)
    for ep, more in {False: {}, True: {"tsm": tsm, "connector": connector_hash(folder)}}.items():
        made = Calibration(DRAWN.task, ep, DRAWN.choices, 2.0 + ep, bias, question=specialist._question.text, **more)
        write_calibration(folder, made, {})
    loaded = {
        name: Specialist.load(folder, tsm=specialist._model.folders[-1], device="cpu", calibrated=given)
        for name, given in {"default": None, "wanted": True, "off": False}.items()
    }
    plain = {ep: table(specialist.predict(files[:4], ep=ep)) for ep in (False, True, "average")}
    expected = {}
    for ep in (False, True):
        scaled = np.log(plain[ep]) / (2.0 + ep) + np.array(bias)
        expected[ep] = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    expected["average"] = (expected[False] + expected[True]) / 2
    for ep, figures in expected.items():
        found = {name: table(one.predict(files[:4], ep=ep)) for name, one in loaded.items()}
        assert np.abs(found["default"] - figures).max() < 1e-5 and np.array_equal(found["wanted"], found["default"])
        assert np.array_equal(found["off"], plain[ep]) and np.abs(figures - plain[ep]).max() > 0.01
    assert "with exemplars, calibrated (temperature 3)" in loaded["default"].describe(True)
    assert "averaged, calibrated (temperature 2 and 3)" in loaded["default"].describe("average")
    assert "not calibrated" in loaded["off"].describe()


def test_bad_ways_to_ask_are_one_sentence(specialist: Specialist, files: list[Path]) -> None:
    with pytest.raises(VITaskError, match="ep='both' is none of True, False and 'average'"):
        specialist.predict(files[:1], ep="both")
    alone = Specialist.load(specialist.folder, device="cpu")
    assert alone.way(None) is False and specialist.way(None) is True
    with pytest.raises(VITaskError, match="cannot be asked with exemplars, for no TSM is given"):
        alone.predict(files[:1], ep="average")


def test_a_tsm_that_the_task_is_none_of_is_not_left_out_in_silence(
    specialist: Specialist, drawn_data: Path, files: list[Path], tmp_path: Path
) -> None:
    labels = json.loads((drawn_data / "labels.json").read_text())
    other = {**labels, "task": "other", "choices": ["upward", "downward", "sideways", "nowhere"]}
    (tmp_path / "labels.json").write_text(json.dumps(other))
    given = {"tsm": specialist._model.folders[-1], "device": "cpu", "labels": tmp_path}
    asked = Specialist.load(specialist.folder, **given)
    said = "cannot be asked with exemplars, for task 'other' with the labels upward, .* give ep=False"
    with pytest.raises(VITaskError, match=said):
        asked.predict(files[:1])
    assert asked.way(False) is False


def test_entropy_is_in_nats() -> None:
    likely = Prediction.of("a", ("x", "y", "z"), [0.5, 0.5, 0.0], "multi-class")
    assert likely.entropy == pytest.approx(np.log(2)) and likely.label == "x"
    several = Prediction.of("a", ("x", "y", "z"), [0.5, 0.75, 1.0], MULTI_LABEL)
    binary = np.log(2) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert several.entropy == pytest.approx(binary) and several.label == "y, z"
    assert Prediction.of("a", ("x", "y"), [0.2, 0.1], MULTI_LABEL).label == "no finding"


def test_several_labels_are_each_set_against_none(
    tiny_checkpoint: Path, drawn_data: Path, files: list[Path], tmp_path: Path
) -> None:
    labels = json.loads((drawn_data / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps({**labels, "task": "several", "type": MULTI_LABEL}))
    specialist = Specialist.load(tiny_checkpoint, device="cpu", labels=tmp_path)
    said = specialist.predict(files[:2])
    question = specialist._question
    assert question.text.endswith(f"{DRAWN.choices[-1]}, no finding.") and question.answers[-1] == "no finding."
    with Image.open(files[0]) as image:
        asked = [Query(question.text, [image.convert("RGB")])]
        (scores,) = specialist._model.score(asked, [[*(f"{name}." for name in DRAWN.choices), "no finding."]])
    odds = (scores.log_likelihoods[:-1] - scores.log_likelihoods[-1]).numpy()
    assert list(said[0].probabilities.values()) == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-5)
