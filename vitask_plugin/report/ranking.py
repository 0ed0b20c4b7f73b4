"""Response ranking (the paper's figure 3): how likely is a response given its own image, and given a negative one?

A negative image is, as in contrastive response tuning, one with the same instruction and another response. A task that
scores labels gives log p(label c | image j) for every image j and label c, so every negative pair of the split is
there: c is the response of some image, and j any image whose label is not c. None has to be drawn at random; a pair is
weighted by how often drawing would give it.

N images, K labels.
"""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity

POINTS = 400
_TAIL = 0.005  # of positive and of negative pairs may lie outside either end of the grid


class Ranking(NamedTuple):
    """Densities over `grid` (nats) of positive and of negative pairs.

    Attributes:
        overlap: area under the lower of both densities: 1 = the image makes no difference, 0 = apart.
        ranked: how often a response is more likely given its own image than given a negative one; ties count half.
        images: how many images have a response that some other image does not.
    """

    grid: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    overlap: float
    ranked: float
    images: int


def response_ranking(likelihoods: np.ndarray, members: np.ndarray) -> Ranking | None:
    """The ranking of all pairs; None if a likelihood is no number or no label has a positive and a negative image.

    Args:
        likelihoods: float [N, K], log p(label | image), nats.
        members: bool [N, K], whether the label is the image's.
    """
    counts = members.sum(axis=0)
    usable = (counts > 0) & (counts < len(members))
    if not usable.any() or not np.isfinite(likelihoods).all():
        return None
    likelihoods, members, counts = likelihoods[:, usable], members[:, usable], counts[usable]
    # Each of the n positive pairs of a label meets each of its negative images equally often.
    weights = np.where(members, 1.0, counts / (len(members) - counts))
    values = (likelihoods[members], likelihoods[~members])
    shares = (weights[members], weights[~members])
    ends = [np.quantile(x, (_TAIL, 1 - _TAIL)) for x in values]
    low, high = min(float(end[0]) for end in ends), max(float(end[1]) for end in ends)
    width = max(high - low, 1e-6)
    floor = 2 * width / POINTS  # what the grid can resolve
    # Scott's rule, for both with the count of the smaller: pairs that are distributed alike then overlap wholly.
    count = min(w.sum() ** 2 / (w**2).sum() for w in shares)
    bandwidths = [max(_deviation(x, w) * count ** (-1 / 5), floor) for x, w in zip(values, shares, strict=True)]
    margin = 3 * max(bandwidths)
    grid = np.linspace(low - margin, high + margin, POINTS)
    positive, negative = (
        _density(x, w, bandwidth, grid) for x, w, bandwidth in zip(values, shares, bandwidths, strict=True)
    )
    step = grid[1] - grid[0]
    # Both are normalized on the grid: what lies outside belongs to neither figure.
    positive, negative = positive / (positive.sum() * step), negative / (negative.sum() * step)
    overlap = float(np.minimum(positive, negative).sum() * step)
    ranked = [roc_auc_score(members[:, label], likelihoods[:, label]) for label in range(len(counts))]
    return Ranking(grid, positive, negative, overlap, float(np.average(ranked, weights=counts)), int(counts.sum()))


def _deviation(values: np.ndarray, weights: np.ndarray) -> float:
    mean = np.average(values, weights=weights)
    return float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))


def _density(values: np.ndarray, weights: np.ndarray, bandwidth: float, grid: np.ndarray) -> np.ndarray:
    # A tenth of the bandwidth is finer than the estimate: large sets cost no more than small ones.
    places, index = np.unique(np.round(values / (bandwidth / 10)), return_inverse=True)
    masses = np.bincount(index.ravel(), weights=weights)
    kernel = KernelDensity(bandwidth=bandwidth).fit(places[:, None] * (bandwidth / 10), sample_weight=masses)
    return np.exp(kernel.score_samples(grid[:, None]))
