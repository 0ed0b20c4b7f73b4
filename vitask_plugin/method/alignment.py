"""One TSM's features in terms of another's: a ridge regression, and the same folded into a connector's first layer.

A tuned VLM reads exemplars made from the features of one TSM (the old one). What another TSM (the new one) says of the
same images is related to that almost linearly, because both tell the same classes apart: z_old ~ A (z_new - m_new) +
m_old. The connector starts with a linear layer, W z + b, so A disappears into it: W' = W A and
b' = b + W (m_old - A m_new).

Shapes: n = tokens (images, or patches of images), F = width of the new features, G = width of the old ones, D = of the
connector's first layer. Everything is float64: sums over many tokens, and a system that can be badly conditioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.method.connector import ExemplarConnector

# Ridge strengths that are tried, in units of the mean variance of a new feature: from almost none to almost a constant.
STRENGTHS = tuple(10.0**power for power in range(-8, 4))


class Alignment(NamedTuple):
    """z_old ~ weight (z_new - new_mean) + old_mean: weight [G, F], new_mean [F], old_mean [G], float64."""

    weight: Tensor
    new_mean: Tensor
    old_mean: Tensor

    def __call__(self, new: Tensor) -> Tensor:
        """New features [..., F] of any dtype -> what the old TSM would say of the same tokens [..., G], float64."""
        return (new.double() - self.new_mean) @ self.weight.T + self.old_mean


class Found(NamedTuple):
    """An alignment, and how good it is where it was not fitted.

    Attributes:
        r2: share of the old features' variance that is predicted on held-out images, at most 1; 0 = their mean is as
            good, less = worse than that.
        strength: the ridge strength that was chosen, one of `STRENGTHS`.
    """

    alignment: Alignment
    r2: float
    strength: float


@dataclass
class Moments:
    """Sums over tokens from which any ridge regression of old on new features follows, whatever the number of tokens.

    Attributes:
        count: n. new, old: sums of the features [F], [G].
        new_new, new_old: sums of products [F, F], [F, G]. old_square: sum of squares of the old features.
    """

    count: int
    new: Tensor
    old: Tensor
    new_new: Tensor
    new_old: Tensor
    old_square: Tensor

    @classmethod
    def of(cls, new: Tensor, old: Tensor) -> "Moments":
        """Of new features [n, F] and old ones [n, G] of the same tokens.

        Raises:
            VITaskError: a feature that is no number.
        """
        new, old = new.double(), old.double()
        for name, features in (("new", new), ("old", old)):
            if not features.isfinite().all():
                raise VITaskError(f"the {name} TSM gives features that are infinite or no number; it cannot be aligned")
        return cls(len(new), new.sum(0), old.sum(0), new.T @ new, new.T @ old, old.square().sum())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def centred(self) -> tuple[Tensor, Tensor]:
        """Sums of products of centred features: new with new [F, F], new with old [F, G]."""
        mean = self.new / self.count
        return self.new_new - self.count * mean[:, None] * mean, self.new_old - mean[:, None] * self.old


def align(folds: Sequence[Moments]) -> Found:
    """The ridge regression of old on new features; its strength is that which predicts each fold best from the others.

    Args:
        folds: of disjoint sets of images, two or more, none empty. The result is fitted on all of them.

    Raises:
        VITaskError: old features that are one and the same on all images.
    """
    errors, spread = torch.zeros(len(STRENGTHS), dtype=torch.float64), 0.0
    for number, held_out in enumerate(folds):
        training = _sum([fold for other, fold in enumerate(folds) if other != number])
        errors += torch.stack([_error(one, held_out) for one in _ridges(training)])
        spread += _spread(held_out, training)
    everything = _sum(folds)
    if spread <= 1e-12 * everything.old_square:  # rounding
        raise VITaskError(
            "the old TSM says the same of every image, so there is nothing to align with; give other images"
        )
    best = int(errors.argmin())
    (alignment,) = _ridges(everything, STRENGTHS[best : best + 1])
    return Found(alignment, 1 - errors[best].item() / spread, STRENGTHS[best])


def _sum(folds: Sequence[Moments]) -> Moments:
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    return total


def _ridges(moments: Moments, strengths: Sequence[float] = STRENGTHS) -> list[Alignment]:
    """A ridge regression for each strength, from one decomposition of the new features' covariance."""
    new_new, new_old = moments.centred()
    values, vectors = torch.linalg.eigh(new_new)
    values = values.clamp(min=0)
    # As many times the mean variance as there are tokens: the penalty then weighs the same on any number of them.
    scale = values.mean() if values.any() else values.new_ones(())
    rotated = vectors.T @ new_old
    means = moments.new / moments.count, moments.old / moments.count
    return [Alignment((vectors @ (rotated / (values + strength * scale)[:, None])).T, *means) for strength in strengths]


def _error(alignment: Alignment, moments: Moments) -> Tensor:
    """Sum of squared differences between the old features and those predicted, over the tokens of `moments`."""
    # With A' = weight^T and offset c, the prediction is A'^T z + c.
    weight = alignment.weight.T
    offset = alignment.old_mean - alignment.new_mean @ weight
    predicted_square = (
        ((moments.new_new @ weight) * weight).sum()
        + 2 * (moments.new @ weight @ offset)
        + moments.count * offset.square().sum()
    )
    product = (moments.new_old * weight).sum() + moments.old @ offset
    return moments.old_square - 2 * product + predicted_square


def _spread(moments: Moments, training: Moments) -> float:
    """Sum of squared differences between the old features and their mean over the `training` tokens."""
    mean = training.old / training.count
    return (moments.old_square - 2 * moments.old @ mean + moments.count * mean.square().sum()).item()


def fold(connector: ExemplarConnector, alignment: Alignment) -> ExemplarConnector:
    """A connector for the new features: fold(connector, a)(z_new) = connector(a(z_new)) up to rounding.

    Args:
        connector: takes the old features; it stays as it is. Any kind that starts with a linear layer.

    Returns:
        One of the same kind, float32.

    Raises:
        VITaskError: a connector for features of another width than the alignment's old ones.
    """
    old_width, new_width = alignment.weight.shape
    if connector.in_features != old_width:
        raise VITaskError(
            f"the connector takes features {connector.in_features} wide, the old TSM's are {old_width} wide; "
            "align from the TSM that the connector was trained with"
        )
    with torch.random.fork_rng(devices=[]):
        folded = ExemplarConnector(connector.kind, new_width, connector.out_features)
    state = {name: value.detach().clone() for name, value in connector.state_dict().items()}
    weight, bias = state["layers.0.weight"].double().cpu(), state["layers.0.bias"].double().cpu()
    offset = alignment.old_mean - alignment.weight @ alignment.new_mean
    state["layers.0.weight"] = weight @ alignment.weight
    state["layers.0.bias"] = bias + weight @ offset
    folded.load_state_dict(state)
    return folded
