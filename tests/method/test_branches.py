"""Packed equals branch by branch equals one plain forward per (sample, branch): logits, losses and gradients.

The truth is `reference.step`, which knows neither masks nor packing. Both engines are compared with it on every case
below, with multi-head and grouped-query attention, under sdpa and eager.
"""

import functools
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import pytest
import reference
import torch
from reference import IGNORE, Sample
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.method import attention as attention_masks
from vitask_plugin.method.branches import LAYOUTS, Continuation, Document, Packed, Rows, all_targets, common, targets
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


# The mask


def brute_force_pairs(document: Document) -> set[tuple[tuple, tuple]]:
    """(query, key) by definition: what each branch would see if it ran alone after its prefix.

    A position is named ("prefix", n), or (branch, n) for the n-th token of a continuation; a shared token is the first
    continuation's.
    """
    prefix = [("prefix", place) for place in range(len(document.prefix))]
    pairs = set()
    for number, part in enumerate(document.continuations or [Continuation(document.prefix[:0], document.prefix[:0])]):
        text = [(0 if place < part.shared else number, place) for place in range(len(part.tokens))]
        alone = prefix + text
        pairs |= {(query, key) for place, query in enumerate(alone) for key in alone[: place + 1]}
    return pairs


def seen_pairs(packed: Packed) -> set[tuple[int, int]]:
    """(query, key) as numbers row * L + position, from the mask that the decoder gets; pads left out."""
    rows, length = packed.source.shape
    mask = attention_masks.additive_mask(attention_masks.Rule(packed.until), torch.float32)
    assert mask.shape == (rows, 1, length, length) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    assert (mask[:, 0].max(dim=-1).values == 0.0).all()  # a query with nothing to see would be NaN
    return {(row * length + query, row * length + key) for row, query, key in (mask[:, 0] == 0.0).nonzero().tolist()}


def documents_of(specs: list[tuple]) -> list[Document]:
    """Documents from (prefix length, continuation lengths ...), a length or (length, shared); their last token is
    labelled. Each position has a place of its own in the pool, but for shared ones; place 0 is left to the pads."""
    documents, start = [], 1

    def fresh(count: int) -> Tensor:
        nonlocal start
        start += count
        return torch.arange(start - count, start)

    for prefix, *sizes in specs:
        document = Document(fresh(prefix), [])
        for size in sizes:
            size, shared = size if isinstance(size, tuple) else (size, 0)
            first = document.continuations[0].tokens[:shared] if shared else fresh(0)
            labels = torch.full((size,), IGNORE)
            labels[-1:] = 7
            document.continuations.append(Continuation(torch.cat([first, fresh(size - shared)]), labels, shared))
        documents.append(document)
    return documents


DOCUMENTS = [
    [(3, 2)],
    [(1, 1, 1)],
    [(3, 2, 4, 1)],
    [(0, 3)],
    [(0, 2, 2)],
    [(4,)],
    [(2, 0, 3)],
    [(2, 5, (4, 3))],
    [(2, 5, 3, (6, 2), (5, 4), (4, 4), 2)],
    [(2, 3, (7, 3)), (1, 6, (3, 3), (8, 2))],
    [(2, 3), (5, 1, 2, 2), (0, 4), (1, 0)],
    [(9, 3, 2), (2, 3), (3, 4, (5, 2)), (0, 4)],
]


