"""From deep pixels (12 or 16 bits, signed, floating point) to 8 bits: one window of values for a whole data set."""

import math
from dataclasses import dataclass

import numpy as np

from vitask_plugin.errors import VITaskError

PERCENTILES = (0.5, 99.5)  # of the training images' values: what lies outside is black or white
VALUES = 4_000_000  # looked at in a data set, about as many of each image


@dataclass(frozen=True)
class Window:
    """The values that become black (`low`) and white (`high`); between them it is linear, outside it is cut off.

    Raises:
        VITaskError: not two finite numbers, the lower one first.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise VITaskError(f"--window {self.low:g} {self.high:g} is empty; give two numbers, the lower one first")

    def apply(self, values: np.ndarray, *, negative: bool = False) -> np.ndarray:
        """Any numbers -> uint8 of the same shape; NaN becomes black.

        Args:
            negative: it is `low` that becomes white, and `high` black.
        """
        scaled = (values.astype(np.float64) - self.low) * (255 / (self.high - self.low))
        scaled = 255 - scaled if negative else scaled
        return np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


class ValueRange:
    """Values of a data set's images, from which its window is read.

    Args:
        images: how many will be added: all of them have the same share in what is looked at.
    """

    def __init__(self, images: int) -> None:
        self._count = max(64, VALUES // max(1, images))
        self._generator = np.random.default_rng(0)
        self._values: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Takes values of one image, drawn at random where there are many. NaN and infinity are passed over."""
        flat = values.reshape(-1)
        if len(flat) > self._count:
            flat = flat[self._generator.integers(len(flat), size=self._count)]
        self._values.append(flat[np.isfinite(flat)].astype(np.float64))

    def window(self) -> Window | None:
        """The `PERCENTILES` of the values; all values where these are equal; None if there is one value or none."""
        values = np.concatenate([np.zeros(0), *self._values])
        if not len(values):
            return None
        low, high = np.percentile(values, PERCENTILES)
        if low == high:
            low, high = values.min(), values.max()
        return Window(float(low), float(high)) if low < high else None
