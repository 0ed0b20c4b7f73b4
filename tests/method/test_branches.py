"""The mask and the layouts by their definitions: who sees whom, positions, what predicts, and one document apart."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import reference
import torch
from branch_cases import CASES, ENGINES, FP32, VOCABULARY, WIDTH, decoder_of, distance, make, pieces
from reference import IGNORE
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.method import attention as attention_masks
from vitask_plugin.method.branches import LAYOUTS, Continuation, Document, Packed, all_targets, common, targets


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


def test_the_cases_hold_what_they_claim():
    """The table is not vacuous: each kind of sample that must train is in it."""
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
