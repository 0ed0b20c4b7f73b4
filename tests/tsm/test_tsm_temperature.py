"""The temperature of a TSM: what it is fitted on, that it is the best one, and that nothing else changes by it."""

import json

import numpy as np
import pytest
import torch
from pictures import write_task

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.joint import arranged, joint_loss
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.temperature import HIGHEST, LOWEST, ece, fitted
from vitask_plugin.tsm.train import Settings, train
from vitask_plugin.tsm.validation import Answers

TASKS = arranged(
    {
        "one": {"choices": ["a", "b", "c"], "multi_label": False},
        "many": {"choices": ["p", "q"], "multi_label": True},
    }
)


def answers(sharpness: float) -> Answers:
    """Labels drawn from the logits' own probabilities, and logits that were then made `sharpness` times as large."""
    generator = torch.Generator().manual_seed(0)
    logits, task = 2 * torch.randn(3000, 5, generator=generator), torch.arange(3000) % 2
    targets = torch.zeros(3000, 5)
    chosen = torch.multinomial(logits[:, :3].softmax(1), 1, generator=generator)
    targets[:, :3].scatter_(1, chosen, 1)
    targets[:, 3:] = torch.bernoulli(logits[:, 3:].sigmoid(), generator=generator)
    return Answers(sharpness * logits, targets, task, torch.zeros(3000), torch.zeros(3000))


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_it_finds_how_much_too_sure_the_logits_are(sharpness):
    found = answers(sharpness)
    record = fitted(found, TASKS)
    assert record["value"] == pytest.approx(sharpness, rel=0.06) and record["images"] == 3000
    assert record["nll"]["after"] <= record["nll"]["before"] and record["ece"]["after"] < 0.03
    assert sharpness == 1.0 or record["ece"]["before"] > 0.08

    def loss(temperature: float) -> float:  # the mean over the tasks, on a grid
        each = joint_loss(found.logits / temperature, found.targets, found.task, TASKS)
        return np.mean([each[found.task == number].mean().item() for number in (0, 1)])

    grid = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 400))
    assert record["nll"]["after"] <= min(map(loss, grid)) + 1e-6
    assert record["nll"]["after"] == pytest.approx(loss(record["value"]), abs=1e-6)


def test_where_all_is_right_it_ends_at_the_lowest():
    logits = 5 * torch.eye(3).repeat(4, 1)
    found = Answers(logits, torch.eye(3).repeat(4, 1), torch.zeros(12, dtype=torch.int64), logits[:, 0], logits[:, 0])
    tasks = {"one": {"choices": ["a", "b", "c"], "multi_label": False}}
    assert fitted(found, tasks)["value"] == pytest.approx(LOWEST, rel=1e-6)


def test_the_calibration_error_is_the_gap_between_confidence_and_frequency():
    logits = torch.log(torch.tensor([[0.8, 0.2]] * 10))
    targets = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5)
    found = Answers(logits, targets, torch.zeros(10, dtype=torch.int64), logits[:, 0], logits[:, 0])
    assert ece(found, {"t": {"choices": ["a", "b"], "multi_label": False}}, 1.0) == pytest.approx(0.3)


def test_a_trained_tsm_has_one_that_is_used_when_asked_for(tmp_path):
    for split, count in (("train", 12), ("val", 9)):
        write_task(tmp_path, "three", ["red", "green", "blue"], count, split=split)
    settings = Settings(arch="test_resnet", image_size=32, batch_size=6, device="cpu", epochs=2)
    files = [[tmp_path / f"three-{split}.json"] for split in ("train", "val")]
    tsm = train(settings, *files, [tmp_path / "images"], tmp_path / "tsm")
    record = json.loads((tmp_path / "tsm/tsm.json").read_text())["temperature"]
    best = json.loads((tmp_path / "tsm/metrics.json").read_text())["best"]
    assert record["images"] == 9 and record["nll"]["before"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert record["nll"]["after"] <= record["nll"]["before"] and record["value"] != 1
    logits = torch.randn(4, 3)
    assert torch.equal(tsm.probabilities(logits, "three"), logits.softmax(1))
    assert torch.allclose(tsm.probabilities(logits, "three", calibrated=True), (logits / record["value"]).softmax(1))
    # It changes nothing that the TSM computes, so features of a TSM without one are still its own.
    without = {key: value for key, value in tsm.record.items() if key != "temperature"}
    bare = TSM(tsm.backbone.network, without)
    assert bare.hash == tsm.hash
    with pytest.raises(VITaskError, match="the TSM 'test_resnet' has no temperature"):
        bare.probabilities(logits, "three", calibrated=True)
