"""The TSM's prediction in words: the likeliest class of the right task, several of a multi-label one."""

import pytest
import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.predicted import predicted_answer, task_of

TASKS = {
    "one": {"choices": ["a", "b", "c"], "multi_label": False},
    "many": {"choices": ["p", "q", "r"], "multi_label": True},
}


@pytest.mark.parametrize(
    ("task", "logits", "answer"),
    [
        ("one", [0.1, 0.3, 0.2, 9, 9, 9], "b."),  # other tasks' columns do not count
        ("one", [-3, -2, -1, 9, 9, 9], "c."),
        ("many", [9, 9, 9, 1, -1, 2], "p, r."),
        ("many", [9, 9, 9, -1, 0.5, -2], "q."),
        ("many", [9, 9, 9, -1, -0.5, -2], "no finding."),
    ],
)
def test_it_is_the_answer_that_training_data_would_hold(task, logits, answer):
    assert predicted_answer(TASKS, torch.tensor(logits, dtype=torch.float32), task) == answer


def test_an_unknown_task_is_refused():
    with pytest.raises(VITaskError, match="knows no task 'other'; it was made for one, many"):
        predicted_answer(TASKS, torch.zeros(6), "other")


def test_which_task_answers_for_data_of_another_name():
    assert task_of(TASKS, "many") == "many"
    alone = {"one": TASKS["one"]}
    assert task_of(alone, "one") == task_of(alone, "external") == task_of(alone, None) == "one"
    for wanted in ("external", None):
        with pytest.raises(VITaskError, match="knows the tasks one, many, and which of them"):
            task_of(TASKS, wanted)
