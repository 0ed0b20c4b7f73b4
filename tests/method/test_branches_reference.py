"""Packed equals branch by branch equals one plain forward per (sample, branch): logits, losses and gradients.

The truth is `reference.step`, which knows neither masks nor packing. Both engines are compared with it on every case
below, with multi-head and grouped-query attention, under sdpa and eager.
"""

from dataclasses import replace

import pytest
import reference
import torch
from branch_cases import (
    ATTENTION,
    BF16,
    CASES,
    ENGINES,
    FP32,
    HEADS,
    VOCABULARY,
    cached_truth,
    compare,
    denominator,
    distance,
    make,
    run,
    truth,
)
from torch import Tensor

from vitask_plugin.method import attention as attention_masks
from vitask_plugin.method.branches import Packed


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
