"""The expected calibration error (Guo et al., 2017) of whatever states a confidence: a VLM's label scores, a TSM."""

import numpy as np

BINS = 15


def bin_numbers(stated: np.ndarray) -> np.ndarray:
    """Which of `BINS` equally wide bins, open to the left, each confidence falls into; same shape."""
    return np.clip(np.ceil(stated * BINS).astype(int) - 1, 0, BINS - 1)


def reliability(stated: np.ndarray, true: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, share that came true, count) of each bin that holds a prediction: a reliability diagram.

    Args:
        stated: confidences of any shape, 0 to 1. true: 1 where what was stated came true, else 0; same shape.
    """
    numbers = bin_numbers(stated)
    return [
        (float(stated[chosen].mean()), float(true[chosen].mean()), int(chosen.sum()))
        for number in range(BINS)
        if (chosen := numbers == number).any()
    ]


def calibration_error(stated: np.ndarray, true: np.ndarray) -> float:
    """The gap between confidence and frequency, weighted by the bins' counts; see `reliability`."""
    return sum(count * abs(mean - share) for mean, share, count in reliability(stated, true)) / stated.size