@pytest.mark.parametrize("specs", DOCUMENTS, ids=str)
def test_the_mask_equals_its_definition(specs):
    """Every pair of positions, in rows of one document and of several."""
    documents = documents_of(specs)
    packed = Packed.of(documents)
    found = seen_pairs(packed)
    at = {int(place): number for number, place in enumerate(packed.source.flatten()) if place}
    assert len(at) == int((packed.source > 0).sum())  # nothing is laid out twice
    expected, laid_out = set(), 0
    for document in documents:
        names = {("prefix", number): int(place) for number, place in enumerate(document.prefix)}
        for branch, part in enumerate(document.continuations):
            names |= {(branch, number): int(place) for number, place in enumerate(part.tokens)}
        # The last token of each continuation predicts nothing; it is only there if another one leans on it.
        here = {name: at[place] for name, place in names.items() if place in at}
        laid_out += len({at[place] for place in names.values() if place in at})
        for branch, part in enumerate(document.continuations):
            needed = [("prefix", n) for n in range(len(document.prefix))]
            needed += [(0 if n < part.shared else branch, n) for n in range(len(part.tokens) - 1)]
            assert set(needed) <= here.keys()
        pairs = brute_force_pairs(document)
        expected |= {(here[query], here[key]) for query, key in pairs if query in here and key in here}
    pads = {number for number, place in enumerate(packed.source.flatten().tolist()) if place == 0}
    assert found == expected | {(pad, pad) for pad in pads}
    assert len(expected) > 0 and laid_out == len(at)


def test_rows_are_filled_first_fit():
    documents = documents_of([(1, 2), (9, 4, 3), (3, 3), (5, 3)])
    packed = Packed.of(documents)
    # 9 + 3 + 2 in one row; 5 + 2, 3 + 2 and 1 + 1 together in the other.
    assert packed.source.shape == (2, 14)
    rows = [set(row[row > 0].tolist()) for row in packed.source]
    assert set(documents[1].prefix.tolist()) <= rows[0]
    assert all(set(documents[number].prefix.tolist()) <= rows[1] for number in (0, 2, 3))


def test_positions_go_on_from_the_prefix():
    (row,) = Packed.of(documents_of([(3, 3, 5, (4, 2))])).position_ids
    #                     prefix   first  shares 2  own
    assert row.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]


def test_which_positions_predict():
    """The first token of a continuation belongs to the prefix's last position, never to another branch's last."""
    documents = documents_of([(3, 2, 3), (0, 3, 2)])
    for document in documents:
        for number, part in enumerate(document.continuations):
            part.labels[:] = torch.arange(len(part.labels)) + 10 * (number + 1)
    packed = Packed.of(documents)
    predicting = pieces(documents, packed.source.flatten()[packed.predictors])
    (prefix, a, b), (_, c, d) = [[one.prefix, *(part.tokens for part in one.continuations)] for one in documents]
    expected = [[[prefix[2], a[0]], [prefix[2], b[0], b[1]]], [[c[0], c[1]], [d[0]]]]
    assert [[piece.tolist() for piece in row] for row in predicting] == expected
    # Nothing precedes the first token after an empty prefix: it is not predicted at all.
    tokens = [[piece.tolist() for piece in row] for row in pieces(documents, all_targets(documents))]
    assert tokens == [[[10, 11], [20, 21, 22]], [[11, 12], [21]]]


def test_only_labelled_tokens_are_predicted_and_nothing_behind_them_is_computed():
    (document,) = documents_of([(2, 7)])
    document.continuations[0].labels[:] = torch.tensor([IGNORE, 7, IGNORE, IGNORE, 9, IGNORE, IGNORE])
    packed = Packed.of([document])
    assert packed.predictors.tolist() == [2, 5]
    assert packed.source.shape == (1, 6)
    assert targets(document, document.continuations[0]).tolist() == [7, 9]


@pytest.mark.parametrize("left, right, length", [("", "", 0), ("a", "", 0), ("ab", "ab", 2), ("abc", "abd", 2)])
def test_what_two_texts_share(left, right, length):
    assert common([ord(letter) for letter in left], [ord(letter) for letter in right]) == length


# The engines


