"""Batches of branches, and what a step on them gives: by an engine, and by the reference that knows no masks."""

import functools
from dataclasses import dataclass, replace

import reference
import torch
from reference import IGNORE, Sample
from torch import Tensor

from vitask_plugin.method.branches import LAYOUTS, Continuation, Document, Rows, all_targets, targets
from vitask_plugin.method.objective import (
    contrastive_response_tuning,
    negative_log_likelihood,
    response_distribution_alignment,
    total,
)

ALPHA, BETA = 0.7, 1.3
FP32 = 1e-5  # relative to the largest element of the tensor compared; measured 3e-6
BF16 = 0.05  # the same, both sides in bfloat16 (8 bits of mantissa, two layers); measured 0.024 in gradients

WIDTH, VOCABULARY = 32, 64
HEADS = [4, 2, 1]  # of keys and values, with 4 query heads: multi-head, grouped-query, multi-query
ATTENTION = ["sdpa", "eager"]
ENGINES = sorted(LAYOUTS)


@dataclass(frozen=True)
class Spec:
    """One sample: lengths, which text tokens carry labels, and where its negative image comes from.

    `exemplar`: number of exemplar tokens, or None. `negative`: the sample of the batch whose prefix is the negative
    one; `extra`: else, the length of a negative prefix from outside the batch. `asks`: how many of the first text
    tokens are those of one instruction, the same for all samples.
    """

    prefix: int
    text: int
    labelled: tuple[int, ...]
    exemplar: int | None = None
    negative: int | None = None
    extra: int | None = None
    asks: int = 0


CASES: dict[str, list[Spec]] = {
    "one plain sample": [Spec(5, 4, (2, 3))],
    "plain and exemplar": [Spec(5, 4, (2, 3), exemplar=1)],
    "all branches": [Spec(6, 5, (3, 4), exemplar=1, negative=1), Spec(6, 5, (3, 4), exemplar=1, negative=0)],
    "uneven branches": [Spec(6, 3, (2,), exemplar=1, negative=1), Spec(6, 9, (5, 6, 7, 8), exemplar=1, negative=0)],
    "uneven prefixes": [Spec(1, 4, (3,), exemplar=1, negative=1), Spec(13, 4, (2, 3), exemplar=1, negative=0)],
    "many exemplar tokens": [Spec(4, 4, (3,), exemplar=7, negative=1), Spec(6, 5, (4,), exemplar=2, negative=0)],
    "first token labelled": [Spec(4, 3, (0, 1, 2), exemplar=1, negative=1), Spec(5, 2, (0,), exemplar=1, negative=0)],
    "several turns": [Spec(4, 10, (2, 3, 7, 8, 9), exemplar=1, negative=1), Spec(4, 6, (1, 2, 5), negative=0)],
    "several negatives on one image": [
        Spec(5, 3, (2,), exemplar=1, negative=2),
        Spec(3, 5, (0, 4), exemplar=1, negative=2),
        Spec(7, 4, (2, 3), exemplar=1, negative=0),
    ],
    "negative from the data set": [Spec(5, 4, (2, 3), exemplar=1, extra=8), Spec(4, 3, (2,), exemplar=1, extra=2)],
    "no label": [Spec(4, 3, (), exemplar=1, negative=1), Spec(4, 3, (1, 2), exemplar=1, negative=0)],
    "empty continuation": [Spec(4, 0, (), exemplar=1, negative=1), Spec(6, 3, (0, 2), exemplar=0, negative=0)],
    "text only": [Spec(0, 5, (0, 3, 4)), Spec(4, 3, (1, 2), exemplar=1, extra=3)],
    "nothing at all beside a sample": [Spec(0, 0, ()), Spec(4, 3, (1, 2), exemplar=1, extra=3)],
    "shared instruction": [
        Spec(6, 7, (4, 5, 6), exemplar=1, negative=1, asks=4),
        Spec(6, 6, (4, 5), exemplar=1, negative=0, asks=4),
    ],
    "shared by several, unevenly": [
        Spec(5, 8, (4, 5, 6), exemplar=2, negative=1, asks=5),
        Spec(5, 7, (3, 6), exemplar=1, negative=0, asks=6),
        Spec(4, 9, (2, 5, 7, 8), exemplar=1, negative=0, asks=3),
        Spec(4, 4, (1, 3), negative=0, asks=1),
    ],
    "one text within another": [
        Spec(5, 3, (1, 2), exemplar=1, negative=1, asks=3),
        Spec(5, 6, (1, 2, 4), exemplar=1, negative=0, asks=3),
    ],
    "shared, the first without an answer": [
        Spec(5, 6, (), negative=1, asks=5),
        Spec(5, 6, (0, 4, 5), exemplar=1, negative=0, asks=5),
    ],
    "everything mixed": [
        Spec(7, 6, (3, 4, 5), exemplar=1, negative=1),
        Spec(5, 4, (0, 1, 3), exemplar=4, negative=0),
        Spec(9, 8, (2, 3, 6, 7), negative=0),
        Spec(0, 5, (2, 3, 4)),
        Spec(3, 4, (3,), exemplar=1, extra=11),
        Spec(4, 0, ()),
    ],
}


