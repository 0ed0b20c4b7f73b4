"""Figures against hand counts, medmnist and scikit-learn; intervals against the figures and plain resampling."""

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from medmnist import Evaluator
from medmnist.evaluator import getACC, getAUC
from outcomes import decided, draw
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import label_sets
from vitask_plugin.evaluation import intervals
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome, Probabilities

KINDS = [("binary-class", 2), ("multi-class", 9), ("ordinal-regression", 5), (MULTI_LABEL, 14)]
OUTCOMES = [Outcome(0, 0), Outcome(0, 1), Outcome(1, 1), Outcome(1, None), Outcome(2, 2), Outcome(2, None)]
LISTS = [
    Outcome([1, 0, 0], [1, 0, 0]),
    Outcome([1, 1, 0], [1, 0, 0]),
    Outcome([0, 0, 0], [0, 1, 0]),
    Outcome([0, 1, 0], None),
]


# Figures -----------------------------------------------------------------------------------------------------------


def test_figures_of_answers_counted_by_hand() -> None:
    assert metrics.accuracy(OUTCOMES) == metrics.subset_accuracy(OUTCOMES) == pytest.approx(3 / 6)
    assert metrics.unmapped(OUTCOMES) == 2
    assert metrics.balanced_accuracy(OUTCOMES[:3]) == pytest.approx((1 / 2 + 1) / 2)  # no sample of class 2
    # class 0: precision 1, recall 1/2; class 1: 1/2, 1/2; class 2: 1, 1/2
    assert metrics.macro_f1(OUTCOMES) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert metrics.confusion(OUTCOMES, 3) == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]]


def test_figures_of_lists_counted_by_hand() -> None:
    assert [metrics.hit(one) for one in LISTS] == pytest.approx([1, 2 / 3, 2 / 3, 0])
    assert metrics.accuracy(LISTS) == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)
    assert metrics.subset_accuracy(LISTS) == 1 / 4
    # Label 0: found 2 of 2, left out 1 of 2 (the answer without a label has found nothing and left nothing out);
    # label 1: 0 of 2 and 1 of 2; label 2 is never there: left out 3 of 4.
    assert metrics.balanced_accuracy(LISTS) == pytest.approx(((1 + 1 / 2) / 2 + (0 + 1 / 2) / 2 + 3 / 4) / 3)
    assert metrics.macro_f1(LISTS) == pytest.approx((1 + 0 + 0) / 3)


def test_kappa_takes_an_answer_without_a_label_for_the_farthest_grade() -> None:
    assert [metrics.farthest(Outcome(label, None), 5).prediction for label in range(5)] == [4, 4, 0, 0, 0]
    assert metrics.farthest(Outcome(1, 3), 5) == Outcome(1, 3)
    good = [Outcome(label, label) for label in range(5)]
    silent = [metrics.farthest(Outcome(label, None), 5) for label in range(5)]
    assert metrics.quadratic_kappa(good) == 1
    assert metrics.quadratic_kappa(silent) < metrics.quadratic_kappa(good[:4] + silent[4:]) < 1
    assert math.isnan(metrics.quadratic_kappa([Outcome(2, 2), Outcome(2, 2)]))
    # A grade that nobody has still counts as a step between the others.
    far, near = ([Outcome(0, 0), Outcome(1, 1), Outcome(grade, 0), Outcome(grade, grade)] for grade in (4, 2))
    assert metrics.quadratic_kappa(far) != pytest.approx(metrics.quadratic_kappa(near))


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_accuracy_and_auc_are_medmnists(kind: str, classes: int) -> None:
    items = draw(kind, classes)
    targets = np.array([item.target for item in items])
    scores = np.array([item.probabilities for item in items])
    assert metrics.accuracy(decided(items)) == pytest.approx(getACC(targets, scores, kind), abs=1e-12)
    assert metrics.auc(items) == pytest.approx(getAUC(targets, scores, kind), abs=1e-12)


