"""From one seed and the same data, one curve: whatever the processes, the ZeRO stage, the split and the engine."""

import pytest
import torch
from cases import CASES, Case, pairs, possible
from curves import apart, astray, history
from mixture import STEPS
from safetensors.torch import load_file

from vitask_plugin.model_folder import CONNECTOR_FILE


def test_every_two_values_meet():
    assert len(set(CASES)) == len(CASES)
    assert pairs(list(possible())) - pairs(CASES) == set()


@pytest.mark.parametrize("case", CASES, ids=str)
class TestCase:
    def test_one_curve(self, case: Case, runs):
        log = history(runs(case).output)
        assert len(log) == STEPS
        terms = {"loss", "loss_vanilla", "loss_ep", "loss_rda"} | ({"loss_crt"} if case.stage == 2 else set())
        assert all(terms <= entry.keys() for entry in log)
        losses, largest, mean = apart(runs(case).output, runs(case.reference).output)
        assert losses.keys() == terms
        assert max(losses.values()) <= case.bound.loss, losses
        assert largest <= case.bound.weight
        assert mean <= case.bound.mean
        assert astray(runs(case).moves, runs(case.reference).moves) <= case.bound.moved
        # The curve is not flat: another step would be found out.
        assert abs(log[0]["loss"] - log[-1]["loss"]) > 10 * case.bound.loss

    def test_what_is_frozen_stays_and_the_rest_learns(self, case: Case, runs):
        for rank in runs(case).ranks:
            weights = rank["weights"]
            same = {name for name, (before, after) in weights.items() if before == after}
            tower = {name for name in weights if name.startswith("vision_tower")}
            connector = {name for name in weights if "vitask_connector" in name}
            layers = {name for name in weights if ".layers." in name} - tower - connector
            assert tower and tower <= same
            # Computed with in the same dtype too: the values are those of the reference.
            reference = runs(case.reference).ranks[0]["weights"]
            assert {name: weights[name] for name in tower} == {name: reference[name] for name in tower}
            assert len(connector) == 4 and (case.stage == 2 or not connector & same)
            learnt = {name for name in layers if "lora_" in name} if case.tuning == "lora" else layers
            assert learnt - same
            # DeepSpeed's bfloat16 weights stand still while its float32 copies take steps below their next number.
            rounded = case.precision == "bf16" and case.parallel.startswith("zero")
            assert rounded or not learnt & same
            assert layers - learnt <= same
        assert all(rank["weights"] == runs(case).ranks[0]["weights"] for rank in runs(case).ranks)

    def test_one_forward_and_one_backward_of_the_engine_for_each_batch(self, case: Case, runs):
        batches = STEPS * (2 if case.split == "accumulated" else 1)
        for rank in runs(case).ranks:
            assert len(rank["batches"]) == batches
            expected = {"forward": batches, "backward": batches, "step": STEPS}
            assert rank["engine"] == (expected if case.parallel.startswith("zero") else {})


@pytest.mark.parametrize("case", [case for case in CASES if case.stage == 2], ids=str)
def test_stage_2_ends_with_the_connector_of_stage_1(case: Case, runs):
    first, second = (load_file(runs(each).output / CONNECTOR_FILE) for each in (case.earlier, case))
    # In a bfloat16 run DeepSpeed rounds every weight of the model, the frozen ones too.
    if case.precision == "bf16" and case.parallel.startswith("zero"):
        first = {name: weight.bfloat16() for name, weight in first.items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name].float(), first[name].float()) for name in first)
