"""What the self-test compares on LLaVA: each engine's branches with upstream's forward of each branch alone."""

import pytest
import torch

from vitask_plugin.llava.loading import load
from vitask_plugin.method import attention
from vitask_plugin.method.connector import build_connector
from vitask_plugin.training import selftest

KINDS = {
    "cls": {},
    "all": {"vitask_ep": "all"},
    "replace": {"vitask_ep": "replace"},
    "learned": {"vitask_ep": "learned"},
    "text": {"vitask_ep": "text"},
    "none": {"vitask_ep": "none"},
}


@pytest.fixture
def differs(build, tiny_checkpoint):
    """(kind, engine) to the difference that the self-test goes by, on weights that make attention sharp."""

    def measure(kind: str, engine: str) -> float:
        dataset, collator = build(vitask_stage=2, vitask_engine=engine, **KINDS[kind])
        from vitask_plugin.llava import reference

        model, vitask = load(tiny_checkpoint).model, collator.vitask
        model.config.tokenizer_padding_side, connector = "right", None
        torch.manual_seed(0)
        if vitask.uses_connector:
            width = collator.exemplars.of(dataset.first_task_sample).shape[-1]
            made_as = "learned" if kind == "learned" else "mlp2x_gelu"
            connector = build_connector(made_as, width, model.config.hidden_size)
        model.connect(vitask, connector)
        with torch.no_grad():
            for weight in model.model.layers.parameters():
                weight.mul_(8 if weight.ndim > 1 else 1)
            pair = next(dataset.pairs(True))
            expected = reference.pair_logits(model, collator, pair, lambda tensor: tensor)
            batch = collator([dataset[item] for item in pair])
            inputs = {name: value for name, value in batch.items() if name != "vitask"}
            logits = model.vitask_logits(**inputs, **batch["vitask"])
        branches = batch["vitask"]["branches"]
        places = {"plain": branches.plain, "prompted": branches.prompted, "negative": branches.negative}
        assert expected.keys() == {"plain", "negative", *(["prompted"] if vitask.uses_exemplar else [])}
        return max(selftest.difference(logits[places[name]], stock) for name, stock in expected.items())

    return measure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["packed", "branches"])
def test_both_engines_give_upstreams_numbers(kind, engine, differs):
    assert differs(kind, engine) <= 0.1 * selftest.FLOAT32_BOUND


def test_branches_that_see_each_other_are_noticed(differs, monkeypatch):
    monkeypatch.setattr(attention, "visible", lambda query, key, until: (key <= query) & (until > 0))
    assert differs("cls", "packed") > 100 * selftest.FLOAT32_BOUND
    assert differs("cls", "branches") <= 0.1 * selftest.FLOAT32_BOUND
