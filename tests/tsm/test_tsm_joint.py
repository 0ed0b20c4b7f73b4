"""One head, several tasks: the loss and the accuracy of a sample see its own task's columns and nothing else."""

import math

import pytest
import torch

from vitask_plugin.data.instructions import label_sets
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.joint import (
    arranged,
    class_count,
    columns,
    correctness,
    joint_loss,
    nearly_sharing,
    sharing,
    target_row,
)

TASKS = {
    "three": {"choices": ["a", "b", "c"], "multi_label": False},
    "several": {"choices": ["p", "q", "r", "s"], "multi_label": True},
    "two": {"choices": ["x", "y"], "multi_label": False},
}
NAMES = list(TASKS)
SAMPLES = [("three", 2), ("several", [0, 3]), ("two", 0), ("several", []), ("three", 0), ("two", 1), ("several", [1])]


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(SAMPLES), 9, generator=generator) * 3
    targets = torch.stack([target_row(TASKS, task, label) for task, label in SAMPLES])
    return logits.requires_grad_(), targets, torch.tensor([NAMES.index(task) for task, _ in SAMPLES])


def reference_loss(row: list[float], task: str, label: int | list[int]) -> float:
    """In plain Python, from the definitions."""
    start = {"three": 0, "several": 3, "two": 7}[task]
    own = row[start : start + len(TASKS[task]["choices"])]
    if isinstance(label, list):
        terms = []
        for index, value in enumerate(own):
            probability = 1 / (1 + math.exp(-value))
            terms.append(-math.log(probability if index in label else 1 - probability))
        return sum(terms) / len(terms)
    return -math.log(math.exp(own[label]) / sum(math.exp(value) for value in own))