@dataclass
class Batch:
    """Samples, the same as documents over a pool, and where each (sample, branch) went: (document, continuation)."""

    samples: list[Sample]
    pool: Tensor
    documents: list[Document]
    places: dict[tuple[int, str], tuple[int, int]]
    leaves: dict[str, Tensor]


def make(specs: list[Spec], dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    leaves: dict[str, Tensor] = {}
    starts: dict[str, int] = {}

    def leaf(name: str, length: int) -> Tensor:
        starts[name] = sum(map(len, leaves.values()))
        leaves[name] = torch.randn(length, WIDTH, generator=generator).to(dtype).requires_grad_()
        return leaves[name]

    def at(name: str) -> Tensor:
        return starts[name] + torch.arange(len(leaves[name]))

    instruction = leaf("instruction", max(spec.asks for spec in specs))
    samples, texts = [], []
    for number, spec in enumerate(specs):
        labels = torch.full((spec.text,), IGNORE)
        for position in spec.labelled:
            # Where tokens are the same, so are their ids.
            if position < spec.asks:
                labels[position] = position
            else:
                labels[position] = torch.randint(VOCABULARY, (), generator=generator)
        prefix, own = leaf(f"prefix {number}", spec.prefix), leaf(f"text {number}", spec.text - spec.asks)
        sample = Sample(prefix, torch.cat([instruction[: spec.asks], own]), labels)
        texts.append(torch.cat([at("instruction")[: spec.asks], at(f"text {number}")]))
        if spec.exemplar is not None:
            sample.exemplar = leaf(f"exemplar {number}", spec.exemplar)
        if spec.extra is not None:
            sample.negative_prefix = leaf(f"negative prefix {number}", spec.extra)
        samples.append(sample)
    for spec, sample in zip(specs, samples, strict=True):
        if spec.negative is not None:
            sample.negative_prefix = samples[spec.negative].prefix

    documents = [Document(at(f"prefix {number}"), []) for number in range(len(samples))]
    places = {}

    def place(number: int, branch: str, document: int, continuation: Continuation) -> None:
        places[number, branch] = (document, len(documents[document].continuations))
        documents[document].continuations.append(continuation)

    for number, sample in enumerate(samples):
        place(number, "plain", number, Continuation(texts[number], sample.labels))
        if sample.exemplar is not None:
            labels = torch.cat([torch.full((len(sample.exemplar),), IGNORE), sample.labels])
            place(
                number, "exemplar", number, Continuation(torch.cat([at(f"exemplar {number}"), texts[number]]), labels)
            )
    for number, (spec, sample) in enumerate(zip(specs, samples, strict=True)):
        negative = Continuation(texts[number], sample.labels)
        if spec.negative is not None:
            shared = min(spec.asks, specs[spec.negative].asks)
            place(number, "negative", spec.negative, replace(negative, shared=shared))
        elif spec.extra is not None:
            documents.append(Document(at(f"negative prefix {number}"), []))
            place(number, "negative", len(documents) - 1, negative)
    return Batch(samples, torch.cat([*leaves.values()]), documents, places, leaves)


def denominator(specs: list[Spec]) -> int:
    """Predicted response tokens of the plain branches."""
    return sum(len([place for place in spec.labelled if spec.prefix + place > 0]) for spec in specs)


@dataclass
class Outcome:
    """What is compared: logits by (sample, branch), loss sums, the loss, and gradients by name."""

    logits: dict[tuple[int, str], Tensor]
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def gradients(loss: Tensor, leaves: dict[str, Tensor], model) -> dict[str, Tensor]:
    """Of all embeddings, all of the first decoder layer's weights, and the head."""
    inputs = leaves | dict(model.model.layers[0].named_parameters(prefix="layer")) | {"head": model.lm_head.weight}
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in inputs.items()}


