"""Differences between two models that were judged on the same samples: intervals and p-values.

Several trainings of each, with the same seeds, are compared over the seeds; one training of each over the samples. The
first says what another training would give, the second what other images would give to these very weights.

N samples, P pairs of models.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vitask_plugin.evaluation.intervals import LEVEL, RESAMPLED, Interval, Weighted, ends, resamples

FEWEST_SEEDS = 3  # pairs that an interval over seeds needs: with two, Student's t is 12.7


class OverSeeds(NamedTuple):
    """The mean of paired differences, its 95% interval and two-sided p-value.

    `interval` and `p` are None where all differences are equal, as nothing is known of their spread then.
    """

    mean: float
    interval: Interval | None
    p: float | None


def over_seeds(differences: Sequence[float]) -> OverSeeds:
    """The paired t-test of the differences of at least `FEWEST_SEEDS` pairs of trainings."""
    values = np.asarray(differences, dtype=float)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return OverSeeds(mean, None, None)
    free = len(values) - 1
    half = float(stats.t.ppf((1 + LEVEL) / 2, free)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, free))
    return OverSeeds(mean, [round(mean - half, 4), round(mean + half, 4)], p)


def over_samples(metric: str, pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> Interval:
    """The 95% paired bootstrap interval of the second's metric less the first's, the mean over pairs of models.

    Each resample draws images, and takes of every model what it answered to just these.

    Args:
        metric: name of a function of `metrics`, one of `intervals.RESAMPLED`.
        pairs: P of [N] and [N] of what that function takes; place n is the same image everywhere.
    """
    sides = [RESAMPLED[metric](side) for pair in pairs for side in pair]
    # Images that all models answered alike weigh together.
    rows, counts = np.unique(np.stack([places for places, _ in sides], axis=1), axis=0, return_counts=True)
    signs = np.tile([-1, 1], len(pairs)) / len(pairs)
    values = [
        sum(sign * _of(weights, rows[:, side], sides[side][1]) for side, sign in enumerate(signs))
        for weights in resamples(counts)
    ]
    return ends(np.concatenate(values))


def _of(weights: np.ndarray, places: np.ndarray, weighted: Weighted) -> np.ndarray:
    """One side's metric [B] from the weights [B, J] of joint answers, whose own distinct answer is `places` [J]."""
    order = np.argsort(places, kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    return weighted(np.add.reduceat(weights[:, order], starts, axis=1))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided p-value of McNemar's test: are both equally often right? [N] and [N], the same images."""
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for there being several (Holm, 1979), in the order given; None stays None, and is no test."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[place] = largest
    return corrected
