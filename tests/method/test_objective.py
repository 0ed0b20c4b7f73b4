"""The losses against independent references: values, gradients, directions, and what they must not be."""

import math

import pytest
import reference
import torch
from torch import Tensor

from vitask_plugin.method.objective import (
    contrastive_response_tuning,
    negative_log_likelihood,
    response_distribution_alignment,
    total,
)

# The objective computes in float32 and the references in float64, whatever the dtype of the logits.
VALUE = {"rtol": 2e-6, "atol": 2e-6}
GRADIENT = {"rtol": 5e-6, "atol": 2e-6}

VOCABULARY = 23


def logits(tokens: int, seed: int, *, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).requires_grad_()


def words(tokens: int, seed: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def nll(plain: Tensor, other: Tensor, targets: Tensor, module) -> object:
    return module.negative_log_likelihood(plain, targets)


def rda(plain: Tensor, other: Tensor, targets: Tensor, module) -> object:
    return module.response_distribution_alignment(plain, other)


def crt(plain: Tensor, other: Tensor, targets: Tensor, module) -> object:
    return module.contrastive_response_tuning(plain, other, targets)


class Ours:
    """The functions under test, reachable by the names the reference module uses."""

    negative_log_likelihood = staticmethod(negative_log_likelihood)
    response_distribution_alignment = staticmethod(response_distribution_alignment)
    contrastive_response_tuning = staticmethod(contrastive_response_tuning)


LOSSES = [nll, rda, crt]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@each_loss
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_equal_the_reference(loss, tokens, dtype):
    inputs = [logits(tokens, seed, dtype=dtype) for seed in (1, 2)]
    expected_inputs = [value.detach().double().requires_grad_() for value in inputs]
    # Different weights per token, so that a permutation of the positions would be seen.
    weights = torch.arange(1, tokens + 1, dtype=torch.float64)

    values = loss(*inputs, words(tokens), Ours)
    expected = torch.stack(loss(*expected_inputs, words(tokens), reference))
    assert values.shape == (tokens,)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, **VALUE)

    (values * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    tolerance = dict(rtol=2**-7, atol=1e-6) if dtype == torch.bfloat16 else GRADIENT  # the gradient is stored in bf16
    for value, wanted in zip(inputs, expected_inputs, strict=True):
        if wanted.grad is None:
            assert value.grad is None or not value.grad.any()
        else:
            torch.testing.assert_close(value.grad.double(), wanted.grad, **tolerance)


def test_gradients_are_the_textbook_formulas():
    """A second, closed-form opinion on the gradients, so that autograd is not its own judge."""
    plain, other, targets = logits(5, 3), logits(5, 4), words(5)
    one_hot = torch.nn.functional.one_hot(targets, VOCABULARY).double()
    p, q = (torch.softmax(value.detach().double(), -1) for value in (plain, other))

    (gradient,) = torch.autograd.grad(negative_log_likelihood(plain, targets).sum(), plain)
    torch.testing.assert_close(gradient.double(), p - one_hot, **GRADIENT)

    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(response_distribution_alignment(plain, other).sum(), plain)
    torch.testing.assert_close(gradient.double(), p * ((p / q).log() - divergence), rtol=1e-5, atol=1e-6)

    contrast = torch.softmax((plain - other).detach().double(), -1)
    gradients = torch.autograd.grad(contrastive_response_tuning(plain, other, targets).sum(), (plain, other))
    torch.testing.assert_close(gradients[0].double(), contrast - one_hot, **GRADIENT)
    torch.testing.assert_close(gradients[1].double(), one_hot - contrast, **GRADIENT)


def test_hand_computed_values():
    """Two words: small enough for pencil and paper."""
    even, odds_three = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])  # (1/2, 1/2) and (3/4, 1/4)
    first = torch.tensor([0])
    assert negative_log_likelihood(odds_three, first).item() == pytest.approx(math.log(4 / 3), abs=1e-6)
    # KL((1/2, 1/2) || (3/4, 1/4)) and KL((3/4, 1/4) || (1/2, 1/2)).
    forward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    backward = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert forward != pytest.approx(backward, abs=1e-3)
    assert response_distribution_alignment(even, odds_three).item() == pytest.approx(forward, abs=1e-6)
    assert response_distribution_alignment(odds_three, even).item() == pytest.approx(backward, abs=1e-6)
    # y_pos - y_neg = (log 3, 0) - (0, log 3) = (log 3, -log 3): q = (9/10, 1/10).
    negative = torch.tensor([[0.0, math.log(3.0)]])
    assert contrastive_response_tuning(odds_three, negative, first).item() == pytest.approx(math.log(10 / 9), abs=1e-6)
    assert contrastive_response_tuning(negative, odds_three, first).item() == pytest.approx(math.log(10), abs=1e-6)


