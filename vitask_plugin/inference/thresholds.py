"""From which probability on an image counts as positive, or an answer is given at all, chosen for a wished rate.

N = images.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from vitask_plugin.errors import VITaskError
from vitask_plugin.inference.calibration import Round, Scored
from vitask_plugin.record.calibration import Abstention, Calibration, Rate, Threshold

NEVER = 1.5  # a threshold that no probability reaches
LEVEL = 0.95


def rate(true: np.ndarray | Sequence[bool]) -> Rate:
    """The share of `true` [n] with its exact 95% interval (Clopper and Pearson, 1934)."""
    count, images = int(np.sum(true)), len(true)
    if not images:
        return Rate(None, None, None, 0)
    found = binomtest(count, images).proportion_ci(LEVEL, "exact")
    return Rate(count / images, float(found.low), float(found.high), images)


def threshold(likely: np.ndarray, positive: np.ndarray, aim: str, wished: float) -> float | None:
    """Which probability to ask for, that the wished sensitivity or specificity is reached on these images.

    Of those that reach it, the one with the most of the other rate. It lies midway between two images' probabilities,
    so that rounding in another batch changes none of the decisions; above 1 none is positive.

    Args:
        likely: probabilities of the positive class, float64 [N]. positive: whether an image is one, bool [N].
        aim: sensitivity or specificity. wished: 0 < wished <= 1.

    Returns:
        None where no image is of the kind that the rate is of.
    """
    own = np.sort(likely[positive])[::-1] if aim == "sensitivity" else np.sort(likely[~positive])
    if not len(own):
        return None
    last = own[math.ceil(wished * len(own) - 1e-9) - 1]  # of those that have to be on the right side
    if aim == "sensitivity":
        lower = likely[likely < last]
        return float(_midway(lower.max() if len(lower) else 0.0, last))
    higher = likely[likely > last]
    return float(_midway(last, higher.min())) if len(higher) else NEVER


def _midway(low: Any, high: Any) -> Any:
    """Between two numbers; between neighbours among float64 there is none, so the upper one."""
    middle = (low + high) / 2
    return np.where(middle > low, middle, high)


def decided(likely: np.ndarray, positive: np.ndarray, value: float) -> dict[str, np.ndarray]:
    """Which positive images are found (sensitivity), and which others are not taken for one (specificity), bool [n]."""
    found = likely >= value
    return {"sensitivity": found[positive], "specificity": ~found[~positive]}


class Curve(NamedTuple):
    """What is answered and what is wrong among that, from a threshold on: float64 [T], falling thresholds."""

    values: np.ndarray
    answered: np.ndarray
    error: np.ndarray


def abstention_curve(largest: np.ndarray, right: np.ndarray) -> Curve:
    """The curve over all thresholds that make a difference.

    Args:
        largest: probability of the likeliest class, float64 [N]. right: whether that is the label, bool [N].
    """
    order = np.argsort(-largest, kind="stable")
    ranked, wrong = largest[order], np.cumsum(~right[order])
    ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])  # images of one probability go together
    counts, last = ends + 1, ranked[ends]
    return Curve(_midway(np.r_[last[1:], 0.0], last), counts / len(ranked), wrong[ends] / counts)


def abstention(largest: np.ndarray, right: np.ndarray, wished: float) -> float:
    """The threshold at which the most images are answered, of those with at most the wished share of wrong ones among
    the answered; above 1 where there is none. See `abstention_curve`."""
    curve = abstention_curve(largest, right)
    reached = np.flatnonzero(curve.error <= wished)
    return float(curve.values[reached[-1]]) if len(reached) else NEVER


# Of a calibration ------------------------------------------------------------------------------------------------


def threshold_of(
    calibration: Calibration, images: Scored, rounds: Sequence[Round], positive: str, aim: str, wished: float
) -> Threshold:
    """A threshold on the calibrated probability of a class, chosen on the images, and judged by those of each round at
    a threshold that was chosen on the round's own.

    Raises:
        VITaskError: no image is of the kind that the rate is of.
    """
    number = calibration.classes.index(positive)
    value = threshold(*_of_class(calibration, images, number), aim, wished)
    if value is None:
        lacking = f"image of class {positive!r}" if aim == "sensitivity" else f"image without class {positive!r}"
        raise VITaskError(
            f"task {calibration.task!r}: the validation data has no {lacking}, so nothing tells the {aim}; give data "
            "that has some, or another --positive"
        )
    here = {name: rate(right) for name, right in decided(*_of_class(calibration, images, number), value).items()}
    found = {name: [np.zeros(0, bool)] for name in here}
    for one in rounds:
        own = threshold(*_of_class(one.calibration, one.fitted, number), aim, wished)
        if own is not None:
            for name, right in decided(*_of_class(one.calibration, one.judged, number), own).items():
                found[name].append(right)
    held_out = {name: rate(np.concatenate(parts)) for name, parts in found.items()}
    return Threshold(positive, aim, wished, value, **here, held_out=held_out)


def _of_class(calibration: Calibration, images: Scored, number: int) -> tuple[np.ndarray, np.ndarray]:
    positive = images.targets[:, number] > 0 if calibration.multi_label else images.targets == number
    return calibration.probabilities(images.scores)[:, number], positive


def abstention_of(calibration: Calibration, images: Scored, rounds: Sequence[Round], wished: float) -> Abstention:
    """From which probability on answers are given, chosen and judged as `threshold_of` does.

    Raises:
        VITaskError: several labels to an image, of which none is the answer.
    """
    if calibration.multi_label:
        raise VITaskError(
            f"task {calibration.task!r} has several labels to an image, so it gives no one answer that could be kept "
            "back; leave --error-rate out"
        )
    value = abstention(*_surest(calibration, images), wished)
    error, answered = [], []
    for one in rounds:
        own = abstention(*_surest(one.calibration, one.fitted), wished)
        largest, right = _surest(one.calibration, one.judged)
        error.append(~right[largest >= own])
        answered.append(largest >= own)
    largest, right = _surest(calibration, images)
    held_out = {"error": rate(np.concatenate(error)), "answered": rate(np.concatenate(answered))}
    return Abstention(wished, value, rate(~right[largest >= value]), rate(largest >= value), held_out)


def _surest(calibration: Calibration, images: Scored) -> tuple[np.ndarray, np.ndarray]:
    likely = calibration.probabilities(images.scores)
    return likely.max(axis=1), likely.argmax(axis=1) == images.targets
