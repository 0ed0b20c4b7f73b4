"""Answers in words to labels, as a table; figures against hand-counted values and against medmnist and scikit-learn."""

import math

import numpy as np
import pytest
from medmnist.evaluator import getACC, getAUC
from sklearn.metrics import f1_score

from vitask_plugin.data.instructions import label_sets, response
from vitask_plugin.evaluation import metrics
from vitask_plugin.evaluation.metrics import Outcome, Probabilities, parse_answer, parse_exact

BREAST = ["malignant", "normal or benign"]
RETINA = [f"{grade} diabetic retinopathy" for grade in ("no", "mild", "moderate", "severe", "proliferative")]
NESTED = ["nevus", "melanocytic nevus", "melanoma"]
NEGATED = ["retinopathy", "no retinopathy"]

ANSWERS = [
    # exact
    ("malignant.", BREAST, 0),
    ("  normal or benign.\n", BREAST, 1),
    ("malignant", BREAST, 0),
    ("no diabetic retinopathy.", RETINA, 0),
    # case, punctuation, articles, sentences
    ("Malignant!", BREAST, 0),
    ("MALIGNANT", BREAST, 0),
    ('"normal, or benign"', BREAST, 1),
    ("The diagnosis is malignant.", BREAST, 0),
    ("It shows a malignant mass", BREAST, 0),
    ("malignant malignant malignant", BREAST, 0),
    ("Answer:malignant;", BREAST, 0),
    ("This eye has No diabetic retinopathy", RETINA, 0),
    ("left-kidney", ["left kidney", "right kidney"], 0),
    # no label, or a part of a word or of a label
    ("", BREAST, None),
    (".", BREAST, None),
    ("benign", BREAST, None),
    ("malignancy", BREAST, None),
    ("nonmalignant", BREAST, None),
    ("diabetic retinopathy", RETINA, None),
    ("nonproliferative diabetic retinopathy", RETINA, None),
    # two labels at once
    ("malignant, normal or benign", BREAST, None),
    ("The possible diagnoses are: malignant, normal or benign. malignant", BREAST, None),
    ("mild diabetic retinopathy or severe diabetic retinopathy", RETINA, None),
    # negation
    ("not malignant", BREAST, None),
    ("This is not malignant.", BREAST, None),
    ("It isn't malignant", BREAST, None),
    ("It isn\u2019t malignant", BREAST, None),
    ("non-malignant", BREAST, None),
    ("no evidence of anything malignant", BREAST, None),
    ("malignant is unlikely", BREAST, None),
    ("not malignant, normal or benign", BREAST, 1),
    ("It is not malignant but normal or benign.", BREAST, 1),
    ("No, it is malignant", BREAST, 0),
    ("no mild diabetic retinopathy", RETINA, None),
    ("no sign of retinopathy", NEGATED, None),
    ("There is no retinopathy here", NEGATED, 1),
    ("retinopathy is there", NEGATED, 0),
    # labels inside labels
    ("a melanocytic nevus", NESTED, 1),
    ("a nevus", NESTED, 0),
    ("Melanocytic nevus, not melanoma", NESTED, 1),
    ("a nevus, a melanocytic nevus", NESTED, None),
]


@pytest.mark.parametrize(("text", "choices", "index"), ANSWERS)
def test_answers(text: str, choices: list[str], index: int | None) -> None:
    assert parse_answer(text, choices) == index


def test_exact_is_letter_for_letter() -> None:
    assert parse_exact(" malignant. ", BREAST) == 0
    assert parse_exact("Malignant.", BREAST) is None
    assert parse_exact("malignant..", BREAST) is None


@pytest.mark.parametrize("task", sorted(label_sets()))
def test_every_label_of_every_task_is_read_back(task: str) -> None:
    choices = label_sets()[task].choices
    for label in range(len(choices)):
        for text in (response(choices, label), f"The diagnosis is {choices[label].upper()} here"):
            assert parse_answer(text, choices) == label


OUTCOMES = [Outcome(0, 0), Outcome(0, 1), Outcome(1, 1), Outcome(1, None), Outcome(2, 2), Outcome(2, None)]


def test_figures_of_answers_counted_by_hand() -> None:
    assert metrics.accuracy(OUTCOMES) == pytest.approx(3 / 6)
    assert metrics.unmapped(OUTCOMES) == 2
    # class 0: precision 1, recall 1/2; class 1: 1/2, 1/2; class 2: 1, 1/2
    assert metrics.macro_f1(OUTCOMES) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert metrics.confusion(OUTCOMES, 3) == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]]


def test_macro_f1_is_scikit_learns_where_every_answer_names_a_label() -> None:
    generator = np.random.default_rng(0)
    targets, predictions = generator.integers(0, 5, (2, 60)).tolist()
    outcomes = [Outcome(*pair) for pair in zip(targets, predictions, strict=True)]
    assert metrics.macro_f1(outcomes) == pytest.approx(f1_score(targets, predictions, average="macro"))


@pytest.mark.parametrize(
    ("kind", "classes"), [("binary-class", 2), ("multi-class", 4), ("ordinal-regression", 5), ("multi", 3)]
)
def test_auc_is_medmnists(kind: str, classes: int) -> None:
    generator = np.random.default_rng(classes)
    kind = "multi-label, binary-class" if kind == "multi" else kind
    targets = generator.integers(0, classes, 40)
    if kind == "multi-label, binary-class":
        targets = generator.integers(0, 2, (40, classes))
    scores = generator.dirichlet(np.ones(classes), 40)
    items = [Probabilities(target, row, kind) for target, row in zip(targets.tolist(), scores.tolist(), strict=True)]
    assert metrics.auc(items) == pytest.approx(getAUC(targets, scores, kind), abs=1e-12)
    if kind != "multi-label, binary-class":
        outcomes = [Outcome(int(target), int(row.argmax())) for target, row in zip(targets, scores, strict=True)]
        assert metrics.accuracy(outcomes) == pytest.approx(getACC(targets, scores, kind))


def test_auc_of_two_classes_ranks_by_the_second() -> None:
    items = [Probabilities(label, (1 - p, p), "binary-class") for label, p in ((0, 0.1), (1, 0.4), (0, 0.3), (1, 0.9))]
    assert metrics.auc(items) == 1.0


@pytest.mark.parametrize("targets", [[0, 0, 0], [0, 1, 1], [2]])
def test_auc_of_a_class_without_samples_is_undefined(targets: list[int], caplog: pytest.LogCaptureFixture) -> None:
    items = [Probabilities(target, (0.2, 0.3, 0.5), "multi-class") for target in targets]
    assert math.isnan(metrics.auc(items))
    assert "no AUC" in caplog.text


def test_probabilities_are_the_softmax_of_the_log_likelihoods() -> None:
    losses = [1000.0, 1001.0, 1003.0]
    weights = np.exp([0.0, -1.0, -3.0])
    assert metrics.probabilities(losses) == pytest.approx((weights / weights.sum()).tolist())
