"""Temperature and bias of label scores: that they are found again where they are known, and not invented where not."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.errors import VITaskError
from vitask_plugin.inference import calibration, metrics
from vitask_plugin.inference.calibration import Scored, choose, chosen_fit, cross_fitted, fit, folds, losses, untouched
from vitask_plugin.inference.metrics import Probabilities
from vitask_plugin.record.calibration import Calibration

BIAS = np.array([1.2, -0.4, -1.0, 0.2])  # sums to 0: of a softmax only differences are known
BLANK = Calibration("t", False, ("a", "b", "c", "d"), 1.0, (0.0,) * 4)
SEVERAL = Calibration("m", False, ("a", "b", "c"), 1.0, (0.0,) * 4, multi_label=True)


def drawn(count: int, temperature: float = 3.0, bias: np.ndarray = BIAS, seed: int = 0) -> Scored:
    """Labels drawn from softmax(scores / temperature + bias); each image's scores have another level, as likelihoods
    of words do."""
    generator = np.random.default_rng(seed)
    log_odds = 1.5 * generator.standard_normal((count, 4))
    targets = np.array([generator.choice(4, p=own) for own in softmax(log_odds, axis=1)])
    return Scored(temperature * (log_odds - bias) - 40 * generator.random((count, 1)), targets)


def drawn_several(count: int) -> Scored:
    """The same of three labels that come independently, the last column being "no finding"."""
    generator = np.random.default_rng(3)
    log_odds = 1.5 * generator.standard_normal((count, 3))
    targets = (generator.random((count, 3)) < expit(log_odds)).astype(np.int64)
    none = -40 * generator.random((count, 1))
    return Scored(np.hstack([3 * (log_odds - [0.8, 0.0, -0.5]) + none, none]), targets)


def ece(found: Calibration, images: Scored) -> float:
    likely = found.probabilities(images.scores).tolist()
    kind = MULTI_LABEL if found.multi_label else "multi-class"
    return metrics.ece([Probabilities(*pair, kind) for pair in zip(images.targets.tolist(), likely, strict=True)])


def test_a_known_temperature_and_bias_are_found_again() -> None:
    images = drawn(4000)
    found, choice = chosen_fit(BLANK, images, range(4000))
    assert choice.bias and choice.gain > 10 * choice.error
    assert found.temperature == pytest.approx(3.0, rel=0.05)
    assert found.bias == pytest.approx(BIAS, abs=0.12) and sum(found.bias) == pytest.approx(0, abs=1e-6)
    others = drawn(4000, seed=1)
    before, after = ece(BLANK, others), ece(found, others)
    assert before > 0.15 and after < 0.03
    assert losses(found, others).mean() < losses(BLANK, others).mean() - 0.5


@pytest.mark.parametrize("count", [78, 4000])
def test_it_is_the_minimum_of_loss_and_prior(count: int) -> None:
    images = drawn(count)
    found = fit(BLANK, images, bias=True)
    assert fit(BLANK, images, bias=True) == found

    def penalised(step: np.ndarray) -> float:
        """A step away: the loss, and half the square of each number in standard deviations of 1 nat."""
        point = np.r_[np.log(found.temperature), found.bias] + step
        own = Calibration("t", False, BLANK.classes, float(np.exp(point[0])), tuple(point[1:]))
        return losses(own, images).sum() + (point**2).sum() / 2

    assert all(penalised(0.01 * step) > penalised(np.zeros(5)) for step in (*np.eye(5), *-np.eye(5)))


def test_several_labels_have_one_temperature_and_a_bias_each() -> None:
    images = drawn_several(3000)
    found, choice = chosen_fit(SEVERAL, images, range(3000))
    assert choice.bias and found.temperature == pytest.approx(3.0, rel=0.06)
    assert found.bias == pytest.approx([0.8, 0.0, -0.5, 0.0], abs=0.12) and found.bias[-1] == 0
    assert ece(found, images) < 0.02 < 0.1 < ece(SEVERAL, images)
    kept = metrics.probabilities((-images.scores[7]).tolist(), MULTI_LABEL)
    assert SEVERAL.probabilities(images.scores[7]) == pytest.approx(kept)


def test_uncalibrated_is_what_the_score_tasks_compute() -> None:
    images = drawn(20)
    for scores, own in zip(images.scores, BLANK.probabilities(images.scores), strict=True):
        assert own == pytest.approx(metrics.probabilities((-scores).tolist(), "multi-class"), abs=1e-12)


def test_a_temperature_alone_changes_no_answer() -> None:
    images = drawn(500)
    found = fit(BLANK, images, bias=False)
    assert found.bias == (0.0,) * 4 and found.temperature > 2
    before, after = BLANK.probabilities(images.scores), found.probabilities(images.scores)
    assert np.array_equal(before.argmax(axis=1), after.argmax(axis=1)) and np.abs(before - after).max() > 0.1
    assert ece(found, images) < ece(BLANK, images)
    assert fit(BLANK, images, bias=True).probabilities(images.scores).argmax(1).tolist() != after.argmax(1).tolist()


def test_a_bias_that_is_chance_is_left_out() -> None:
    """78 images without one: by chance it is taken in few draws, and with one, in all."""
    nothing, something = np.zeros(4), np.array([2.5, -0.5, -1.0, -1.0])
    taken = [chosen_fit(BLANK, drawn(78, 2.0, nothing, seed), range(78))[1].bias for seed in range(20)]
    assert sum(taken) <= 4
    assert all(chosen_fit(BLANK, drawn(78, 2.0, something, seed), range(78))[1].bias for seed in range(5))


def test_images_of_one_patient_do_not_make_chance_into_a_bias() -> None:
    """40 patients with ten images each that are nearly the same: there is no more to learn from than of 40 images."""
    patients, noise = np.repeat(np.arange(40), 10), np.random.default_rng(0)
    taken = []
    for seed in range(20):
        own = drawn(40, 2.0, np.zeros(4), seed)
        images = own.of(patients)
        images = images._replace(scores=images.scores + 0.01 * noise.standard_normal(images.scores.shape))
        taken.append(chosen_fit(BLANK, images, patients.tolist())[1])
    assert sum(one.bias for one in taken) <= 2
    # Over images that are each by themselves it is the plain standard error, and copies make it no smaller.
    images = drawn(60)
    places = folds(images.targets, range(60))
    single = choose(BLANK, images, places, range(60))
    doubled = choose(BLANK, images.of(np.repeat(np.arange(60), 2)), [_twice(place) for place in places], _pairs(60))
    gain = np.zeros(60)
    for place in places:
        kept = images.of(np.setdiff1d(np.arange(60), place))
        alone, both = (losses(fit(BLANK, kept, bias=bias), images.of(place)) for bias in (False, True))
        gain[place] = alone - both
    assert single.error == pytest.approx(gain.std(ddof=1) / np.sqrt(60))
    assert doubled.error == pytest.approx(single.error, rel=0.25)  # less of the prior is felt of twice as many


def _pairs(count: int) -> list[int]:
    return np.repeat(np.arange(count), 2).tolist()


def _twice(place: np.ndarray) -> np.ndarray:
    return np.sort(np.r_[2 * place, 2 * place + 1])


def test_a_class_without_images_and_scores_that_are_all_right_stay_finite() -> None:
    images = drawn(60)
    without = images.of(images.targets != 2)
    found = fit(BLANK, without, bias=True)
    assert -4 < found.bias[2] < min(found.bias[0], found.bias[1], found.bias[3])
    right = Scored(50 * np.eye(4)[[0, 1, 2, 3] * 10], np.array([0, 1, 2, 3] * 10))
    sure = fit(BLANK, right, bias=True)
    assert 0.5 < sure.temperature <= 1.01 and np.abs(sure.bias).max() < 1e-3


def test_held_out_images_have_no_part_in_what_they_are_judged_by() -> None:
    images = drawn(100)
    rounds = list(cross_fitted(BLANK, images, range(100)))
    assert len(rounds) == calibration.FOLDS and sum(len(one.judged.targets) for one in rounds) == 100
    for place, one in zip(folds(images.targets, range(100)), rounds, strict=True):
        assert np.array_equal(one.judged.scores, images.scores[place]) and len(one.fitted.targets) == 80
        # Other labels of the images held out change nothing of the calibration that they are judged by.
        changed = images.targets.copy()
        assert one.calibration == fit(BLANK, one.fitted, bias=any(one.calibration.bias))
        changed[place] = (changed[place] + 1) % 4
        again = fit(BLANK, Scored(images.scores, changed).of(np.setdiff1d(np.arange(100), place)), bias=False)
        assert again == fit(BLANK, one.fitted, bias=False)


def test_images_of_one_patient_are_in_one_fold_and_classes_are_spread() -> None:
    targets, patients = np.arange(120) % 3, np.arange(120) // 4
    held = folds(targets, patients.tolist())
    assert sorted(np.concatenate(held).tolist()) == list(range(120))
    for left_out in held:
        assert set(patients[left_out]).isdisjoint(set(np.delete(patients, left_out)))
        assert np.bincount(targets[left_out], minlength=3).min() >= 5
    with pytest.raises(VITaskError, match="at least 20 images, or groups of images, and there are 19"):
        folds(targets[:76], patients[:76].tolist())
    assert len(folds(np.arange(24) // 3, range(24))) == 5  # eight classes of three images


@pytest.mark.parametrize(
    ("scores", "message"),
    [([[0.0, 1.0]], "is for 4 label scores to an image"), ([[0.0, 1.0, 2.0, np.inf]], "not finite"), (1.0, "shape")],
)
def test_scores_that_are_not_of_the_labels_are_refused(scores: object, message: str) -> None:
    with pytest.raises(VITaskError, match=message):
        BLANK.probabilities(scores)


def test_another_label_set_or_order_is_refused() -> None:
    BLANK.check_classes(["a", "b", "c", "d"])
    for other in (["b", "a", "c", "d"], ["a", "b", "c"]):
        with pytest.raises(VITaskError, match="calibrate again with data of these labels in this order"):
            BLANK.check_classes(other)


def test_untouched_says_what_the_scores_say() -> None:
    assert untouched(Calibration("t", True, ("a", "b"), 3.0, (1.0, -1.0))).bias == (0.0, 0.0)
    assert untouched(SEVERAL).bias == (0.0,) * 4