def test_loss_equals_the_reference():
    logits, targets, task = batch()
    expected = [reference_loss(row, *sample) for row, sample in zip(logits.tolist(), SAMPLES, strict=True)]
    torch.testing.assert_close(joint_loss(logits, targets, task, TASKS), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_other_tasks_logits_get_no_gradient_at_all():
    for index, (name, _) in enumerate(SAMPLES):
        logits, targets, task = batch(seed=index)
        joint_loss(logits, targets, task, TASKS)[index].backward()
        own = torch.zeros_like(logits, dtype=torch.bool)
        own[index, columns(TASKS, name)] = True
        assert logits.grad[~own].eq(0).all()
        assert logits.grad[own].ne(0).all()


def test_other_tasks_logits_do_not_change_the_loss():
    logits, targets, task = batch()
    before = joint_loss(logits, targets, task, TASKS)
    changed = logits.detach().clone()
    for index, (name, _) in enumerate(SAMPLES):
        kept = changed[index, columns(TASKS, name)].clone()
        changed[index] = 1e4
        changed[index, columns(TASKS, name)] = kept
    assert torch.equal(joint_loss(changed, targets, task, TASKS), before)


def test_a_batch_of_one_task_is_plain_cross_entropy():
    logits, _, _ = batch()
    targets = torch.stack([target_row(TASKS, "two", index % 2) for index in range(len(SAMPLES))])
    found = joint_loss(logits, targets, torch.full((len(SAMPLES),), 2), TASKS)
    labels = torch.arange(len(SAMPLES)) % 2
    assert torch.allclose(found, torch.nn.functional.cross_entropy(logits[:, 7:9], labels, reduction="none"))


def test_correctness_looks_at_own_classes_only():
    logits = torch.full((3, 9), 9.0)
    logits[0, 0:3] = torch.tensor([0.0, 1.0, 2.0])
    logits[1, 3:7] = torch.tensor([1.0, -1.0, -1.0, -1.0])
    logits[2, 7:9] = torch.tensor([1.0, 0.0])
    targets = torch.stack(
        [target_row(TASKS, "three", 2), target_row(TASKS, "several", [0, 3]), target_row(TASKS, "two", 1)]
    )
    assert correctness(logits, targets, torch.tensor([0, 1, 2]), TASKS).tolist() == [1.0, 0.75, 0.0]


def test_columns_follow_the_order_of_the_tasks():
    assert class_count(TASKS) == 9
    assert [columns(TASKS, name) for name in NAMES] == [slice(0, 3), slice(3, 7), slice(7, 9)]
    with pytest.raises(VITaskError, match="knows no task 'four'; it was made for three, several, two"):
        columns(TASKS, "four")


def medmnist() -> dict[str, dict]:
    sets = [known for known in label_sets().values() if known.task.startswith("medmnist_")]
    assert len(sets) == 12
    return {known.task: {"choices": list(known.choices), "multi_label": known.multi_label} for known in sets}


def test_the_twelve_sets_have_the_papers_70_columns():
    tasks = arranged(medmnist())
    assert class_count(tasks) == 70
    assert sharing(tasks) == [["medmnist_organa", "medmnist_organc", "medmnist_organs"]]
    used = [set(range(70)[columns(tasks, name)]) for name in tasks]
    assert set().union(*used) == set(range(70)) and len({frozenset(own) for own in used}) == 10


def test_separate_heads_and_older_records_keep_92():
    for tasks in (medmnist(), arranged(medmnist(), separate=True)):
        assert class_count(tasks) == 92 and sharing(tasks) == []
        starts = [columns(tasks, name).start for name in tasks]
        sizes = [len(entry["choices"]) for entry in medmnist().values()]
        assert starts == [sum(sizes[:number]) for number in range(12)]


def test_samples_of_tasks_that_share_train_the_same_columns():
    tasks = arranged({name: {"choices": ["x", "y", "z"], "multi_label": False} for name in "ab"} | TASKS)
    assert columns(tasks, "a") == columns(tasks, "b") == slice(0, 3) and class_count(tasks) == 12
    logits = torch.zeros(2, 12, requires_grad=True)
    targets = torch.stack([target_row(tasks, "a", 1), target_row(tasks, "b", 1)])
    joint_loss(logits, targets, torch.tensor([0, 1]), tasks).sum().backward()
    assert torch.equal(logits.grad[0], logits.grad[1])
    assert logits.grad[0, 1] < 0 and logits.grad[:, 3:].eq(0).all()
    assert correctness(targets, targets, torch.tensor([0, 1]), tasks).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("other", "shares"),
    [
        ({"choices": ["benign", "malignant"], "multi_label": False}, True),
        ({"choices": ["benign\u200b", " malignant"], "multi_label": False}, True),
        ({"choices": ["malignant", "benign"], "multi_label": False}, False),
        ({"choices": ["benign", "malignant"], "multi_label": True}, False),
        ({"choices": ["benign", "malignant", "none"], "multi_label": False}, False),
        ({"choices": ["Benign", "malignant"], "multi_label": False}, False),
    ],
)
def test_only_the_same_labels_in_the_same_order_share(other, shares):
    tasks = arranged({"one": {"choices": ["benign", "malignant"], "multi_label": False}, "other": other})
    assert sharing(tasks) == ([["one", "other"]] if shares else [])
    assert class_count(tasks) == (2 if shares else 2 + len(other["choices"]))


def test_labels_that_nearly_share_are_found():
    choices = {
        "a": ["x", "y"],
        "b": ["y", "x"],
        "c": ["X", "y"],
        "d": ["x", "y"],
        "e": ["x", "y", "z"],
        "f": ["p", "q"],
    }
    entries = {name: {"choices": own, "multi_label": False} for name, own in choices.items()}
    tasks = arranged(entries | {"g": {"choices": ["x", "y"], "multi_label": True}})
    assert sharing(tasks) == [["a", "d"]] and nearly_sharing(tasks) == [["a", "b", "c", "d"]]
    assert nearly_sharing(arranged({"a": entries["a"], "d": entries["d"]})) == []


def test_labels_in_composed_and_decomposed_accents_share():
    one, other = ({"choices": [name, "mole"], "multi_label": False} for name in ("n\u00e9vus", "ne\u0301vus"))
    tasks = arranged({"a": one, "b": other})
    assert sharing(tasks) == [["a", "b"]] and class_count(tasks) == 2
    assert [entry["choices"][0] for entry in tasks.values()] == ["n\u00e9vus", "ne\u0301vus"]


def test_a_task_alone_is_recorded_as_it_always_was():
    alone = {"one": {"choices": ["x", "y"], "multi_label": False}}
    assert arranged(alone) == alone