def truth(specs: list[Spec], model, stage: int = 2, dtype: torch.dtype = torch.float32) -> Outcome:
    batch = make(specs, dtype)
    result = reference.step(model, batch.samples, stage=stage, alpha=ALPHA, beta=BETA, denominator=denominator(specs))
    logits = {(number, branch): value for number, row in enumerate(result.logits) for branch, value in row.items()}
    losses = result.sums | {"total": result.total}
    return Outcome(logits, losses, gradients(result.total, batch.leaves, model))


@functools.cache
def cached_truth(case: str, key_value_heads: int, stage: int = 2) -> Outcome:
    model = reference.tiny_llama(key_value_heads=key_value_heads, attention="eager", vocabulary=VOCABULARY)
    return truth(CASES[case], model, stage)


def decoder_of(model, pool: Tensor, calls: list[Tensor] | None = None):
    def decoder(rows: Rows) -> Tensor:
        hidden = model.model(
            inputs_embeds=rows.embedded(pool),
            attention_mask=rows.mask(model.config._attn_implementation, pool.dtype),
            position_ids=rows.position_ids,
            use_cache=False,
        ).last_hidden_state
        if calls is not None:
            calls.append(hidden.detach())
        return hidden

    return decoder


def pieces(documents: list[Document], values: Tensor) -> list[list[Tensor]]:
    """What a layout returned, by document and continuation."""
    sizes = [[len(targets(document, part)) for part in document.continuations] for document in documents]
    flat = iter(values.split([size for row in sizes for size in row]))
    return [[next(flat) for _ in row] for row in sizes]


def run(specs: list[Spec], model, engine: str, stage: int = 2, dtype=torch.float32, calls=None) -> Outcome:
    """The step by the project's own engine and objective."""
    batch = make(specs, dtype)
    layout = LAYOUTS[engine].of(batch.documents)
    states = layout.states(decoder_of(model, batch.pool, calls))
    by_place = pieces(batch.documents, model.lm_head(states))
    tokens_by_place = pieces(batch.documents, all_targets(batch.documents))

    def logits_of(number: int, branch: str) -> tuple[Tensor, Tensor]:
        row, column = batch.places[number, branch]
        return by_place[row][column], tokens_by_place[row][column]

    sums = {name: torch.zeros(()) for name in ("vanilla", "ep", "rda", "crt")}
    logits = {}
    for number in range(len(specs)):
        plain, tokens = logits_of(number, "plain")
        logits[number, "plain"] = plain
        sums["vanilla"] = sums["vanilla"] + negative_log_likelihood(plain, tokens).sum()
        if (number, "exemplar") in batch.places:
            prompted, prompted_tokens = logits_of(number, "exemplar")
            assert torch.equal(tokens, prompted_tokens)
            logits[number, "exemplar"] = prompted
            sums["ep"] = sums["ep"] + negative_log_likelihood(prompted, tokens).sum()
            sums["rda"] = sums["rda"] + response_distribution_alignment(plain, prompted).sum()
        if (number, "negative") in batch.places and stage == 2:
            negative, negative_tokens = logits_of(number, "negative")
            assert torch.equal(tokens, negative_tokens)
            logits[number, "negative"] = negative
            sums["crt"] = sums["crt"] + contrastive_response_tuning(plain, negative, tokens).sum()
    loss = total(sums, stage=stage, rda_weight=ALPHA, crt_weight=BETA, denominator=denominator(specs))
    return Outcome(logits, sums | {"total": loss}, gradients(loss, batch.leaves, model))


def distance(value: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest element; infinite for NaN or another shape."""
    if value.shape != expected.shape or not value.isfinite().all():
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = (value.double() - expected.double()).abs().max().item()
    return difference / largest if (largest := expected.abs().max().item()) else difference


def compare(outcome: Outcome, expected: Outcome) -> dict[str, float]:
    """The largest distance among logits, losses and gradients."""
    distances = {}
    for kind in ("logits", "losses", "gradients"):
        ours, theirs = getattr(outcome, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys() and ours
        distances[kind] = max(distance(ours[name], theirs[name]) for name in ours)
    return distances