def test_the_cases_hold_what_they_claim():
    """The table above is not vacuous: each kind of sample that must train is in it."""
    counts = Counter()
    for specs in CASES.values():
        negatives = Counter(spec.negative for spec in specs if spec.negative is not None)
        counts["several negatives on one image"] += any(count > 1 for count in negatives.values())
        counts["uneven prefixes"] += len({spec.prefix for spec in specs}) > 1
        counts["uneven texts"] += len({spec.text for spec in specs}) > 1
        for spec in specs:
            gaps = [b - a > 1 for a, b in zip(spec.labelled, spec.labelled[1:], strict=False)]
            counts["samples"] += 1
            counts["several tokens"] += len(spec.labelled) > 1
            counts["several turns"] += any(gaps)
            counts["first token labelled"] += 0 in spec.labelled and spec.prefix > 0
            counts["first token labelled, nothing before it"] += 0 in spec.labelled and spec.prefix == 0
            counts["no label"] += not spec.labelled
            counts["empty text"] += spec.text == 0
            counts["text only"] += spec.prefix == 0 and spec.text > 0
            counts["without exemplar"] += spec.exemplar is None
            counts["several exemplar tokens"] += (spec.exemplar or 0) > 1
            counts["negative from the batch"] += spec.negative is not None
            counts["negative from outside"] += spec.extra is not None
            counts["image without negative"] += spec.prefix > 0 and spec.negative is None and spec.extra is None
            counts["shared instruction"] += spec.negative is not None and min(spec.asks, specs[spec.negative].asks) > 0
            counts["shared response"] += any(place < spec.asks for place in spec.labelled)
    assert min(counts.values()) >= 1, counts
    assert len(counts) == 18


