"""Paired differences: hand-made figures, and plain resampling of images, one at a time."""

import numpy as np
import pytest
from outcomes import decided, draw

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.evaluation import intervals, paired
from vitask_plugin.inference import metrics


def test_over_seeds_by_hand() -> None:
    found = paired.over_seeds([0.01, 0.05, 0.03])
    # Standard error .02 / sqrt(3), t(.975, 2) = 4.3027; t = 2.598 with 2 degrees of freedom.
    assert found.mean == pytest.approx(0.03) and found.interval == [-0.0197, 0.0797]
    assert found.p == pytest.approx(0.1217, abs=1e-4)
    # Exact in binary, so that their spread is 0.
    assert paired.over_seeds([0.25] * 3) == (0.25, None, None)


def test_mcnemar_by_hand() -> None:
    first = [True] * 9 + [False] + [True] * 5 + [False] * 5
    second = [False] * 9 + [True] + [True] * 5 + [False] * 5
    # Of 10 images that one alone has right, 1 is the second's: 2 (1 + 10) / 2 ** 10.
    assert paired.mcnemar(first, second) == paired.mcnemar(second, first) == pytest.approx(22 / 1024)
    assert paired.mcnemar(first, first) == 1


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert paired.holm([0.9, 0.8]) == [1, 1] and paired.holm([None]) == [None]


def two_models(figure: str, kind: str, classes: int) -> tuple[list, list]:
    """Two that answer most images alike; 120 images, of which answers in words may name no label."""
    first = draw(kind, classes, 120)
    other = draw(kind, classes, 120, seed=1)
    kept = np.random.default_rng(2).random(120) < 0.7
    second = [
        a if keep else a._replace(probabilities=b.probabilities) for a, b, keep in zip(first, other, kept, strict=True)
    ]
    if figure == "auc":
        return first, second
    return decided(first, 0.1), decided(second)


@pytest.mark.parametrize(
    ("figure", "kind", "classes"),
    [
        ("subset_accuracy", "multi-class", 4),
        ("macro_f1", "multi-class", 4),
        ("subset_accuracy", MULTI_LABEL, 3),
        ("macro_f1", MULTI_LABEL, 3),
        ("auc", "binary-class", 2),
    ],
)
def test_over_samples_is_what_plain_resampling_gives(figure: str, kind: str, classes: int) -> None:
    first, second = two_models(figure, kind, classes)
    evaluate = getattr(metrics, figure)
    generator = np.random.default_rng(3)
    values = []
    for _ in range(200):
        drawn = generator.integers(0, len(first), len(first))
        values.append(evaluate([second[i] for i in drawn]) - evaluate([first[i] for i in drawn]))
    low, high = np.quantile(values, [0.025, 0.975])
    found = paired.over_samples(figure, [(first, second)])
    # Both are of random resamples; an interval that forgets the pairing is half as wide again.
    near = 0.2 * (high - low)
    assert found == pytest.approx([low, high], abs=near)
    assert paired.over_samples(figure, [(second, first)]) == pytest.approx([-high, -low], abs=near)
    assert paired.over_samples(figure, [(first, first)]) == [0, 0]
    # Neither the order of the images nor the number of processes matters.
    assert paired.over_samples(figure, [(first[::-1], second[::-1])]) == found


def test_over_samples_of_two_trainings_is_that_of_their_mean() -> None:
    first, second = two_models("macro_f1", "multi-class", 4)
    one = paired.over_samples("macro_f1", [(first, second)])
    assert paired.over_samples("macro_f1", [(first, second)] * 2) == one
    both = paired.over_samples("macro_f1", [(first, second), (second, first)])
    assert both == [0, 0]
    assert one[0] < metrics.macro_f1(second) - metrics.macro_f1(first) < one[1]


def test_a_pairing_is_worth_something() -> None:
    first, second = two_models("subset_accuracy", "multi-class", 4)
    low, high = paired.over_samples("subset_accuracy", [(first, second)])
    ends = [intervals.interval("accuracy", side) for side in (first, second)]
    apart = np.linalg.norm([end[1] - end[0] for end in ends])
    assert high - low < 0.75 * apart
