"""Thresholds for a wished sensitivity or specificity, and abstention at a wished error rate."""

import numpy as np
import pytest
from scipy.stats import beta

from vitask_plugin.errors import VITaskError
from vitask_plugin.inference import thresholds
from vitask_plugin.inference.calibration import Round, Scored, cross_fitted
from vitask_plugin.inference.thresholds import (
    NEVER,
    abstention,
    abstention_curve,
    abstention_of,
    rate,
    threshold,
    threshold_of,
)
from vitask_plugin.record.calibration import Calibration

TWO = Calibration("t", False, ("ill", "well"), 1.0, (0.0, 0.0))


def screened(count: int, seed: int = 0) -> Scored:
    """A third of the images are ill, and their scores say so, more or less."""
    generator = np.random.default_rng(seed)
    well = (generator.random(count) > 1 / 3).astype(np.int64)
    return Scored(np.c_[np.zeros(count), 2 * well - 1 + generator.standard_normal(count)], well)


def test_rates_have_exact_intervals() -> None:
    found = rate([True] * 19 + [False])
    assert (found.value, found.images) == (0.95, 20)
    assert (found.low, found.high) == pytest.approx((beta.ppf(0.025, 19, 2), beta.ppf(0.975, 20, 1)))
    assert rate([True] * 20).high == 1 and 0.8 < rate([True] * 20).low < 0.85
    assert rate([]) == thresholds.Rate(None, None, None, 0)


def test_thresholds_counted_by_hand() -> None:
    likely = np.array([0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    positive = np.array([1, 1, 0, 1, 0, 1, 0, 0], bool)
    # Three of the four positive ones are at .5 and above; the next one below is .4.
    assert threshold(likely, positive, "sensitivity", 0.75) == pytest.approx(0.45)
    assert threshold(likely, positive, "sensitivity", 0.76) == pytest.approx(0.25)
    assert threshold(likely, positive, "sensitivity", 1.0) == pytest.approx(0.25)
    assert threshold(likely, positive, "specificity", 0.75) == pytest.approx(0.45)
    assert threshold(likely, positive, "specificity", 1.0) == pytest.approx(0.7)
    assert threshold(likely, ~positive, "specificity", 1.0) == NEVER  # the surest of all is no positive one
    assert threshold(likely[:2], positive[:2], "specificity", 0.5) is None
    low, high = 0.3, np.nextafter(0.3, 1)
    assert threshold(np.array([low, high]), np.array([False, True]), "sensitivity", 1.0) == high


@pytest.mark.parametrize("aim", ["sensitivity", "specificity"])
@pytest.mark.parametrize("wished", [0.8, 0.95, 1.0])
def test_a_threshold_reaches_what_is_wished_and_no_more_than_needed(aim: str, wished: float) -> None:
    images = screened(300)
    rounds = list(cross_fitted(TWO, images, range(300)))
    found = threshold_of(TWO, images, rounds, "ill", aim, wished)
    own, other = getattr(found, aim), getattr(found, ({"sensitivity", "specificity"} - {aim}).pop())
    assert wished <= own.value < wished + 1 / own.images + 1e-9
    assert own.images + other.images == 300 and own.low < own.value and 0 < other.value < 1
    likely, ill = TWO.probabilities(images.scores)[:, 0], images.targets == 0
    decided = likely >= found.value
    assert found.sensitivity.value == decided[ill].mean() and found.specificity.value == (~decided[~ill]).mean()
    assert found.held_out[aim].images == own.images
    assert found.held_out[aim].value == pytest.approx(wished, abs=0.05)


def test_the_interval_covers_the_sensitivity_on_all_there_is() -> None:
    """Chosen on 120 images, and judged by 20,000 others: 19 times of 20 or so, though it was chosen on the very images
    that the interval is of."""
    everyone = screened(20_000, seed=10_000)
    likely, ill = TWO.probabilities(everyone.scores)[:, 0], everyone.targets == 0
    covered = 0
    for seed in range(200):
        found = threshold_of(TWO, screened(120, seed), [], "ill", "sensitivity", 0.9)
        covered += found.sensitivity.low <= (likely[ill] >= found.value).mean() <= found.sensitivity.high
    assert covered / 200 >= 0.92


def test_held_out_rates_are_of_the_images_of_the_rounds() -> None:
    images, others = screened(200), screened(400, seed=5)
    found = threshold_of(TWO, images, [Round(TWO, images, others)], "ill", "sensitivity", 0.9)
    ill = others.targets == 0
    expected = (TWO.probabilities(others.scores)[ill, 0] >= found.value).mean()
    assert found.held_out["sensitivity"].value == expected != found.sensitivity.value
    assert found.held_out["specificity"].images == (~ill).sum()
    with pytest.raises(VITaskError, match="no image of class 'ill', so nothing tells the sensitivity"):
        threshold_of(TWO, images.of(images.targets == 1), [], "ill", "sensitivity", 0.9)


def test_the_abstention_curve_counted_by_hand() -> None:
    largest = np.array([0.9, 0.6, 0.8, 0.8, 0.5])
    right = np.array([True, False, True, False, True])
    curve = abstention_curve(largest, right)
    assert curve.values == pytest.approx([0.85, 0.7, 0.55, 0.25])  # the two of .8 are answered together
    assert curve.answered == pytest.approx([0.2, 0.6, 0.8, 1.0])
    assert curve.error == pytest.approx([0, 1 / 3, 1 / 2, 2 / 5])
    assert abstention(largest, right, 0.0) == pytest.approx(0.85)
    assert abstention(largest, right, 0.4) == pytest.approx(0.25)  # all, though three quarters would be worse
    assert abstention(largest, ~right, 0.1) == NEVER


def test_abstention_keeps_to_the_wished_error_where_it_was_chosen() -> None:
    images = screened(400)
    rounds = list(cross_fitted(TWO, images, range(400)))
    answered = 1.0
    for wished in (0.12, 0.08, 0.04):
        found = abstention_of(TWO, images, rounds, wished)
        assert found.error.value <= wished and found.error.high > wished
        assert found.answered.value < answered and found.error.images == round(found.answered.value * 400)
        assert found.held_out["answered"].images == 400
        assert found.held_out["error"].value == pytest.approx(wished, abs=0.04)
        answered = found.answered.value
    none = abstention_of(TWO, Scored(images.scores, 1 - images.targets), rounds, 0.01)
    assert none.value == NEVER and none.error.value is None and none.answered.value == 0
    several = Calibration("m", False, ("a",), 1.0, (0.0, 0.0), multi_label=True)
    with pytest.raises(VITaskError, match="several labels to an image"):
        abstention_of(several, Scored(images.scores, images.targets[:, None]), rounds, 0.1)
