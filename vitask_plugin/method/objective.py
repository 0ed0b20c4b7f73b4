"""The paper in one file: vanilla, EP, RDA, CRT, and the sums of the two stages (arXiv 2410.06456).

Shapes: n = response tokens of one call, V = vocabulary. All terms are per response token, float32, in nats.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vitask_plugin.method.layout import Branches


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), the term of L_van and, on exemplar-prompted logits, of L_EP (equations 1 and 2).

    Args:
        logits: [n, V], any float dtype (computed in float32).
        targets: [n] int64.

    Returns:
        [n] float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def response_distribution_alignment(plain_logits: Tensor, exemplar_logits: Tensor, *, detach: bool = True) -> Tensor:
    """L_RDA = KL( p(. | image, instruction) || sg[ p(. | image, exemplar, instruction) ] ) (equation 3).

    The un-prompted distribution is the first argument; the exemplar-prompted one is the second and is detached, so
    the exemplar branch teaches and is not pulled towards the plain one. Over the full vocabulary.

    Args:
        plain_logits: [n, V].
        exemplar_logits: [n, V].
        detach: False is the paper's control RDA*, whose gradient pulls the exemplar branch too.

    Returns:
        [n] float32.
    """
    if detach:
        exemplar_logits = exemplar_logits.detach()
    plain = F.log_softmax(plain_logits.float(), dim=-1)
    exemplar = F.log_softmax(exemplar_logits.float(), dim=-1)
    return (plain.exp() * (plain - exemplar)).sum(dim=-1)


def contrastive_response_tuning(positive_logits: Tensor, negative_logits: Tensor, targets: Tensor) -> Tensor:
    """L_CRT = -log q(target), q = softmax(y_pos - y_neg) (equation 4): a difference of logits inside one softmax.

    Gradients reach both branches: the paper detaches neither.

    Args:
        positive_logits: [n, V], given the sample's own image (un-prompted).
        negative_logits: [n, V], the same instruction and response given the negative image.
        targets: [n] int64.

    Returns:
        [n] float32.
    """
    return F.cross_entropy(positive_logits.float() - negative_logits.float(), targets, reduction="none")


def total(
    terms: Mapping[str, Tensor],
    *,
    stage: int,
    rda_weight: float,
    crt_weight: float,
    denominator: Tensor | float,
) -> Tensor:
    """Stage 1: L_van + L_EP + alpha L_RDA. Stage 2: L_van + L_EP + alpha L_RDA + beta L_CRT.

    Every term is a sum over tokens divided by one denominator, the response tokens of the whole accumulation step over
    all ranks, so that neither accumulation nor world size changes the loss. A sample that lacks a branch (no TSM
    feature, no negative) adds nothing to that branch's term. (The paper does not say how tokens are averaged.)

    Args:
        terms: scalar sums "vanilla", "ep", "rda" and, in stage 2, "crt".
        rda_weight: alpha. crt_weight: beta.
        denominator: response tokens; clamped to >= 1.

    Returns:
        Scalar float32.
    """
    loss = terms["vanilla"] + terms["ep"] + rda_weight * terms["rda"]
    if stage == 2:
        loss = loss + crt_weight * terms["crt"]
    return loss / torch.as_tensor(denominator, dtype=loss.dtype, device=loss.device).clamp(min=1.0)


def sums(logits: Tensor, branches: Branches, *, detach: bool) -> dict[str, Tensor]:
    """Each term's sum over response tokens, the number of those tokens, and how many are predicted right.

    Args:
        logits: [n, V] of all labelled tokens of all branches.
        detach: see `response_distribution_alignment`.
    """
    plain, answers = logits[branches.plain], branches.answers
    exemplar, prompted_answers = logits[branches.prompted], answers[branches.prompted_as]
    negative, contrasted_answers = logits[branches.negative], answers[branches.negative_as]
    return {
        "vanilla": negative_log_likelihood(plain, answers).sum(),
        "ep": negative_log_likelihood(exemplar, prompted_answers).sum(),
        "rda": response_distribution_alignment(plain[branches.prompted_as], exemplar, detach=detach).sum(),
        "crt": contrastive_response_tuning(plain[branches.negative_as], negative, contrasted_answers).sum(),
        "vanilla_tokens": answers.new_tensor(len(answers)),
        "ep_tokens": answers.new_tensor(len(prompted_answers)),
        "crt_tokens": answers.new_tensor(len(contrasted_answers)),
        "correct": (plain.argmax(dim=-1) == answers).sum(),
        "correct_ep": (exemplar.argmax(dim=-1) == prompted_answers).sum(),
    }