@pytest.mark.parametrize("task", sorted(set(label_sets()) - {"vitask_drawn"}))
def test_accuracy_and_auc_are_the_evaluators_of_each_set(task: str, tmp_path: Path) -> None:
    """`medmnist.Evaluator` itself, on a file of the set's layout."""
    known = label_sets()[task]
    items = draw(known.kind, len(known.choices))
    labels = np.array([item.target for item in items]).reshape(len(items), -1)
    np.savez(tmp_path / f"{known.flag}.npz", test_labels=labels)
    evaluator = Evaluator(known.flag, "test", root=str(tmp_path))
    found = evaluator.evaluate(np.array([item.probabilities for item in items]))
    assert metrics.accuracy(decided(items)) == pytest.approx(found.ACC, abs=1e-9)
    assert metrics.auc(items) == pytest.approx(found.AUC, abs=1e-9)


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_other_figures_are_scikit_learns_where_every_answer_names_a_label(kind: str, classes: int) -> None:
    outcomes = decided(draw(kind, classes))
    targets, predictions = map(np.array, zip(*outcomes, strict=True))
    assert metrics.macro_f1(outcomes) == pytest.approx(f1_score(targets, predictions, average="macro"), abs=1e-12)
    if kind == MULTI_LABEL:
        each = [balanced_accuracy_score(a, b) for a, b in zip(targets.T, predictions.T, strict=True)]
        assert metrics.balanced_accuracy(outcomes) == pytest.approx(np.mean(each), abs=1e-12)
        assert metrics.subset_accuracy(outcomes) == pytest.approx((targets == predictions).all(axis=1).mean())
    else:
        expected = balanced_accuracy_score(targets, predictions)
        assert metrics.balanced_accuracy(outcomes) == pytest.approx(expected, abs=1e-12)
        expected = cohen_kappa_score(targets, predictions, weights="quadratic")
        assert metrics.quadratic_kappa(outcomes) == pytest.approx(expected, abs=1e-12)


def test_figures_of_the_real_files_if_they_are_here() -> None:
    root = Path(os.environ.get("MEDMNIST_ROOT", "~/.medmnist")).expanduser()
    found = [known for known in label_sets().values() if (root / f"{known.flag}.npz").is_file()]
    if not found:
        pytest.skip(f"no MedMNIST file in {root}")
    for known in found:
        evaluator = Evaluator(known.flag, "test", root=str(root))
        # Nearest training neighbour in mean brightness: real labels, real predictions, no model.
        with np.load(root / f"{known.flag}.npz") as file:
            train, test = (
                file[f"{split}_images"].reshape(len(file[f"{split}_images"]), -1).mean(1) for split in ("train", "test")
            )
            train_labels, labels = file["train_labels"], file["test_labels"]
        near = np.abs(test[:, None] - train[None]).argsort(axis=1)[:, :15]
        if known.multi_label:
            scores, targets = train_labels[near].mean(axis=1), labels.tolist()
        else:
            scores = np.eye(len(known.choices))[train_labels[near][..., 0]].mean(axis=1)
            targets = labels[:, 0].tolist()
        items = [Probabilities(*pair, known.kind) for pair in zip(targets, scores.tolist(), strict=True)]
        expected = evaluator.evaluate(scores)
        assert metrics.accuracy(decided(items)) == pytest.approx(expected.ACC, abs=1e-9)
        assert metrics.auc(items) == pytest.approx(expected.AUC, abs=1e-9)


def test_auc_of_two_classes_ranks_by_the_second() -> None:
    items = [Probabilities(label, (1 - p, p), "binary-class") for label, p in ((0, 0.1), (1, 0.4), (0, 0.3), (1, 0.9))]
    assert metrics.auc(items) == 1.0


@pytest.mark.parametrize("targets", [[0, 0, 0], [0, 1, 1], [2]])
def test_auc_of_a_class_without_samples_is_undefined(targets: list[int], caplog: pytest.LogCaptureFixture) -> None:
    items = [Probabilities(target, (0.2, 0.3, 0.5), "multi-class") for target in targets]
    assert math.isnan(metrics.auc(items))
    assert "no AUC" in caplog.text
    assert all(map(math.isnan, intervals.interval("auc", items)))


def test_probabilities_of_one_label_are_the_softmax_of_the_log_likelihoods() -> None:
    weights = np.exp([0.0, -1.0, -3.0])
    found = metrics.probabilities([1000.0, 1001.0, 1003.0], "multi-class")
    assert found == pytest.approx((weights / weights.sum()).tolist())


def test_probabilities_of_several_labels_are_each_against_no_finding() -> None:
    assert metrics.probabilities([3.0, 1.0, 5000.0, 2.0], MULTI_LABEL) == pytest.approx(
        [math.exp(-3) / (math.exp(-3) + math.exp(-2)), math.exp(-1) / (math.exp(-1) + math.exp(-2)), 0]
    )
    # What one label gets does not depend on the others.
    assert (
        metrics.probabilities([3.0, 9.0, 2.0], MULTI_LABEL)[0] == metrics.probabilities([3.0, 1.0, 2.0], MULTI_LABEL)[0]
    )


