"""The alignment of two feature spaces against a ridge regression written out, and its fold into a connector."""

import pytest
import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.method.alignment import STRENGTHS, Alignment, Moments, align, fold
from vitask_plugin.method.connector import ExemplarConnector

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def features(count: int, *, noise: float, new: int = 7, old: int = 4, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """New features [n, F] far from zero, and old ones [n, G] that are linear in them up to noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    mixes = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (new, old))
    seen, said = (shared @ mix for mix in mixes)
    said = said + noise * torch.randn(said.shape, generator=generator, dtype=torch.float64)
    return seen + 30, 2 * said - 10


def in_folds(new: torch.Tensor, old: torch.Tensor, folds: int = 5) -> list[Moments]:
    return [Moments.of(new[number::folds], old[number::folds]) for number in range(folds)]


def ridge(new: torch.Tensor, old: torch.Tensor, strength: float):
    """The textbook's: minimise |Y - X A^T|^2 + penalty |A|^2 on centred features, as one least-squares problem."""
    x, y = new - new.mean(0), old - old.mean(0)
    penalty = strength * x.square().sum() / x.shape[1]
    stacked = torch.cat([x, penalty.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    weight = torch.linalg.lstsq(stacked, torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])).solution.T
    return lambda z: (z - new.mean(0)) @ weight.T + old.mean(0)


@pytest.mark.parametrize(("count", "noise"), [(200, 0.5), (200, 5.0), (12, 1.0)])
def test_it_is_the_ridge_regression_whose_strength_predicts_held_out_images_best(count, noise):
    new, old = features(count, noise=noise)
    found = align(in_folds(new, old))
    errors = {strength: 0.0 for strength in STRENGTHS}
    spread = 0.0
    for number in range(5):
        held_out = torch.arange(count) % 5 == number
        for strength in STRENGTHS:
            predict = ridge(new[~held_out], old[~held_out], strength)
            errors[strength] += (predict(new[held_out]) - old[held_out]).square().sum().item()
        spread += (old[held_out] - old[~held_out].mean(0)).square().sum().item()
    best = min(errors, key=errors.get)
    assert found.strength == best
    assert found.r2 == pytest.approx(1 - errors[best] / spread, abs=1e-7)
    unseen = new + torch.randn(new.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(found.alignment(unseen), ridge(new, old, best)(unseen), rtol=1e-6, atol=1e-6)


def test_noise_is_not_taken_for_a_relation():
    """More features than images: least squares would fit them perfectly. Held out, nothing is predicted."""
    new, _ = features(40, noise=0, new=100)
    new = new + torch.randn(new.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = torch.randn(40, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = align(in_folds(new, old))
    assert found.strength == max(STRENGTHS) and -0.1 < found.r2 < 0.1


def test_an_exact_relation_is_found_and_r2_is_1():
    new, old = features(60, noise=0)
    found = align(in_folds(new, old))
    assert found.r2 == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(found.alignment(new), old, rtol=1e-5, atol=1e-5)


def test_sums_may_be_made_in_any_pieces():
    new, old = features(50, noise=1)
    whole, pieces = Moments.of(new, old), Moments.of(new[:13], old[:13]) + Moments.of(new[13:], old[13:])
    for one, other in zip(vars(whole).values(), vars(pieces).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), **EXACT)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize(("new_width", "old_width"), [(7, 4), (4, 7), (5, 5)])
def test_the_fold_is_exact(kind, new_width, old_width):
    new, old = features(60, noise=1, new=new_width, old=old_width)
    alignment = align(in_folds(new, old)).alignment
    torch.manual_seed(0)
    connector = ExemplarConnector(kind, old_width, 6)
    before = {name: value.clone() for name, value in connector.state_dict().items()}
    folded = fold(connector, alignment)
    unseen = torch.randn(9, 3, new_width, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 30
    with torch.no_grad():
        expected = connector.double()(alignment(unseen))
        assert (folded.in_features, folded.out_features, folded.kind) == (new_width, 6, kind)
        assert {weight.dtype for weight in folded.state_dict().values()} == {torch.float32}
        torch.testing.assert_close(folded(unseen.float()).double(), expected, rtol=1e-4, atol=1e-4)
    own = folded.state_dict()
    weight, bias = before["layers.0.weight"].double(), before["layers.0.bias"].double()
    torch.testing.assert_close(own["layers.0.weight"].double(), weight @ alignment.weight, rtol=1e-6, atol=1e-7)
    zero = alignment(torch.zeros(new_width))  # b' = W a(0) + b
    torch.testing.assert_close(own["layers.0.bias"].double(), weight @ zero + bias, rtol=1e-6, atol=1e-6)
    for name in own.keys() - {"layers.0.weight", "layers.0.bias"}:
        assert torch.equal(own[name], before[name]), name


def test_what_cannot_be_aligned():
    new, old = features(20, noise=1)
    new[3, 0] = float("inf")
    with pytest.raises(VITaskError, match="the new TSM gives features that are infinite or no number"):
        Moments.of(new, old)
    new, old = features(20, noise=1)
    with pytest.raises(VITaskError, match="the old TSM says the same of every image"):
        align(in_folds(new, torch.full_like(old, 0.1)))
    zeros = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(VITaskError, match="takes features 5 wide, the old TSM's are 4 wide"):
        fold(ExemplarConnector("linear", 5, 6), Alignment(torch.zeros(4, 7, dtype=torch.float64), zeros, zeros))


def test_new_features_that_say_nothing_give_the_mean():
    _, old = features(20, noise=1)
    found = align(in_folds(torch.full((20, 3), 2.5), old))
    assert found.r2 == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(found.alignment(torch.full((1, 3), 2.5)), old.mean(0, keepdim=True))
