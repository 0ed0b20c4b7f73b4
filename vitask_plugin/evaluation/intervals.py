"""95% bootstrap intervals of the functions in `metrics`: percentiles over samples drawn with replacement.

A resample is a weight per distinct sample, and every one is written here for many weightings at once: a thousand
calls of `metrics` would take minutes. The tests compare both at equal weights. Samples are sorted first, so that
neither their order nor the number of processes matters.

B resamples, U distinct samples, L labels (1 unless multi-label), C classes (multi-label: 2).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vitask_plugin.calibration_error import BINS, bin_numbers
from vitask_plugin.inference.metrics import MULTI_LABEL, Outcome, Probabilities, columns, confidence, surprise

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
_BLOCK = 4_000_000  # weights held at once

Interval = list[float]  # [low, high]
Weighted = Callable[[np.ndarray], np.ndarray]  # weights float64 [B, U] -> the metric for each [B]
# Samples -> which distinct one each is, int64 [N] of 0 to U - 1, and the metric of any weights of those.
Resampled = Callable[[Sequence[Any]], tuple[np.ndarray, Weighted]]


def interval(metric: str, items: Sequence[Outcome] | Sequence[Probabilities]) -> Interval:
    """The interval of a metric, [low, high] to four digits; NaN where the metric is undefined.

    Resamples in which it is undefined (a class drawn by chance not once has no AUC) are left out.

    Args:
        metric: name of a function of `metrics`, one of `RESAMPLED`.
        items: what that function takes.
    """
    places, weighted = RESAMPLED[metric](items)
    counts = np.bincount(places)
    if np.isnan(weighted(counts[None].astype(float))[0]):
        return [float("nan")] * 2
    return ends(np.concatenate([weighted(weights) for weights in resamples(counts)]))


def ends(values: np.ndarray) -> Interval:
    """The middle `LEVEL` of resampled values, to four digits; NaNs are left out."""
    tail = (1 - LEVEL) / 2
    return [round(float(value), 4) for value in np.nanquantile(values, [tail, 1 - tail])]


def interval_of_mean(intervals: Sequence[Interval]) -> Interval:
    """The interval of the plain mean of independent numbers, from theirs: half-widths add up in squares."""
    low, high = np.array(intervals, dtype=float).T
    middle, half = ((low + high) / 2).mean(), np.linalg.norm((high - low) / 2) / len(intervals)
    return [round(float(value), 4) for value in (middle - half, middle + half)]


def resamples(counts: np.ndarray) -> Iterator[np.ndarray]:
    """How often each distinct sample [U] is drawn, float64 [b, U], until `RESAMPLES` are given."""
    generator = np.random.default_rng(SEED)
    total = int(counts.sum())
    block = max(1, _BLOCK // len(counts))
    for start in range(0, RESAMPLES, block):
        yield generator.multinomial(total, counts / total, min(block, RESAMPLES - start)).astype(float)


def _of_counts(metric: Callable[[np.ndarray], np.ndarray]) -> Resampled:
    """A metric of confusion counts [B, L, C, C + 1], whose last column is "no label named"."""

    def build(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, Weighted]:
        targets, predictions = columns(outcomes)
        labels = targets.shape[1]
        rows, places = np.unique(np.hstack([targets, predictions]), axis=0, return_inverse=True)
        targets, predictions = rows[:, :labels], rows[:, labels:]
        classes = 2 if labels > 1 else int(rows.max()) + 1
        cells = targets * (classes + 1) + np.where(predictions < 0, classes, predictions)
        cells += np.arange(labels) * classes * (classes + 1)
        hot = np.zeros((len(rows), labels * classes * (classes + 1)))
        np.put_along_axis(hot, cells, 1, axis=1)
        return places.ravel(), lambda weights: metric(
            (weights @ hot).reshape(len(weights), labels, classes, classes + 1)
        )

    return build


def _accuracy(counts: np.ndarray) -> np.ndarray:
    return (_diagonal(counts).sum(-1) / counts.sum((-1, -2))).mean(-1)


def _balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    return _mean_of_defined(_diagonal(counts), counts.sum(-1)).mean(-1)


def _macro_f1(counts: np.ndarray) -> np.ndarray:
    right = 2 * _diagonal(counts)
    named = counts.sum(-1) + counts[..., :-1].sum(-2)
    if counts.shape[1] == 1:
        return _mean_of_defined(right, named)[:, 0]
    return np.divide(right, named, out=np.zeros_like(right), where=named > 0)[..., 1].mean(-1)


def _quadratic_kappa(counts: np.ndarray) -> np.ndarray:
    counts = counts[:, 0, :, :-1]
    distance = np.subtract.outer(*[np.arange(counts.shape[-1])] * 2) ** 2
    expected = counts.sum(-1)[:, :, None] * counts.sum(-2)[:, None, :] / counts.sum((-1, -2))[:, None, None]
    expected = (distance * expected).sum((-1, -2))
    seen = (distance * counts).sum((-1, -2))
    return 1 - np.divide(seen, expected, out=np.full_like(seen, np.nan), where=expected > 0)


def _diagonal(counts: np.ndarray) -> np.ndarray:
    return np.diagonal(counts[..., :-1], axis1=-2, axis2=-1)


def _mean_of_defined(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Mean over the last axis of part / whole, without the places where whole is 0."""
    defined = whole > 0
    return np.divide(part, whole, out=np.zeros_like(part), where=defined).sum(-1) / defined.sum(-1)