@pytest.mark.compat
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("key_value_heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_engines_equal_the_reference(case, key_value_heads, attention):
    """Logits, every loss, and gradients of embeddings, a decoder layer and the head: fp32, 1e-5 relative."""
    specs = CASES[case]
    expected = cached_truth(case, key_value_heads)
    model = reference.tiny_llama(key_value_heads=key_value_heads, attention=attention, vocabulary=VOCABULARY)
    assert model.config._attn_implementation == attention
    for engine in ENGINES:
        calls: list[Tensor] = []
        distances = compare(run(specs, model, engine, calls=calls), expected)
        assert max(distances.values()) <= FP32, (engine, distances)
        # One forward for everything, against one per branch.
        continuations = [len(document.continuations) for document in make(specs).documents]
        assert len(calls) == (1 if engine == "packed" else max(continuations))
        assert all(hidden.isfinite().all() for hidden in calls)  # pads included

    # Not vacuous: this many branches and tokens were compared, and they differ from each other.
    branch_count = sum(1 + (s.exemplar is not None) + (s.negative is not None or s.extra is not None) for s in specs)
    assert len(expected.logits) == branch_count
    assert sum(len(value) for (_, branch), value in expected.logits.items() if branch == "plain") == denominator(specs)
    for (number, branch), value in expected.logits.items():
        if branch != "plain" and value.numel() and (branch != "exemplar" or specs[number].exemplar):
            assert distance(value, expected.logits[number, "plain"]) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_stage_one_equals_the_reference(engine):
    expected = cached_truth("everything mixed", 2, stage=1)
    model = reference.tiny_llama(key_value_heads=2, attention="sdpa", vocabulary=VOCABULARY)
    outcome = run(CASES["everything mixed"], model, engine, stage=1)
    assert max(compare(outcome, expected).values()) <= FP32
    assert expected.losses["crt"] == 0
    assert cached_truth("everything mixed", 2).losses["crt"] > 0.1


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # not in transformers 4
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_changes_nothing(engine, reentrant, attention):
    model = reference.tiny_llama(key_value_heads=2, attention=attention, vocabulary=VOCABULARY)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    forwards = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    calls: list[Tensor] = []
    outcome = run(CASES["everything mixed"], model, engine, calls=calls)
    assert len(forwards) == 2 * len(calls)  # each forward was really recomputed
    assert max(compare(outcome, cached_truth("everything mixed", 2)).values()) <= FP32


@pytest.mark.compat
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16(engine, attention):
    """bf16 against plain bf16 forwards, at its own tolerance, and no further from fp32 than those are."""
    specs = CASES["everything mixed"]
    model = reference.tiny_llama(key_value_heads=2, attention=attention, vocabulary=VOCABULARY).bfloat16()
    plain = truth(specs, model, dtype=torch.bfloat16)
    outcome = run(specs, model, engine, dtype=torch.bfloat16)
    distances = compare(outcome, plain)
    assert max(distances.values()) <= BF16, distances
    assert max(distances.values()) > FP32  # bf16 was really used
    ours, theirs = (compare(value, cached_truth("everything mixed", 2)) for value in (outcome, plain))
    for kind in ours:
        assert ours[kind] <= 2 * theirs[kind] + 0.01, (kind, ours, theirs)


def states_of(engine: str, model, documents: list[Document], pool: Tensor) -> list[list[Tensor]]:
    return pieces(documents, LAYOUTS[engine].of(documents).states(decoder_of(model, pool)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_document_does_not_depend_on_its_neighbours(engine):
    """Alone, beside a much longer document, or in one row with others: the same hidden states."""
    batch = make(CASES["shared instruction"])
    model = reference.tiny_llama(attention="sdpa", vocabulary=VOCABULARY)
    alone = states_of(engine, model, batch.documents[:1], batch.pool)[0]
    longer = documents_of([(30, 20, 20, 20, 20)])  # far more than both documents, which then share a row
    pool = torch.cat([batch.pool, torch.randn(200, WIDTH)])
    for document in longer:
        document.prefix = document.prefix + len(batch.pool)
        document.continuations = [
            replace(part, tokens=part.tokens + len(batch.pool)) for part in document.continuations
        ]
    together = states_of(engine, model, [*longer, *batch.documents], pool)[1]
    assert Packed.of([*longer, *batch.documents]).source.shape[0] == 2
    assert len(alone) == len(together) == 3
    assert max(distance(a, b) for a, b in zip(together, alone, strict=True)) <= FP32


@pytest.mark.parametrize("engine", ENGINES)
def test_a_document_without_continuations(engine):
    model = reference.tiny_llama(attention="sdpa", vocabulary=VOCABULARY)
    batch = make(CASES["one plain sample"])
    states = states_of(engine, model, [Document(torch.arange(4), []), *batch.documents], batch.pool)
    assert [len(row) for row in states] == [0, 1]
    assert states[1][0].shape == (2, WIDTH)


def test_a_layout_moves_as_a_whole():
    for engine in ENGINES:
        layout = LAYOUTS[engine].of(make(CASES["all branches"]).documents)
        moved = layout.to("meta")
        tensors = [getattr(moved, name) for name in vars(moved)]
        flat = [value for tensor in tensors for value in (tensor if isinstance(tensor, list) else [tensor])]
        assert flat and all(value.device.type == "meta" for value in flat)


def test_images_of_two_documents_in_one_row_do_not_see_each_other():
    """Two questions about one image are two documents that begin with the same places, and so with the same block."""
    one = Document(torch.arange(3), [Continuation(torch.tensor([5, 6]), torch.tensor([1, 1]))])
    longer = Document(torch.arange(10, 20), [Continuation(torch.tensor([5, 6]), torch.tensor([1, 1]))])
    packed = Packed.of([one, longer, one])
    assert packed.source.shape[0] == 2  # the two short ones share a row
    blocks = (packed.source == 1) | (packed.source == 2)
    rule = attention_masks.Rule(packed.until, packed.position_ids, None, blocks.long())
    mask = attention_masks.additive_mask(rule, torch.float32)[:, 0] == 0
    row = next(number for number, source in enumerate(packed.source) if (source == 1).sum() == 2)
    first, second = (packed.source[row] == 1).nonzero().squeeze(-1).tolist()
    assert mask[row, first, first + 1] and mask[row, second, second + 1]  # an image's tokens see those behind them
    assert not mask[row, first, second] and not mask[row, second, first]


def test_attention_without_a_mask_of_its_own_is_refused():
    with pytest.raises(VITaskError, match=r"flash_attention_2.*no shared-prefix mask.*sdpa"):
        attention_masks.mask("flash_attention_2", attention_masks.Rule(torch.ones(1, 1)), torch.float32)


def test_the_block_mask_of_flex_attention_is_the_same_rule():
    packed = Packed.of(make(CASES["shared by several, unevenly"]).documents)
    rule = attention_masks.block_mask(attention_masks.Rule(packed.until), torch.float32).mask_mod
    rows, length = packed.until.shape
    expected = attention_masks.additive_mask(attention_masks.Rule(packed.until), torch.float32)[:, 0] == 0
    for row, query, key in product(range(rows), range(length), range(length)):
        place = (torch.tensor(value) for value in (row, 0, query, key))
        assert bool(rule(*place)) == bool(expected[row, query, key])


def test_flex_attention_gives_the_same_states():
    """Forward only: FlexAttention has no backward on a CPU."""
    batch = make(CASES["everything mixed"])
    states = {}
    for backend in ("sdpa", "flex_attention"):
        model = reference.tiny_llama(key_value_heads=2, attention=backend, vocabulary=VOCABULARY)
        with torch.no_grad():
            states[backend] = Packed.of(batch.documents).states(decoder_of(model, batch.pool))
    assert distance(states["flex_attention"], states["sdpa"]) <= FP32


# Mutations: each plausible mistake must make the comparison fail.


def all_causal(query_index, key_index, key_until):
    return (key_index <= query_index) & (key_until > 0)


def own_part_only(query_index, key_index, key_until):
    query_until = key_until.transpose(-1, -2) if key_until.ndim > 1 else key_until
    return (key_index <= query_index) & (query_until == key_until)


def sees_ahead(query_index, key_index, key_until):
    return (key_index <= query_index + 1) & (query_index < key_until)


def one_too_far(query_index, key_index, key_until):
    return (key_index <= query_index) & (query_index <= key_until)


def positions_run_on(packed: Packed) -> Packed:
    return replace(packed, position_ids=torch.arange(packed.source.shape[1]).expand_as(packed.source))


def predicted_by_the_row_neighbour(packed: Packed) -> Packed:
    """Shift by one along the row, as for ordinary labels: the last token of a branch predicts the next one's first."""
    starts = packed.position_ids.flatten()[1:] != packed.position_ids.flatten()[:-1] + 1
    branch_ends = {int(place) for place in starts.nonzero()}
    last_of_prefix = int(packed.predictors.min())
    moved = [
        min(branch_ends, key=lambda end: (end <= last_of_prefix, end)) if int(place) == last_of_prefix else int(place)
        for place in packed.predictors
    ]
    return replace(packed, predictors=torch.tensor(moved))


def mutated_distances(case: str, layout=None, **mutation) -> dict[str, float]:
    model = reference.tiny_llama(key_value_heads=2, attention="sdpa", vocabulary=VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mutation.items():
            patch.setattr(attention_masks, name, value)
        if layout:
            right = Packed.of
            patch.setattr(Packed, "of", lambda documents: layout(right(documents)))
        return compare(run(CASES[case], model, "packed"), cached_truth(case, 2))


@pytest.mark.parametrize(
    "mutant", [all_causal, own_part_only, sees_ahead, one_too_far], ids=lambda value: value.__name__
)
def test_a_wrong_mask_is_noticed(mutant):
    assert max(mutated_distances("shared instruction").values()) <= FP32
    distances = mutated_distances("shared instruction", visible=mutant)
    assert min(distances.values()) > 100 * FP32, distances


@pytest.mark.parametrize("mutant", [positions_run_on, predicted_by_the_row_neighbour], ids=lambda value: value.__name__)
def test_a_wrong_layout_is_noticed(mutant):
    distances = mutated_distances("first token labelled", layout=mutant)
    assert min(distances.values()) > 100 * FP32, distances
