"""Temperature and bias of label scores, fitted on validation images, and what they are worth on images held out.

Temperature scaling (Guo et al., 2017) changes how sure all answers are, a bias per class (contextual calibration, Zhao
et al., 2021) also which label is the likeliest. A validation set may hold 78 images, so both are kept near "no change"
by a prior, and the bias is taken only where cross-validation says that it is more than chance.

Shapes: N = images, C = columns of the scores, K = classes (see `record.calibration`).
"""

import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp, softmax
from sklearn.model_selection import StratifiedGroupKFold

from vitask_plugin.errors import VITaskError
from vitask_plugin.record.calibration import Calibration

FOLDS = 5
FEWEST = 20  # images, or groups of them: of fewer, a fold of five would hold three
# Standard deviation of the normal prior of log(temperature) and of each bias, in nats. Of hundreds of images nothing is
# felt of it; of a class without an image it keeps the bias finite, and where all are right the temperature above 0.
PRIOR = 1.0
SEED = 0  # of the folds


class Scored(NamedTuple):
    """Images of one task: scores float64 [N, C], and targets, int64 [N] or of several labels zeros and ones [N, K]."""

    scores: np.ndarray
    targets: np.ndarray

    def of(self, images: np.ndarray) -> "Scored":
        return Scored(self.scores[images], self.targets[images])


class Round(NamedTuple):
    """A calibration, the images that it was fitted on, and others that it is judged by."""

    calibration: Calibration
    fitted: Scored
    judged: Scored


@dataclass(frozen=True)
class Choice:
    """Whether a bias is fitted, and why. Nats per image on the images that each fold left out.

    Attributes:
        bias: whether.
        temperature_nll, bias_nll: the mean with a temperature alone, and with a bias too.
        gain, error: by how much the second is less, and the standard error of that over units.
    """

    bias: bool
    temperature_nll: float
    bias_nll: float
    gain: float
    error: float


def untouched(calibration: Calibration) -> Calibration:
    """The same with a temperature of 1 and no bias: what the scores say by themselves."""
    return replace(calibration, temperature=1.0, bias=(0.0,) * (len(calibration.classes) + calibration.multi_label))


def losses(calibration: Calibration, images: Scored) -> np.ndarray:
    """Negative log-likelihood (nats) of each image's label, float64 [N]; of several labels the sum over them."""
    scaled, targets = calibration.scaled(images.scores), images.targets
    if calibration.multi_label:
        odds = scaled[:, :-1] - scaled[:, -1:]
        return -np.where(targets > 0, log_expit(odds), log_expit(-odds)).sum(axis=1)
    return logsumexp(scaled, axis=1) - np.take_along_axis(scaled, targets[:, None], axis=1)[:, 0]


def fit(calibration: Calibration, images: Scored, *, bias: bool) -> Calibration:
    """The calibration with the likeliest temperature, and bias if there is to be one; the same for the same images.

    Args:
        calibration: of the same task; its own numbers do not matter.
    """
    blank, several = untouched(calibration), calibration.multi_label
    scores = blank.scaled(images.scores)
    # Of one label only differences count, and of several "no finding" is what each is set against.
    values = scores[:, :-1] - scores[:, -1:] if several else scores - scores.max(axis=1, keepdims=True)
    hot = images.targets.astype(float) if several else np.eye(values.shape[1])[images.targets]

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        """Of log(temperature) and the biases [1 + K]: loss plus prior, and its slope."""
        sharpness = np.exp(-point[0])
        scaled = values * sharpness + point[1:]
        if several:
            loss = -np.where(hot > 0, log_expit(scaled), log_expit(-scaled)).sum()
            excess = expit(scaled) - hot
        else:
            loss = (logsumexp(scaled, axis=1) - (scaled * hot).sum(axis=1)).sum()
            excess = softmax(scaled, axis=1) - hot
        slope = np.r_[-(excess * values).sum() * sharpness, excess.sum(axis=0) * bias]
        return loss + (point**2).sum() / 2 / PRIOR**2, slope + point / PRIOR**2

    start = np.zeros(1 + values.shape[1])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-8}).x
    offsets = (*found[1:].tolist(), *(0.0,) * several)
    return replace(blank, temperature=float(np.exp(found[0])), bias=offsets if bias else blank.bias)


def folds(targets: np.ndarray, units: Sequence[Hashable]) -> list[np.ndarray]:
    """The images [n] that each of `FOLDS` folds leaves out; those of one unit (patient, copies) are in one fold.

    The classes have nearly the same shares in each; of several labels, how many of them an image has.

    Raises:
        VITaskError: fewer than `FEWEST` units.
    """
    numbers = _numbered(units)
    if (found := len(set(numbers))) < FEWEST:
        raise VITaskError(
            f"a calibration is fitted on at least {FEWEST} images, or groups of images, and there are {found}; "
            "give more validation data"
        )
    classes = targets.sum(axis=1) if targets.ndim > 1 else targets
    if np.bincount(classes.astype(np.int64)).max() < FOLDS:  # which the splitter does not take
        classes = np.zeros(len(targets), np.int64)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer images than there are folds
        places = [left_out for _, left_out in splitter.split(classes, classes, numbers)]
    return [left_out for left_out in places if len(left_out)]


def choose(
    calibration: Calibration, images: Scored, left_out: Sequence[np.ndarray], units: Sequence[Hashable]
) -> Choice:
    """Whether a bias is more than chance: on held-out images it gains more than one standard error over a temperature
    alone, which has one number to fit and not 1 + K.

    The images of one unit say nearly the same, so the standard error is over units: of their sums, not of each image.

    Args:
        left_out, units: see `folds`.
    """
    both = np.zeros((2, len(images.scores)))
    for place in left_out:
        kept = images.of(_others(images, place))
        for bias in (False, True):
            both[int(bias), place] = losses(fit(calibration, kept, bias=bias), images.of(place))
    gain = both[0] - both[1]
    sums = np.bincount(_numbered(units), gain - gain.mean())
    error = float(np.sqrt(len(sums) * sums.var(ddof=1)) / len(gain))
    alone, with_bias = both.mean(axis=1).tolist()
    return Choice(bool(gain.mean() > error), alone, with_bias, float(gain.mean()), error)


def chosen_fit(calibration: Calibration, images: Scored, units: Sequence[Hashable]) -> tuple[Calibration, Choice]:
    """The calibration fitted to all images, with a bias if `choose` says so.

    Args:
        units: which image belongs to which patient, or is a copy of which.

    Raises:
        VITaskError: too few images.
    """
    choice = choose(calibration, images, folds(images.targets, units), units)
    return fit(calibration, images, bias=choice.bias), choice


def cross_fitted(calibration: Calibration, images: Scored, units: Sequence[Hashable]) -> Iterator[Round]:
    """A round for each fold: fitted on the others, judged by its own images.

    Whether there is a bias is chosen anew in each, so that nothing of the images left out has a part in it.

    Raises:
        VITaskError: too few images.
    """
    for left_out in folds(images.targets, units):
        numbers = _others(images, left_out)
        kept, own = images.of(numbers), [units[number] for number in numbers]
        inner = folds(kept.targets, own) if len(set(own)) >= FEWEST else []
        bias = bool(inner) and choose(calibration, kept, inner, own).bias
        yield Round(fit(calibration, kept, bias=bias), kept, images.of(left_out))


def _numbered(units: Sequence[Hashable]) -> list[int]:
    """Units as numbers from 0, in the order in which they come."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    return [numbers[unit] for unit in units]


def _others(images: Scored, left_out: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(len(images.scores)), left_out)