def _subset_accuracy(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, Weighted]:
    targets, predictions = columns(outcomes)
    if targets.shape[1] == 1:
        return RESAMPLED["accuracy"](outcomes)
    right, places = np.unique((targets == predictions).all(axis=1), return_inverse=True)
    return places, lambda weights: weights @ right / weights.sum(-1)


def _auc(items: Sequence[Probabilities]) -> tuple[np.ndarray, Weighted]:
    """Of each class, the share of (member, other) pairs with the member scored higher, ties counting half."""
    targets, scores, places = _distinct(items)
    members = targets if items[0].kind == MULTI_LABEL else targets == np.arange(scores.shape[1])
    chosen = [scores.shape[1] - 1] if items[0].kind == "binary-class" else range(scores.shape[1])
    curves = []
    for number in chosen:
        order = np.argsort(scores[:, number], kind="stable")
        ranked = scores[order, number]
        curves.append((order, np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]), members[order, number]))

    def weighted(weights: np.ndarray) -> np.ndarray:
        return np.mean([area(weights[:, order], ties, member) for order, ties, member in curves], axis=0)

    def area(weights: np.ndarray, ties: np.ndarray, member: np.ndarray) -> np.ndarray:
        inside = np.add.reduceat(weights * member, ties, axis=1)
        outside = np.add.reduceat(weights * (1 - member), ties, axis=1)
        pairs = inside.sum(-1) * outside.sum(-1)
        won = (inside * (outside.cumsum(-1) - outside / 2)).sum(-1)
        return np.divide(won, pairs, out=np.full_like(won, np.nan), where=pairs > 0)

    return places, weighted


def _ece(items: Sequence[Probabilities]) -> tuple[np.ndarray, Weighted]:
    distinct, places = _distinct_items(items)
    stated, true = confidence(distinct)
    numbers = bin_numbers(stated)
    gaps = np.stack([((true - stated) * (numbers == number)).sum(-1) for number in range(BINS)], axis=-1)
    return places, lambda weights: np.abs(weights @ gaps).sum(-1) / (weights.sum(-1) * stated.shape[1])


def _nll(items: Sequence[Probabilities]) -> tuple[np.ndarray, Weighted]:
    distinct, places = _distinct_items(items)
    own = surprise(distinct).mean(axis=1)
    return places, lambda weights: weights @ own / weights.sum(-1)


def _distinct_items(items: Sequence[Probabilities]) -> tuple[list[Probabilities], np.ndarray]:
    """The distinct samples, sorted, and which each is [N]."""
    targets, scores, places = _distinct(items)
    kind = items[0].kind
    labels = targets.tolist() if kind == MULTI_LABEL else targets[:, 0].tolist()
    return [Probabilities(*pair, kind) for pair in zip(labels, scores.tolist(), strict=True)], places


def _distinct(items: Sequence[Probabilities]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels int64 [U, L] and probabilities float64 [U, K] of the distinct samples, sorted, and which each is [N]."""
    targets = np.array([item.target for item in items], dtype=float).reshape(len(items), -1)
    scores = np.array([item.probabilities for item in items], dtype=float)
    rows, places = np.unique(np.hstack([targets, scores]), axis=0, return_inverse=True)
    return rows[:, : targets.shape[1]].astype(np.int64), rows[:, targets.shape[1] :], places.ravel()


RESAMPLED = {
    "accuracy": _of_counts(_accuracy),
    "subset_accuracy": _subset_accuracy,
    "balanced_accuracy": _of_counts(_balanced_accuracy),
    "macro_f1": _of_counts(_macro_f1),
    "quadratic_kappa": _of_counts(_quadratic_kappa),
    "auc": _auc,
    "ece": _ece,
    "nll": _nll,
}
