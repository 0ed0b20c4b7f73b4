"""Packed equals branch by branch equals one plain forward per (sample, branch): logits, losses and gradients.

The truth is `reference.step`, which knows neither masks nor packing. Both engines are compared with it on every case
below, with multi-head and grouped-query attention, under sdpa and eager.
"""

import functools
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import reference
import torch
from reference import IGNORE, Sample
from torch import Tensor

from vitask_plugin import branches
from vitask_plugin.branches import PAD_DOCUMENT, RUN, Continuation, Document, pack, targets, visible
from vitask_plugin.objective import (
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
ENGINES = sorted(RUN)


@dataclass(frozen=True)
class Spec:
    """One sample: lengths, which text tokens carry labels, and where its negative image comes from.

    `exemplar`: number of exemplar tokens, or None. `negative`: the sample of the batch whose prefix is the negative
    one; `extra`: else, the length of a negative prefix from outside the batch.
    """

    prefix: int
    text: int
    labelled: tuple[int, ...]
    exemplar: int | None = None
    negative: int | None = None
    extra: int | None = None


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
    """Samples, the same as documents, and where each (sample, branch) went: (document, continuation)."""

    samples: list[Sample]
    documents: list[Document]
    places: dict[tuple[int, str], tuple[int, int]]
    leaves: dict[str, Tensor]


def make(specs: list[Spec], dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, length: int) -> Tensor:
        values = torch.randn(length, WIDTH, generator=generator)
        leaves[name] = values.to(dtype).requires_grad_()
        return leaves[name]

    samples = []
    for number, spec in enumerate(specs):
        labels = torch.full((spec.text,), IGNORE)
        for position in spec.labelled:
            labels[position] = torch.randint(VOCABULARY, (), generator=generator)
        sample = Sample(leaf(f"prefix {number}", spec.prefix), leaf(f"text {number}", spec.text), labels)
        if spec.exemplar is not None:
            sample.exemplar = leaf(f"exemplar {number}", spec.exemplar)
        if spec.extra is not None:
            sample.negative_prefix = leaf(f"negative prefix {number}", spec.extra)
        samples.append(sample)
    for spec, sample in zip(specs, samples, strict=True):
        if spec.negative is not None:
            sample.negative_prefix = samples[spec.negative].prefix

    documents = [Document(sample.prefix, []) for sample in samples]
    places = {}

    def place(number: int, branch: str, document: int, embeds: Tensor, labels: Tensor) -> None:
        places[number, branch] = (document, len(documents[document].continuations))
        documents[document].continuations.append(Continuation(embeds, labels))

    for number, sample in enumerate(samples):
        place(number, "plain", number, sample.text, sample.labels)
        if sample.exemplar is not None:
            nothing = torch.full((len(sample.exemplar),), IGNORE)
            embeds = torch.cat([sample.exemplar, sample.text])
            place(number, "exemplar", number, embeds, torch.cat([nothing, sample.labels]))
    for number, (spec, sample) in enumerate(zip(specs, samples, strict=True)):
        if spec.negative is not None:
            place(number, "negative", spec.negative, sample.text, sample.labels)
        elif spec.extra is not None:
            documents.append(Document(sample.negative_prefix, []))
            place(number, "negative", len(documents) - 1, sample.text, sample.labels)
    return Batch(samples, documents, places, leaves)


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


def decoder_of(model, calls: list[Tensor] | None = None):
    def decoder(inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        hidden = model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        if calls is not None:
            calls.append(hidden.detach())
        return hidden

    return decoder


def run(specs: list[Spec], model, engine: str, stage: int = 2, dtype=torch.float32, calls=None) -> Outcome:
    """The step by the project's own engine and objective."""
    batch = make(specs, dtype)
    states = RUN[engine](decoder_of(model, calls), batch.documents)
    assert [len(row) for row in states] == [len(document.continuations) for document in batch.documents]

    def logits_of(number: int, branch: str) -> tuple[Tensor, Tensor]:
        row, column = batch.places[number, branch]
        document = batch.documents[row]
        return model.lm_head(states[row][column]), targets(document, document.continuations[column])

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


def brute_force_pairs(document: Document) -> set[tuple[int, int]]:
    """(query, key) row positions by definition: what each branch would see if it ran alone after its prefix."""
    prefix = list(range(len(document.prefix)))
    pairs = {(query, key) for query in prefix for key in prefix if key <= query}
    offset = len(prefix)
    for continuation in document.continuations:
        alone = prefix + list(range(offset, offset + len(continuation.embeds)))
        for place, query in enumerate(alone):
            pairs |= {(query, key) for key in alone[: place + 1]}
        offset += len(continuation.embeds)
    return pairs


def rule(document: Tensor, branch: Tensor) -> Tensor:
    index = torch.arange(len(document))
    return visible(document[:, None], branch[:, None], index[:, None], document, branch, index)


def test_the_rule_as_a_table():
    """Prefix of 2, branches of 2 and 1, then a second document, then a pad."""
    document = torch.tensor([0, 0, 0, 0, 0, 1, 1, PAD_DOCUMENT])
    branch = torch.tensor([0, 0, 1, 1, 2, 0, 1, 0])
    table = """
        1.......
        11......
        111.....
        1111....
        11..1...
        .....1..
        .....11.
        .......1
    """
    expected = torch.tensor([[cell == "1" for cell in line] for line in table.split()])
    assert torch.equal(rule(document, branch), expected)


def layout(specs: list[tuple[int, ...]]) -> list[Document]:
    """Documents from (prefix length, continuation lengths ...), nothing labelled."""
    return [
        Document(
            torch.zeros(prefix, WIDTH),
            [Continuation(torch.zeros(size, WIDTH), torch.full((size,), IGNORE)) for size in sizes],
        )
        for prefix, *sizes in specs
    ]


LAYOUTS = [
    [(3, 2)],
    [(1, 1, 1)],
    [(3, 2, 4, 1)],
    [(0, 3)],
    [(0, 2, 2)],
    [(4,)],
    [(2, 0, 3)],
    [(2, 3), (5, 1, 2, 2), (0, 4), (1, 0)],
]


@pytest.mark.parametrize("specs", LAYOUTS, ids=str)
def test_the_mask_equals_its_definition(specs):
    documents = layout(specs)
    packed = pack(documents)
    mask = branches.additive_mask(packed.document_ids, packed.branch_ids, torch.float32)
    rows, length = packed.document_ids.shape
    assert mask.shape == (rows, 1, length, length)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    seen = pairs = 0
    for row, document in enumerate(documents):
        size = len(document.prefix) + sum(len(part.embeds) for part in document.continuations)
        expected = brute_force_pairs(document)
        for query in range(size):
            for key in range(length):
                assert (mask[row, 0, query, key].item() == 0.0) == ((query, key) in expected), (row, query, key)
                seen += 1
        pairs += len(expected)
        # Pads: unseen by what is real (above), and never a query with nothing to see (softmax would be NaN).
        assert (packed.document_ids[row, size:] == PAD_DOCUMENT).all()
        assert (mask[row, 0].max(dim=-1).values == 0.0).all()
    assert seen > 0 and pairs > 0


def test_the_rule_holds_for_several_documents_in_one_row():
    documents = layout([(2, 3, 1), (0, 2), (4, 0, 2)])
    document_ids, branch_ids, expected, offset = [], [], set(), 0
    for number, document in enumerate(documents):
        sizes = [len(document.prefix), *(len(part.embeds) for part in document.continuations)]
        expected |= {(query + offset, key + offset) for query, key in brute_force_pairs(document)}
        document_ids += [number] * sum(sizes)
        branch_ids += [branch for branch, size in enumerate(sizes) for _ in range(size)]
        offset += sum(sizes)
    seen = rule(torch.tensor(document_ids), torch.tensor(branch_ids)).nonzero().tolist()
    assert {tuple(pair) for pair in seen} == expected


def test_positions_restart_at_the_prefix_length():
    packed = pack(layout([(3, 2, 4), (0, 2, 1)]))
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert packed.branch_ids[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert packed.document_ids.tolist() == [[0] * 9, [1, 1, 1, *[PAD_DOCUMENT] * 6]]


def test_which_positions_predict():
    """The first token of a continuation belongs to the prefix's last position, never to another branch's last."""
    documents = layout([(3, 2, 3), (0, 3, 2)])
    for document in documents:
        for number, continuation in enumerate(document.continuations):
            continuation.labels = torch.arange(len(continuation.labels)) + 10 * (number + 1)
    first, second = pack(documents).predictors
    assert [index.tolist() for index in first] == [[2, 3], [2, 5, 6]]
    # Nothing precedes the first token after an empty prefix: it is not predicted at all.
    assert [index.tolist() for index in second] == [[8 + 0, 8 + 1], [8 + 3]]
    tokens = [[targets(document, part).tolist() for part in document.continuations] for document in documents]
    assert tokens == [[[10, 11], [20, 21, 22]], [[11, 12], [21]]]


def test_only_labelled_tokens_are_predicted():
    (document,) = layout([(2, 5)])
    document.continuations[0].labels = torch.tensor([IGNORE, 7, IGNORE, IGNORE, 9])
    assert pack([document]).predictors[0][0].tolist() == [2, 5]
    assert targets(document, document.continuations[0]).tolist() == [7, 9]


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
    assert min(counts.values()) >= 1, counts
    assert len(counts) == 16


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


def test_a_document_does_not_depend_on_its_neighbours():
    """Alone, or padded beside a much longer document: the same hidden states."""
    specs = CASES["all branches"]
    model = reference.tiny_llama(attention="sdpa", vocabulary=VOCABULARY)
    for engine in ENGINES:
        documents = make(specs).documents
        alone = RUN[engine](decoder_of(model), documents[:1])[0]
        longer = layout([(30, 20, 20, 20, 20)])
        together = RUN[engine](decoder_of(model), [*longer, *documents])[1]
        assert len(alone) == len(together) == 3
        assert max(distance(a, b) for a, b in zip(together, alone, strict=True)) <= FP32


def test_a_document_without_continuations():
    model = reference.tiny_llama(attention="sdpa", vocabulary=VOCABULARY)
    for engine in ENGINES:
        documents = [*layout([(4,)]), *make(CASES["one plain sample"]).documents]
        states = RUN[engine](decoder_of(model), documents)
        assert [len(row) for row in states] == [0, 1]
        assert states[1][0].shape == (2, WIDTH)


# Mutations: each plausible mistake must make the comparison fail.


def all_causal(query_document, query_branch, query_index, key_document, key_branch, key_index):
    return (key_index <= query_index) & (query_document == key_document)


def own_branch_only(query_document, query_branch, query_index, key_document, key_branch, key_index):
    return (key_index <= query_index) & (query_document == key_document) & (key_branch == query_branch)


def sees_ahead(query_document, query_branch, query_index, key_document, key_branch, key_index):
    own = (key_branch == 0) | (key_branch == query_branch)
    return (key_index <= query_index + 1) & (query_document == key_document) & own


def positions_run_on(documents: list[Document]) -> branches.Packed:
    packed = pack(documents)
    return replace(packed, position_ids=torch.arange(packed.position_ids.shape[1]).expand_as(packed.position_ids))


def predicted_by_the_row_neighbour(documents: list[Document]) -> branches.Packed:
    """Shift by one along the row, as for ordinary labels: the last token of a branch predicts the next one's first."""
    packed = pack(documents)
    predictors = []
    for row, document in enumerate(documents):
        start = row * packed.branch_ids.shape[1] + len(document.prefix)
        predictors.append([])
        for continuation in document.continuations:
            predictors[-1].append(start - 1 + (continuation.labels != IGNORE).nonzero().squeeze(-1))
            start += len(continuation.embeds)
    return replace(packed, predictors=predictors)


def mutated_distances(case: str, **mutation) -> dict[str, float]:
    model = reference.tiny_llama(key_value_heads=2, attention="sdpa", vocabulary=VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mutation.items():
            patch.setattr(branches, name, value)
        return compare(run(CASES[case], model, "packed"), cached_truth(case, 2))


@pytest.mark.parametrize("mutant", [all_causal, own_branch_only, sees_ahead], ids=lambda value: value.__name__)
def test_a_wrong_mask_is_noticed(mutant):
    assert max(mutated_distances("all branches").values()) <= FP32
    distances = mutated_distances("all branches", visible=mutant)
    assert min(distances.values()) > 100 * FP32, distances


@pytest.mark.parametrize("mutant", [positions_run_on, predicted_by_the_row_neighbour], ids=lambda value: value.__name__)
def test_a_wrong_layout_is_noticed(mutant):
    distances = mutated_distances("first token labelled", pack=mutant)
    assert min(distances.values()) > 100 * FP32, distances
