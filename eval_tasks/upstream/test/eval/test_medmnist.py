"""Contract tests of the MedMNIST tasks, on a file of MedMNIST's layout that they draw themselves."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lmms_eval.tasks import TaskManager, get_task_dict

TASK_DIR = Path(__file__).resolve().parents[2] / "lmms_eval" / "tasks" / "medmnist"
SETS = ("path", "chest", "derma", "oct", "pneumonia", "retina", "breast", "blood", "tissue", "organa", "organc", "organs")


@pytest.fixture(scope="module")
def utils():
    spec = importlib.util.spec_from_file_location("medmnist_utils", TASK_DIR / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASK_DIR), include_defaults=False)


@pytest.fixture
def files(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for name, shape, labels in (("breastmnist", (4, 28, 28), [[0], [1], [1], [0]]), ("retinamnist_64", (2, 64, 64, 3), [[4], [0]]), ("chestmnist", (2, 28, 28), [[0] * 14, [1, 0, 0, 0, 0, 1] + [0] * 8])):
        np.savez(tmp_path / f"{name}.npz", test_images=generator.integers(0, 256, shape, dtype=np.uint8), test_labels=np.array(labels, dtype=np.uint8))
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    return tmp_path


def test_there_are_twelve_tasks_of_each_of_four_sizes(manager):
    endings = ("", "_64", "_128", "_224")
    assert set(manager.all_subtasks) == {f"{name}mnist{ending}" for name in SETS for ending in endings}
    assert set(manager.all_groups) == {f"medmnist2d{ending}" for ending in endings}
    for ending in endings:
        assert manager._get_config(f"medmnist2d{ending}")["task"] == [f"{name}mnist{ending}" for name in SETS]


def test_dataset_and_license_are_in_the_metadata(manager):
    licenses = {task: manager._get_config(task)["metadata"]["license"] for task in manager.all_subtasks}
    assert {task for task, license in licenses.items() if license != "cc-by-4.0"} == {f"dermamnist{ending}" for ending in ("", "_64", "_128", "_224")}
    assert licenses["dermamnist"] == "cc-by-nc-4.0"


def test_images_questions_and_answers_are_the_files(manager, files):
    tasks = get_task_dict(["breastmnist", "retinamnist_64", "chestmnist"], manager)
    breast = tasks["breastmnist"].dataset["test"]
    with np.load(files / "breastmnist.npz") as file:
        assert (np.array(breast[2]["image"].convert("L")) == file["test_images"][2]).all()
    assert breast["answer"][:2] == ["malignant.", "normal or benign."]
    assert breast[0]["question"] == "Analyze the given breast ultrasound image. The possible diagnoses are: malignant, normal or benign."
    retina = tasks["retinamnist_64"].dataset["test"]
    assert (retina[0]["image"].size, retina[0]["answer"]) == ((64, 64), "proliferative diabetic retinopathy.")
    assert list(tasks["chestmnist"].dataset["test"]["answer"]) == ["no finding.", "atelectasis, nodule."]


def test_the_image_stands_before_the_question(manager, files, utils):
    doc = get_task_dict(["breastmnist"], manager)["breastmnist"].dataset["test"][0]
    (message,) = utils.medmnist_doc_to_messages(doc, {"pre_prompt": "A ", "post_prompt": " B"})
    image, text = message["content"]
    assert message["role"] == "user" and image["type"] == "image" and image["url"].mode == "RGB"
    assert text == {"type": "text", "text": f"A {doc['question']} B"}


@pytest.mark.parametrize(
    ("answer", "read"),
    [("malignant.", 0), ("Malignant", 0), ("The image shows a benign lesion.", 1), ("It is not malignant.", None), ("malignant or normal", None), ("I cannot tell.", None)],
)
def test_an_answer_is_read_as_a_class_or_as_none(utils, answer, read):
    doc = {"choices": ["malignant", "normal or benign"], "labels": [0], "multi_label": False}
    values = utils.medmnist_process_results(doc, [answer])
    assert values["macro_f1"].prediction == read and values["accuracy"] == float(read == 0)
    assert utils.medmnist_unmapped([values["unmapped"]]) == int(read is None)


def test_several_findings_count_one_by_one(utils):
    doc = {"choices": ["effusion", "mass", "edema"], "labels": [0, 1], "multi_label": True}
    assert utils.medmnist_process_results(doc, ["Mass."])["accuracy"] == pytest.approx(2 / 3)
    assert utils.medmnist_process_results(doc, ["effusion, mass."])["accuracy"] == 1
    assert utils.medmnist_process_results({**doc, "labels": []}, ["no finding."])["accuracy"] == 1


def test_macro_f1_is_the_mean_over_the_classes(utils):
    doc = {"choices": ["malignant", "normal or benign"], "multi_label": False}
    answers = [(0, "malignant."), (0, "malignant."), (1, "malignant."), (1, "nothing")]
    values = [utils.medmnist_process_results({**doc, "labels": [label]}, [answer])["macro_f1"] for label, answer in answers]
    assert utils.medmnist_macro_f1(values) == pytest.approx((0.8 + 0.0) / 2)