def test_rda_puts_the_plain_model_first():
    plain, exemplar = logits(6, 5), logits(6, 6)
    values = response_distribution_alignment(plain, exemplar)
    swapped = response_distribution_alignment(exemplar, plain)
    wanted = torch.stack(reference.response_distribution_alignment(plain, exemplar))
    unwanted = torch.stack(reference.response_distribution_alignment(exemplar, plain))
    torch.testing.assert_close(values.double(), wanted, **VALUE)
    torch.testing.assert_close(swapped.double(), unwanted, **VALUE)
    assert ((values - swapped).abs() > 1e-2).all()


def test_rda_does_not_reach_the_exemplar_branch():
    plain, exemplar = logits(6, 5), logits(6, 6)
    # As in training, the exemplar logits are part of a graph through another term.
    loss = response_distribution_alignment(plain, exemplar).sum() + 0.0 * exemplar.sum()
    loss.backward()
    assert plain.grad.any()
    assert torch.equal(exemplar.grad, torch.zeros_like(exemplar))
    # Not vacuous: undetached (the paper's RDA*, which gains nothing) the same loss has a gradient there.
    undetached = torch.stack(reference.response_distribution_alignment(plain, exemplar, detach=False)).sum()
    (gradient,) = torch.autograd.grad(undetached, exemplar)
    assert gradient.abs().max() > 1e-2


def test_rda_without_detachment_is_the_same_value_with_both_gradients():
    """The control RDA*: by default the loss is detached, so this must be asked for."""
    inputs = [logits(6, seed) for seed in (5, 6)]
    expected_inputs = [value.detach().double().requires_grad_() for value in inputs]
    values = response_distribution_alignment(*inputs, detach=False)
    expected = torch.stack(reference.response_distribution_alignment(*expected_inputs, detach=False))
    assert torch.equal(values, response_distribution_alignment(*inputs))
    torch.testing.assert_close(values.double(), expected, **VALUE)
    values.sum().backward()
    expected.sum().backward()
    for value, wanted in zip(inputs, expected_inputs, strict=True):
        assert wanted.grad.abs().max() > 1e-2
        torch.testing.assert_close(value.grad.double(), wanted.grad, **GRADIENT)


def test_rda_is_a_divergence():
    for seed in range(20):
        scale = 10.0 ** (seed % 5 - 3)  # from nearly equal to far apart
        plain, exemplar = logits(8, seed, scale=scale), logits(8, seed + 100, scale=scale)
        values = response_distribution_alignment(plain, exemplar)
        assert (values >= -1e-6).all()  # float32 rounding of a sum that is at least zero
    same = logits(8, 1)
    assert torch.equal(response_distribution_alignment(same, same), torch.zeros(8))
    (gradient,) = torch.autograd.grad(response_distribution_alignment(same, same.detach()).sum(), same)
    assert gradient.abs().max() < 1e-6
    shifted = same.detach() + torch.arange(8.0)[:, None]  # the same distributions, other logits
    assert response_distribution_alignment(same, shifted).abs().max() < 2e-6


def test_crt_is_one_softmax_over_the_difference_and_no_sigmoid():
    positive, negative, targets = logits(6, 7), logits(6, 8), words(6)
    values = contrastive_response_tuning(positive, negative, targets).double()
    contrast = torch.stack(reference.contrastive_response_tuning(positive, negative, targets))
    sigmoid = torch.stack(reference.sigmoid_contrast(positive, negative, targets))
    torch.testing.assert_close(values, contrast, **VALUE)
    assert ((values - sigmoid).abs() > 1e-2).all()
    # With two words the two forms are still different: the softmax also moves the other word.
    two, none, first = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    softmax_form = contrastive_response_tuning(two, none, first).item()
    assert softmax_form == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert softmax_form != pytest.approx(reference.sigmoid_contrast(two, none, first)[0].item(), abs=1e-2)


def test_crt_falls_when_the_positive_image_makes_the_response_likelier():
    negative, targets = logits(4, 8).detach(), words(4)
    flat = contrastive_response_tuning(negative, negative, targets)
    torch.testing.assert_close(flat, torch.full((4,), math.log(VOCABULARY)))  # images that make no difference
    rows = torch.arange(4)
    better, worse = negative.clone(), negative.clone()
    better[rows, targets] += 2.0
    worse[rows, targets] -= 2.0
    assert (contrastive_response_tuning(better, negative, targets) < flat).all()
    assert (contrastive_response_tuning(worse, negative, targets) > flat).all()


@each_loss
def test_a_constant_added_to_all_logits_of_a_position_changes_nothing(loss):
    inputs = [logits(5, seed) for seed in (1, 2)]
    shifts = [
        torch.tensor([[3.0], [-7.0], [0.0], [20.0], [1.5]]),
        torch.tensor([[1.0], [5.0], [-9.0], [0.0], [30.0]]),
    ]
    shifted = [(value + shift).detach() for value, shift in zip(inputs, shifts, strict=True)]
    torch.testing.assert_close(
        loss(*shifted, words(5), Ours), loss(*inputs, words(5), Ours).detach(), rtol=1e-5, atol=1e-5
    )


