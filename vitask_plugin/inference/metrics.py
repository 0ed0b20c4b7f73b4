"""From labels, answers and probabilities to metrics. Knows no model and no harness.

Metrics are plain functions over all samples of a task: `medmnist`'s and scikit-learn's definitions, and a rule for an
answer that names no label (None): it is wrong. Their uncertainty is in `intervals`. K classes, N samples.
"""

import logging
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitask_plugin import calibration_error
from vitask_plugin.data.class_names import MULTI_LABEL

logger = logging.getLogger(__name__)

_THRESHOLD = 0.5  # medmnist's, for two classes and for each of several labels


class Outcome(NamedTuple):
    """One sample: its label, and the label that the answer was read as, None if it names none.

    A class index each; of a multi-label sample K zeros and ones each.
    """

    target: int | Sequence[int]
    prediction: int | Sequence[int] | None


class Probabilities(NamedTuple):
    """One sample: its label (multi-label: K zeros and ones), K probabilities, and `medmnist`'s word for the kind."""

    target: int | Sequence[int]
    probabilities: Sequence[float]
    kind: str


# Labels ----------------------------------------------------------------------------------------------------------


def hit(outcome: Outcome) -> float:
    """How much of one answer is right: 0 or 1; of a multi-label sample the share of its labels."""
    target, prediction = outcome
    if prediction is None:
        return 0.0
    if isinstance(target, Sequence):
        return statistics.fmean(a == b for a, b in zip(target, prediction, strict=True))
    return float(target == prediction)


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """Share of samples whose answer names their label; multi-label: of (sample, label) pairs that are right.

    `medmnist.evaluator.getACC` of answers that all name a label. Counted here, since it has no place for those that do
    not, and none for a single sample.
    """
    return statistics.fmean(map(hit, outcomes))


def subset_accuracy(outcomes: Sequence[Outcome]) -> float:
    """Share of samples whose whole answer is right; another metric than `accuracy` with several labels only."""
    return statistics.fmean(hit(outcome) == 1 for outcome in outcomes)


def balanced_accuracy(outcomes: Sequence[Outcome]) -> float:
    """Mean recall of the classes that have samples; multi-label: of "there" and "not there", then over the labels."""
    from sklearn.metrics import recall_score

    targets, predictions = columns(outcomes)
    recalls = []
    for target, prediction in zip(targets.T, predictions.T, strict=True):
        present = np.unique(target)
        recalls.append(recall_score(target, prediction, labels=present, average="macro", zero_division=0))
    return statistics.fmean(map(float, recalls))


def macro_f1(outcomes: Sequence[Outcome]) -> float:
    """Unweighted mean of the F1 of each class that is some sample's label or answer; multi-label: of all K labels.

    scikit-learn's definition, with an F1 of 0 for a label that is never there and never named.
    """
    from sklearn.metrics import f1_score

    targets, predictions = columns(outcomes)
    if targets.shape[1] > 1:
        named = np.where(predictions < 0, 0, predictions)  # who names no label has found none
        return float(f1_score(targets, named, average="macro", zero_division=0))
    # -1 is no class of its own: it costs its target's recall and nobody's precision.
    classes = sorted({*targets.flat, *predictions.flat} - {-1})
    return float(f1_score(targets[:, 0], predictions[:, 0], labels=classes, average="macro", zero_division=0))


def quadratic_kappa(outcomes: Sequence[Outcome]) -> float:
    """Cohen's kappa with quadratic weights, for ordered classes. Every sample has a prediction (see `farthest`).

    NaN if all labels and all predictions are one class.
    """
    from sklearn.metrics import cohen_kappa_score

    targets, predictions = columns(outcomes)
    if np.unique([targets, predictions]).size == 1:
        return float("nan")
    classes = range(int(max(targets.max(), predictions.max())) + 1)
    return float(cohen_kappa_score(targets[:, 0], predictions[:, 0], labels=list(classes), weights="quadratic"))


def farthest(outcome: Outcome, classes: int) -> Outcome:
    """The outcome, an answer that names no label being taken for the class farthest from the label.

    Kappa needs a place on the scale for every answer; leaving the sample out would reward a model for not answering.
    """
    target, prediction = outcome
    if prediction is None:
        prediction = classes - 1 if target < classes - 1 - target else 0
    return Outcome(target, prediction)


def unmapped(outcomes: Sequence[Outcome]) -> int:
    """How many answers name no label."""
    return sum(prediction is None for _, prediction in outcomes)


def confusion(outcomes: Sequence[Outcome], classes: int) -> list[list[int]]:
    """Counts [K][K + 1] of single-label samples: row = label, column = answer, the last column = no label named."""
    counts = np.zeros((classes, classes + 1), dtype=int)
    for target, prediction in outcomes:
        counts[target, classes if prediction is None else prediction] += 1
    return counts.tolist()


class ClassMetrics(NamedTuple):
    """One class by itself. None: not defined, as the AUC of a class without images."""

    images: int
    precision: float | None
    recall: float | None
    f1: float | None
    auc: float | None


