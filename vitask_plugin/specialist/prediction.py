"""What a specialist says of one image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import response
from vitask_plugin.inference import metrics


@dataclass(frozen=True)
class Prediction:
    """Of one image.

    Attributes:
        image: its path, or `image N` (N from 0) of one that was given as a picture.
        label: the class that is read from the probabilities; of several labels those above 1/2, joined by ", ", or
            "no finding". None: the image could not be read.
        probabilities: by class, in the order of the label set; empty where there is an error.
        entropy: of them, nats (of several labels the sum over these); NaN where there is an error.
        answer: in free text, None where it was not asked for.
        error: why there is no label, in one sentence.
    """

    image: str
    label: str | None
    probabilities: Mapping[str, float]
    entropy: float
    answer: str | None = None
    error: str | None = None

    @classmethod
    def failed(cls, image: str, error: str) -> "Prediction":
        return cls(image, None, {}, float("nan"), None, error)

    @classmethod
    def of(
        cls, image: str, classes: Sequence[str], likely: Sequence[float], kind: str, answer: str | None = None
    ) -> "Prediction":
        """Of K probabilities. `kind`: `medmnist`'s word."""
        decided = metrics.decide(likely, kind)
        label = [index for index, member in enumerate(decided) if member] if isinstance(decided, list) else decided
        probabilities = dict(zip(classes, map(float, likely), strict=True))
        return cls(image, response(classes, label).removesuffix("."), probabilities, entropy(likely, kind), answer)


def entropy(likely: Sequence[float], kind: str) -> float:
    """Nats. Labels that may come together are each for itself present or absent: the sum of their entropies."""
    values = np.asarray(likely, dtype=float)
    if kind == MULTI_LABEL:
        values = np.stack([values, 1 - values])
    return float(-(values * np.log(np.where(values > 0, values, 1))).sum())