@each_loss
def test_no_response_tokens(loss):
    inputs = [logits(0, seed) for seed in (1, 2)]
    values = loss(*inputs, words(0), Ours)
    assert values.shape == (0,)
    value = values.sum()
    value.backward()
    assert value.item() == 0.0
    assert inputs[0].grad.shape == (0, VOCABULARY)


@each_loss
def test_large_logits_stay_finite_and_right(loss):
    inputs = [logits(7, seed, scale=1e4) for seed in (1, 2)]
    expected_inputs = [value.detach().double().requires_grad_() for value in inputs]
    values = loss(*inputs, words(7), Ours)
    expected = torch.stack(loss(*expected_inputs, words(7), reference))
    assert values.isfinite().all()
    assert values.max() > 1e3  # not vacuous: the naive exp() overflows or underflows here
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=2e-3)  # float32 of numbers around 1e4
    values.sum().backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in inputs)


@each_loss
def test_low_precision_logits_are_upcast_first(loss):
    low = [logits(6, seed, dtype=torch.bfloat16) for seed in (1, 2)]
    upcast = [value.detach().float() for value in low]
    values = loss(*low, words(6), Ours)
    assert values.dtype == torch.float32
    assert torch.equal(values.detach(), loss(*upcast, words(6), Ours))
    # Not vacuous: the same arithmetic in bfloat16 gives other numbers.
    rounded = torch.log_softmax(low[0], -1).gather(1, words(6)[:, None]).squeeze(1)
    assert (negative_log_likelihood(low[0], words(6)) + rounded.float()).abs().max() > 1e-3


def sums() -> dict[str, Tensor]:
    values = {"vanilla": 8.0, "ep": 4.0, "rda": 2.0, "crt": 1.0}
    return {name: torch.tensor(value) for name, value in values.items()}


def test_stage_totals():
    weights = dict(rda_weight=0.5, crt_weight=0.25, denominator=4)
    one, two = total(sums(), stage=1, **weights), total(sums(), stage=2, **weights)
    values = sums()
    vanilla, ep, rda_sum, crt_sum = (values[name] for name in ("vanilla", "ep", "rda", "crt"))
    assert one.item() == reference.stage_one(vanilla, ep, rda_sum, alpha=0.5).item() / 4 == 13.0 / 4
    expected = reference.stage_two(vanilla, ep, rda_sum, crt_sum, alpha=0.5, beta=0.25)
    assert two.item() == expected.item() / 4 == 13.25 / 4


def test_stage_one_needs_no_crt_and_ignores_it():
    weights = dict(stage=1, rda_weight=0.5, crt_weight=0.25, denominator=4)
    without = {name: value for name, value in sums().items() if name != "crt"}
    assert total(without, **weights) == total(sums(), **weights)


def test_the_total_counts_each_term_by_its_weight_and_nothing_else():
    terms = {name: value.requires_grad_() for name, value in sums().items()}
    terms["another_loss"] = torch.tensor(100.0, requires_grad=True)
    total(terms, stage=2, rda_weight=0.5, crt_weight=0.25, denominator=4).backward()
    gradients = {name: None if value.grad is None else value.grad.item() for name, value in terms.items()}
    assert gradients == {"vanilla": 0.25, "ep": 0.25, "rda": 0.125, "crt": 0.0625, "another_loss": None}


@pytest.mark.parametrize("denominator", [0, 0.5, 1, torch.tensor(0), torch.tensor(1), torch.tensor(0.0)])
def test_the_denominator_is_at_least_one(denominator):
    loss = total(sums(), stage=1, rda_weight=0.0, crt_weight=0.0, denominator=denominator)
    assert loss.item() == 12.0
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("denominator", [3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)])
def test_the_denominator_may_be_a_number_or_a_tensor(denominator):
    loss = total(sums(), stage=2, rda_weight=1.0, crt_weight=1.0, denominator=denominator)
    assert loss.item() == 5.0
    assert loss.dtype == torch.float32


def test_one_denominator_makes_accumulation_exact():
    """Two uneven micro-batches over one denominator add up to the whole batch; per-batch means would not."""
    positive, targets = logits(7, 1), words(7)
    options = dict(stage=1, rda_weight=0.0, crt_weight=0.0)

    def part(rows: slice, denominator: int) -> Tensor:
        value = negative_log_likelihood(positive[rows], targets[rows]).sum()
        zero = torch.zeros(())
        return total({"vanilla": value, "ep": zero, "rda": zero}, denominator=denominator, **options)

    whole = part(slice(None), 7)
    torch.testing.assert_close(part(slice(0, 2), 7) + part(slice(2, 7), 7), whole)
    assert abs((part(slice(0, 2), 2) + part(slice(2, 7), 5)) / 2 - whole) > 1e-2