def class_metrics(outcomes: Sequence[Outcome], items: Sequence["Probabilities"]) -> list[ClassMetrics]:
    """Each of the K classes against all others.

    Args:
        items: the same samples.
    """
    from sklearn.metrics import roc_auc_score

    targets, predictions = columns(outcomes)
    scores = np.array([item.probabilities for item in items], dtype=float)
    if targets.shape[1] == 1:  # as if each class were a label of its own
        classes = np.arange(scores.shape[1])
        targets, predictions = targets == classes, predictions == classes
    found = []
    for target, prediction, score in zip((targets > 0).T, (predictions > 0).T, scores.T, strict=True):
        right, images, named = int((target & prediction).sum()), int(target.sum()), int(prediction.sum())
        precision, recall = (right / whole if whole else None for whole in (named, images))
        f1 = 2 * right / (images + named) if images + named else None
        area = float(roc_auc_score(target, score)) if 0 < images < len(target) else None
        found.append(ClassMetrics(images, precision, recall, f1, area))
    return found


def columns(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions, int64 [N, 1], multi-label [N, K]; -1 = the answer names no label."""
    targets = np.array([outcome.target for outcome in outcomes], dtype=np.int64).reshape(len(outcomes), -1)
    blank = -1 if targets.shape[1] == 1 else [-1] * targets.shape[1]
    predictions = [blank if prediction is None else prediction for _, prediction in outcomes]
    return targets, np.array(predictions, dtype=np.int64).reshape(targets.shape)


# Probabilities -----------------------------------------------------------------------------------------------------


def probabilities(losses: Sequence[float], kind: str) -> list[float]:
    """Class probabilities from summed negative log-likelihoods (nats) of the possible answers.

    Args:
        losses: one per class. Multi-label: one per label alone, and last that of the answer "no finding".
        kind: `medmnist`'s word.

    Returns:
        K probabilities: softmax(-losses). Labels that may come together do not compete with each other, so each of
        several is set against "no finding" only: p(label) / (p(label) + p(no finding)).
    """
    scores = -np.asarray(losses, dtype=float)
    if kind == MULTI_LABEL:
        odds = scores[:-1] - scores[-1]
        return np.exp(-np.logaddexp(0, -odds)).tolist()
    scores = np.exp(scores - scores.max())
    return (scores / scores.sum()).tolist()


def decide(likely: Sequence[float], kind: str) -> int | list[int]:
    """The class index that `medmnist`'s evaluator reads K probabilities as; multi-label: K zeros and ones."""
    if kind == MULTI_LABEL:
        return [int(value > _THRESHOLD) for value in likely]
    if kind == "binary-class":
        return int(likely[-1] > _THRESHOLD)
    return int(np.argmax(likely))


def auc(items: Sequence[Probabilities]) -> float:
    """`medmnist.evaluator.getAUC`: for two classes the ROC AUC of class 1, else the mean over classes one against rest,
    or over labels.

    NaN, with a warning, if a class has no sample or every sample (say, under `--limit`): it then has no ROC curve.
    """
    from medmnist.evaluator import getAUC

    targets = np.array([item.target for item in items])
    scores = np.array([item.probabilities for item in items], dtype=float)
    members = np.eye(scores.shape[1])[targets] if targets.ndim == 1 else targets
    constant = np.flatnonzero(members.min(axis=0) == members.max(axis=0))
    if len(constant):
        logger.warning("no AUC: of %d samples none or all belong to class %s", len(items), constant.tolist())
        return float("nan")
    return float(getAUC(targets, scores, items[0].kind))


def confidence(items: Sequence[Probabilities]) -> tuple[np.ndarray, np.ndarray]:
    """Stated confidence and whether it came true, float64 [N, 1]: of the most probable class; multi-label [N, K]: of
    each label's being there."""
    likely = np.array([item.probabilities for item in items], dtype=float)
    if items[0].kind == MULTI_LABEL:
        return likely, np.array([item.target for item in items], dtype=float)
    best = likely.argmax(axis=1)
    right = best == np.array([item.target for item in items])
    return likely.max(axis=1)[:, None], right[:, None].astype(float)


def reliability(items: Sequence[Probabilities]) -> list[tuple[float, float, int]]:
    """See `calibration_error.reliability`."""
    return calibration_error.reliability(*confidence(items))


def ece(items: Sequence[Probabilities]) -> float:
    """Expected calibration error (Guo et al., 2017). Multi-label: over all (sample, label) pairs."""
    return calibration_error.calibration_error(*confidence(items))


def nll(items: Sequence[Probabilities]) -> float:
    """Mean negative log-probability (nats) of what came true; multi-label: over all (sample, label) pairs."""
    return float(surprise(items).mean())


def surprise(items: Sequence[Probabilities]) -> np.ndarray:
    """Negative log-probability (nats) of what came true, float64 [N, 1]; multi-label [N, K]: that a label is there, or
    is not. A probability that is 0 in float64 counts as the smallest that is not."""
    likely = np.array([item.probabilities for item in items], dtype=float)
    targets = np.array([item.target for item in items])
    if targets.ndim == 1:
        true = np.take_along_axis(likely, targets[:, None], axis=1)
    else:
        true = np.where(targets > 0, likely, 1 - likely)
    return -np.log(np.maximum(true, np.finfo(float).tiny))
