"""The TSM's opinion, put in the order of the model's labels."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trained import make_tsm

from vitask_plugin.data.instructions import DRAWN, LabelSet
from vitask_plugin.errors import VITaskError
from vitask_plugin.serve.judging import Judge


def judge_of(folder: Path, task: str, choices: tuple[str, ...]) -> Judge:
    """With a TSM of the drawn labels, and a model of these."""
    specialist = SimpleNamespace(tsm=make_tsm(folder), task=task, classes=choices)
    return Judge(specialist)


def test_labels_are_matched_by_their_looks(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, "external", tuple(name.upper() for name in reversed(DRAWN.choices)))
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    found = judge._of_tsm(logits)
    likely = logits.softmax(1)[0].tolist()
    assert list(found.probabilities) == [name.upper() for name in reversed(DRAWN.choices)]
    assert list(found.probabilities.values()) == pytest.approx(likely[::-1])
    assert found.label == max(found.probabilities, key=found.probabilities.get)


def test_the_temperature_that_was_fitted_is_used(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, DRAWN.task, DRAWN.choices)
    judge.tsm.record["temperature"] = {"value": 2.0}
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    assert list(judge._of_tsm(logits).probabilities.values()) == pytest.approx((logits / 2).softmax(1)[0].tolist())


def test_a_tsm_of_other_labels_is_refused(tmp_path: Path) -> None:
    other = LabelSet(**{**vars(DRAWN), "task": "other", "choices": ("one", "two")})
    with pytest.raises(VITaskError, match=r"no task with the labels one, two of task 'other', but vitask_drawn \("):
        judge_of(tmp_path, other.task, other.choices)
