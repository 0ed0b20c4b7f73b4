"""What a calibration is: by which numbers label scores are scaled before they become probabilities, and what was found
to follow from them on validation images.

Shapes: N = images, C = columns of the scores, K = classes (C = K; of several labels to an image C = K + 1, the last
column being "no finding").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from vitask_plugin.data.names import told_apart
from vitask_plugin.errors import VITaskError

AIMS = ("sensitivity", "specificity")


@dataclass(frozen=True)
class Rate:
    """A share of images and its exact (Clopper-Pearson) 95% interval; `images`: of how many. None: of no image."""

    value: float | None
    low: float | None
    high: float | None
    images: int


@dataclass(frozen=True)
class Threshold:
    """From which probability of the class `positive` on an image counts as one.

    Attributes:
        aim: what was wished for, one of `AIMS`, and `wished`: how much of it.
        value: an image is positive if its probability is at least this.
        sensitivity, specificity: on the images that it was chosen on.
        held_out: the same two on images that had no part in the choice.
    """

    positive: str
    aim: str
    wished: float
    value: float
    sensitivity: Rate
    specificity: Rate
    held_out: dict[str, Rate]


@dataclass(frozen=True)
class Abstention:
    """From which probability of the likeliest class on an answer is given.

    Attributes:
        wished: share of the given answers that may be wrong.
        value: an answer is given if the largest probability is at least this; above 1: none is.
        error, answered: the share of given answers that are wrong, and of images that get one, where it was chosen.
        held_out: the same two on images that had no part in the choice.
    """

    wished: float
    value: float
    error: Rate
    answered: Rate
    held_out: dict[str, Rate]


@dataclass(frozen=True)
class Calibration:
    """Of one task of a checkpoint, without or with exemplar prompting: softmax(scores / temperature + bias).

    Attributes:
        task, ep: what the scores are of.
        classes: K names, in the order of the columns.
        temperature: above 0. bias: C numbers, nats; zeros where a temperature alone was the better choice.
        multi_label: several labels to an image: each is set against "no finding" alone.
        question: that the scores are of, without its image token.
        tsm: hash of the TSM, None without EP or with a learned prefix.
        connector: SHA-256 of the connector's file, None without EP.
        thresholds, abstention: as far as they were asked for.
    """

    task: str
    ep: bool
    classes: tuple[str, ...]
    temperature: float
    bias: tuple[float, ...]
    multi_label: bool = False
    question: str = ""
    tsm: str | None = None
    connector: str | None = None
    thresholds: tuple[Threshold, ...] = ()
    abstention: Abstention | None = None

    def scaled(self, scores: Any) -> np.ndarray:
        """Scores float [N, C] or [C] (nats) -> scores / temperature + bias, float64, the same shape.

        Raises:
            VITaskError: another number of columns, or a score that is not finite.
        """
        values = np.asarray(scores, dtype=float)
        if values.ndim == 0 or values.shape[-1] != len(self.bias):
            raise VITaskError(
                f"the calibration of task {self.task!r} is for {len(self.bias)} label scores to an image, and these "
                f"have the shape {values.shape}; give those of its labels, in the order {', '.join(self.classes)}"
            )
        if not np.isfinite(values).all():
            raise VITaskError(f"task {self.task!r}: a label score is not finite; check the weights of the model")
        scaled: np.ndarray = values / self.temperature + np.asarray(self.bias)
        return scaled

    def probabilities(self, scores: Any) -> np.ndarray:
        """Scores float [N, C] or [C] (nats) -> calibrated probabilities float64 [N, K] or [K].

        Raises:
            VITaskError: see `scaled`.
        """
        scaled = self.scaled(scores)
        likely: np.ndarray = (
            expit(scaled[..., :-1] - scaled[..., -1:]) if self.multi_label else softmax(scaled, axis=-1)
        )
        return likely

    def check_classes(self, classes: Sequence[str]) -> None:
        """Refuses another label set or another order of it, for then each number would belong to another class.

        Raises:
            VITaskError: naming both.
        """
        if tuple(classes) != self.classes:
            found, known = list(classes), list(self.classes)
            raise VITaskError(
                f"task {self.task!r} has the labels {told_apart(found, known)}, and its calibration those of "
                f"{told_apart(known, found)}; calibrate again with data of these labels in this order"
            )
