"""What lmms-eval's log says where answers are no labels, or cannot be: inside the real harness, and the causes."""

import pytest
from evaluating import load_tasks, open_model
from lmms_output import write_file
from loguru import logger
from trained import make_trained

from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.evaluation.unread import foreign, unread

BLOCK = {"task": "mri", "label": 0, "choices": ["glioma", "meningioma"]}
RECORD = {"tasks": {"mri": ["glioma", "meningioma"]}, "arguments": {"vitask_stage": 2, "vitask_crt_weight": 0.1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_checkpoint):
    """Trained on the drawn data, as its record says; its weights are random. Read only."""
    return open_model(make_trained(tmp_path_factory.mktemp("trained"), tiny_checkpoint, "cls").checkpoint)


@pytest.fixture
def said():
    """What the log says from now on."""
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(number)


def test_answers_of_random_weights_are_no_labels(model, drawn_root, said) -> None:
    requests = load_tasks(model, drawn_root, DRAWN.task)[DRAWN.task].instances
    answers = model.generate_until(requests)
    (line,) = said
    assert line.startswith(f"task '{DRAWN.task}': ") and f"of {len(answers)} answers name no label" in line
    assert "the likely cause is too short a training" in line


def test_a_task_of_other_labels_than_in_training(model, tmp_path, monkeypatch, said) -> None:
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    write_file(tmp_path, "breastmnist", 4)
    model.loglikelihood(load_tasks(model, tmp_path, "medmnist_breast_score")["medmnist_breast_score"].instances)
    (line,) = said
    assert "'medmnist_breast_score' has the labels malignant, normal or benign (of 'medmnist_breast')" in line
    assert f"none of that kind but on {DRAWN.task} (horizontal stripes, " in line and "VITASK_FOLDER" in line


def test_labels_of_training_under_another_name_are_known() -> None:
    other = {"task": "another_lab", "label": 1, "choices": ["Meningioma", "glioma"]}
    assert foreign("vitask_folder", [other, None], RECORD) is None
    assert foreign("vitask_folder", [other | {"choices": ["glioma", "healthy"]}], RECORD)
    assert foreign("vitask_folder", [BLOCK], None) is None and foreign("pope", [None], RECORD) is None


def test_one_in_twenty_is_let_pass() -> None:
    answers = ["glioma."] * 19
    assert unread("t", [BLOCK] * 20, [*answers, "m mor."], RECORD) is None
    line = unread("t", [BLOCK] * 19, [*answers[:18], "m mor."], RECORD)
    assert line.startswith("task 't': 1 of 19 answers name no label and count as wrong, 'm mor.' among them; ")
    assert unread("pope", [None] * 3, ["?"] * 3, RECORD) is None
    several = {"task": "mri", "label": [], "choices": ["glioma", "meningioma"]}
    assert unread("t", [several], ["no finding."], RECORD) is None


@pytest.mark.parametrize(
    ("task", "record", "cause"),
    [
        ("t", {"arguments": {"vitask_stage": 2, "vitask_crt_weight": 1.0}}, "--vitask_crt_weight 1, under which words"),
        ("t", {"arguments": {"vitask_stage": 1, "vitask_crt_weight": 1.0}}, "too short a training"),
        ("t", {}, "too short a training"),
        ("t_incomplete", {}, "not in the prompts"),
        ("t", {"tasks": {"x": ["a", "b"]}}, "not trained on these labels"),
        ("t", None, "not tuned by VITask"),
    ],
)
def test_the_likely_cause(task, record, cause) -> None:
    assert cause in unread(task, [BLOCK], ["m mor."], None if record is None else RECORD | record)
