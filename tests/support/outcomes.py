"""Drawn samples with probabilities, and what is decided from them."""

import numpy as np

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome, Probabilities


def draw(kind: str, classes: int, count: int = 200, seed: int = 0) -> list[Probabilities]:
    """Samples whose probabilities lean towards their label; rounded, so that there are ties."""
    generator = np.random.default_rng([seed, classes])
    if kind == MULTI_LABEL:
        targets = generator.integers(0, 2, (count, classes))
        scores = 0.6 * generator.random((count, classes)) + 0.3 * targets
    else:
        targets = generator.integers(0, classes, count)
        scores = generator.dirichlet(np.ones(classes), count)
        scores[np.arange(count), targets] += 0.3
        scores /= scores.sum(axis=1, keepdims=True)
    pairs = zip(targets.tolist(), scores.round(2).tolist(), strict=True)
    return [Probabilities(target, likely, kind) for target, likely in pairs]


def decided(items: list[Probabilities], unmapped: float = 0.0) -> list[Outcome]:
    generator = np.random.default_rng(1)
    found = [Outcome(item.target, metrics.decide(item.probabilities, item.kind)) for item in items]
    return [Outcome(one.target, None) if generator.random() < unmapped else one for one in found]
