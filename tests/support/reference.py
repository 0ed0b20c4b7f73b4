"""Slow, obvious references for the losses and for a whole step, written from the paper's equations only.

Nothing of the project is imported here. A loss is a loop over response positions and over the vocabulary, in
float64, with every probability computed by its definition; a step is one plain causal forward for each pair of
sample and branch, alone and unpadded. autograd goes through all of it, so the gradients are references too.

Shapes: P prefix length, T text length (instruction and response), E exemplar tokens, n predicted response
tokens, V vocabulary, D hidden width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

IGNORE = -100


def softmax(row: Tensor) -> list[Tensor]:
    """p_v = exp(y_v) / sum_w exp(y_w), V scalars; the largest logit is subtracted, which cancels."""
    largest = float(row.detach().max())
    exponentials = (row.double() - largest).exp().unbind()
    total = torch.zeros((), dtype=torch.float64)
    for exponential in exponentials:
        total = total + exponential
    return [exponential / total for exponential in exponentials]


def log_softmax(row: Tensor) -> list[Tensor]:
    """log p_v = y_v - log sum_w exp(y_w), a list of V scalars that stay finite where p_v is 0 in float64."""
    largest = float(row.detach().max())
    shifted = row.double() - largest
    total = torch.zeros((), dtype=torch.float64)
    for exponential in shifted.exp().unbind():
        total = total + exponential
    return [value - total.log() for value in shifted.unbind()]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Equations 1 and 2: -log p(token), one scalar per response token; eq. 2 has exemplar-prompted logits."""
    return [-log_softmax(logits[position])[int(token)] for position, token in enumerate(targets)]


def response_distribution_alignment(plain: Tensor, exemplar: Tensor, *, detach: bool = True) -> list[Tensor]:
    """Equation 3: sum_v p_v (log p_v - log q_v), p un-prompted (first), q prompted (second, constant)."""
    if detach:
        exemplar = exemplar.detach()
    divergences = []
    for plain_row, exemplar_row in zip(plain, exemplar, strict=True):
        p, log_p, log_q = softmax(plain_row), log_softmax(plain_row), log_softmax(exemplar_row)
        divergence = torch.zeros((), dtype=torch.float64)
        for word in range(len(p)):
            divergence = divergence + p[word] * (log_p[word] - log_q[word])
        divergences.append(divergence)
    return divergences


def contrastive_response_tuning(positive: Tensor, negative: Tensor, targets: Tensor) -> list[Tensor]:
    """Equation 4: -log softmax(y_pos - y_neg)[token], one scalar per response token."""
    return [
        -log_softmax(positive[position].double() - negative[position].double())[int(token)]
        for position, token in enumerate(targets)
    ]


def sigmoid_contrast(positive: Tensor, negative: Tensor, targets: Tensor) -> list[Tensor]:
    """What equation 4 is not: -log sigmoid(log p_pos(token) - log p_neg(token)), as in preference tuning."""
    losses = []
    for position, token in enumerate(targets):
        margin = log_softmax(positive[position])[int(token)] - log_softmax(negative[position])[int(token)]
        losses.append((1 + (-margin).exp()).log())
    return losses


def stage_one(vanilla: Tensor, ep: Tensor, rda: Tensor, *, alpha: float) -> Tensor:
    """L = L_van + L_EP + alpha L_RDA."""
    return vanilla + ep + alpha * rda


def stage_two(vanilla: Tensor, ep: Tensor, rda: Tensor, crt: Tensor, *, alpha: float, beta: float) -> Tensor:
    """L = L_van + L_EP + alpha L_RDA + beta L_CRT."""
    return vanilla + ep + alpha * rda + beta * crt


def tiny_llama(*, key_value_heads: int = 4, attention: str = "eager", vocabulary: int = 64, seed: int = 0):
    """A LlamaForCausalLM of 2 layers, 4 heads, width 32; its weights are large enough for attention to matter."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=256,
        initializer_range=0.25,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float().eval()
    torch.set_rng_state(random_state)
    return model


@dataclass
class Sample:
    """One image, one instruction, one response (or several turns of them), as the language model sees them.

    Attributes:
        prefix: [P, D] what precedes the exemplar: system text and image tokens; P = 0 for a text-only sample.
        text: [T, D] embeddings of the rest.
        labels: [T] token ids; `IGNORE` where there is no loss.
        exemplar: [E, D], or None for a sample without a TSM feature.
        negative_prefix: [P', D] the prefix with the negative image, or None where CRT does not apply.
    """

    prefix: Tensor
    text: Tensor
    labels: Tensor
    exemplar: Tensor | None = None
    negative_prefix: Tensor | None = None


@dataclass
class Step:
    """A whole step: `logits[sample][branch]` [n, V], `sums` over response tokens, and `total`, the loss."""

    logits: list[dict[str, Tensor]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | None = None


def branch_logits(model: LlamaForCausalLM, parts: list[Tensor], labels: Tensor) -> tuple[Tensor, list[int]]:
    """One plain causal forward of the concatenated `parts`, whose last positions carry `labels`.

    Returns:
        [n, V] logits of the positions that predict a labelled token, and those tokens. A token with nothing
        before it has no prediction.
    """
    sequence = torch.cat(parts)
    full = [IGNORE] * (len(sequence) - len(labels)) + labels.tolist()
    if len(sequence) == 0:
        return torch.zeros(0, model.config.vocab_size), []
    logits = model(inputs_embeds=sequence[None]).logits[0]
    rows, tokens = [], []
    for position in range(1, len(full)):
        if full[position] != IGNORE:
            rows.append(logits[position - 1])
            tokens.append(full[position])
    return (torch.stack(rows) if rows else logits[:0]), tokens


def step(
    model: LlamaForCausalLM,
    samples: list[Sample],
    *,
    stage: int,
    alpha: float,
    beta: float,
    denominator: int,
    detach: bool = True,
) -> Step:
    """The loss of a step by its definition: (sample, branch) by (sample, branch), then one division.

    Args:
        detach: of RDA; False is the paper's RDA*.
    """
    result = Step()
    names = ("vanilla", "ep", "rda", "crt")
    result.sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
    for sample in samples:
        plain, tokens = branch_logits(model, [sample.prefix, sample.text], sample.labels)
        logits = {"plain": plain}
        terms = {"vanilla": negative_log_likelihood(plain, torch.tensor(tokens))}
        if sample.exemplar is not None:
            parts = [sample.prefix, sample.exemplar, sample.text]
            logits["exemplar"], exemplar_tokens = branch_logits(model, parts, sample.labels)
            assert exemplar_tokens == tokens
            terms["ep"] = negative_log_likelihood(logits["exemplar"], torch.tensor(tokens))
            terms["rda"] = response_distribution_alignment(plain, logits["exemplar"], detach=detach)
        if sample.negative_prefix is not None and stage == 2:
            parts = [sample.negative_prefix, sample.text]
            logits["negative"], negative_tokens = branch_logits(model, parts, sample.labels)
            assert negative_tokens == tokens
            terms["crt"] = contrastive_response_tuning(plain, logits["negative"], torch.tensor(tokens))
        for name, losses in terms.items():
            for loss in losses:
                result.sums[name] = result.sums[name] + loss
        result.logits.append(logits)
        result.targets.append(tokens)
    vanilla, ep, rda, crt = (result.sums[name] for name in names)
    if stage == 1:
        total = stage_one(vanilla, ep, rda, alpha=alpha)
    else:
        total = stage_two(vanilla, ep, rda, crt, alpha=alpha, beta=beta)
    result.total = total / max(denominator, 1)
    return result