def test_calibration_counted_by_hand() -> None:
    sure_and_right = [Probabilities(0, (0.9, 0.1), "binary-class")] * 3
    sure_and_wrong = [Probabilities(1, (0.9, 0.1), "binary-class")]
    unsure = [Probabilities(1, (0.4, 0.6), "binary-class")] * 4
    items = sure_and_right + sure_and_wrong + unsure
    assert metrics.reliability(items) == [pytest.approx((0.6, 1.0, 4)), pytest.approx((0.9, 0.75, 4))]
    assert metrics.ece(items) == pytest.approx((4 * 0.4 + 4 * 0.15) / 8)
    assert metrics.ece([Probabilities(1, (0, 1), "binary-class")]) == 0
    lists = [Probabilities([1, 0], (0.9, 0.9), MULTI_LABEL)]
    assert metrics.reliability(lists) == [pytest.approx((0.9, 0.5, 2))]


def test_nll_counted_by_hand() -> None:
    items = [Probabilities(0, (0.8, 0.2), "binary-class"), Probabilities(1, (0.5, 0.5), "binary-class")]
    assert metrics.nll(items) == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)
    assert metrics.nll([Probabilities([1, 0], (0.9, 0.3), MULTI_LABEL)]) == pytest.approx(
        -(math.log(0.9) + math.log(0.7)) / 2
    )
    assert 700 < metrics.nll([Probabilities(1, (1.0, 0.0), "binary-class")]) < 710  # and not infinite


# Intervals -----------------------------------------------------------------------------------------------------------


def figures_of(kind: str, classes: int) -> dict[str, list]:
    """{figure: what it takes}, a few answers of each kind naming no label."""
    items = draw(kind, classes)
    outcomes = decided(items, unmapped=0.1)
    assert metrics.unmapped(outcomes) > 5
    taken = dict.fromkeys(("accuracy", "subset_accuracy", "balanced_accuracy", "macro_f1"), outcomes)
    if kind != MULTI_LABEL:
        taken["quadratic_kappa"] = [metrics.farthest(outcome, classes) for outcome in outcomes]
    return {**taken, "auc": items, "ece": items, "nll": items}


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_weighted_figures_are_the_figures(kind: str, classes: int) -> None:
    """Some samples being there several times."""
    for figure, items in figures_of(kind, classes).items():
        items = items + items[:50] + items[:20]
        places, weighted = intervals.RESAMPLED[figure](items)
        counts = np.bincount(places)
        assert counts.sum() == len(items) and counts.max() >= 3
        assert weighted(counts[None].astype(float))[0] == pytest.approx(getattr(metrics, figure)(items), abs=1e-12), (
            figure
        )


@pytest.mark.parametrize(("kind", "classes"), [("binary-class", 2), (MULTI_LABEL, 4)])
def test_intervals_are_those_of_plain_resampling(kind: str, classes: int) -> None:
    generator = np.random.default_rng(5)
    for figure, items in figures_of(kind, classes).items():
        drawn = [[items[i] for i in generator.integers(0, len(items), len(items))] for _ in range(300)]
        values = [getattr(metrics, figure)(resample) for resample in drawn]
        low, high = np.quantile(values, [0.025, 0.975])
        found = intervals.interval(figure, items)
        # Of 300 resamples and of 1,000: the ends agree to a fraction of the width.
        assert found == pytest.approx([low, high], abs=0.2 * (high - low)), figure
        assert found == intervals.interval(figure, items[::-1])
        assert found[0] < found[1]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        outcomes = [Outcome(0, int(wrong)) for wrong in generator.random(150) < 0.3]
        low, high = intervals.interval("accuracy", outcomes)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_the_interval_of_a_mean() -> None:
    assert intervals.interval_of_mean([[0.4, 0.6]]) == [0.4, 0.6]
    assert intervals.interval_of_mean([[0.4, 0.6]] * 4) == [0.45, 0.55]
    assert intervals.interval_of_mean([[0.0, 0.2], [0.9, 0.9]]) == [0.45, 0.55]
    assert all(map(math.isnan, intervals.interval_of_mean([[0.0, 0.2], [math.nan, math.nan]])))


def test_the_largest_set_takes_seconds() -> None:
    items = draw("multi-class", 8, count=47280)
    started = time.perf_counter()
    low, high = intervals.interval("macro_f1", decided(items))
    assert high - low < 0.02
    assert time.perf_counter() - started < 20
