"""Runs with --vitask_class_balance and --vitask_set_temperature: what is drawn is said before the first step.

It is the same on any number of processes, after a kill, and on both hosts.
"""

import json

import hf_runs
import pytest
from curves import apart, history
from ranks import launch
from saved import finish, sentences

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.training.balance import balance_of, lines

BALANCED = ("--vitask_class_balance", "1", "--vitask_set_temperature", "2")
TWO_EPOCHS = ("--num_train_epochs", "2", "--save_steps", "3")


def said(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("vitask: an epoch ")]


def test_two_processes_that_are_killed_draw_what_one_draws(command, tmp_path):
    """LLaVA, stage 1, where no negative asks for an order; killed in the second epoch."""
    log = finish(1, command(tmp_path / "one", "ddp", 1, "full", *BALANCED, *TWO_EPOCHS))
    two = command(tmp_path / "two", "ddp", 2, "full", *BALANCED, *TWO_EPOCHS)
    killed = launch(2, two, tmp_path / "killed", kill_at=(1, 7))
    assert killed.statuses[1] == -9, killed.text
    again = launch(2, two, tmp_path / "again")
    assert again.statuses == [0, 0], again.text
    batches = json.loads(again.logs[0].with_suffix(".json").read_text())["batches"]
    assert len(batches) == 2  # from checkpoint-6
    losses, largest, _ = apart(tmp_path / "two", tmp_path / "one")
    assert len(history(tmp_path / "two")) == 8 and max(losses.values()) < 1e-5 and largest < 1e-4
    expected = [
        "vitask: an epoch draws 26 samples for the 26 of vitask_drawn: ",
        "vitask: an epoch holds data without a task as it is: 6 samples",
    ]
    for text in (log, again.logs[0].read_text()):
        assert [line[: len(start)] for line, start in zip(sorted(said(text)), expected, strict=True)] == expected
    assert not said(again.logs[1].read_text())
    # Another order is another run.
    other = launch(2, [*two, "--vitask_set_temperature", "3"], tmp_path / "other")
    assert "a run with --vitask_class_balance 1 and --vitask_set_temperature 2, this one has" in sentences(other)[0]


def test_the_other_host_with_negatives(tiny_hf, mixture, mixture_features, tmp_path):
    """Stage 2; CRT's sampler and the same draws on one and on two processes."""
    flags = ("--vitask_stage", "2", "--vitask_ep", "none", *BALANCED)
    outputs = {}
    for count in (1, 2):
        batch = ("--per_device_train_batch_size", str(8 // count))
        outputs[count] = hf_runs.train(
            hf_runs.vitask(
                tiny_hf("llava").folder, mixture, mixture_features, tmp_path / f"hf-{count}", *flags, *batch
            ),
            count,
        )
    losses, largest, _ = apart(outputs[2], outputs[1])
    assert {"loss_vanilla", "loss_crt"} <= losses.keys()
    assert max(losses.values()) < 1e-5 and largest < 1e-4


def samples(counts: dict[tuple[str, object], int]) -> list[dict]:
    """`{(task, label): how many}`; task None: general data."""
    choices = ["a", "b", "c"]
    return [
        {}
        if task is None
        else {"vitask": {"task": task, "label": list(label) if type(label) is tuple else label, "choices": choices}}
        for (task, label), count in counts.items()
        for _ in range(count)
    ]


def flags(**values: float) -> VITaskArguments:
    return VITaskArguments(vitask=True, vitask_ep="none", **values)


def test_an_image_of_several_labels_counts_as_its_rarest():
    """b is there 4 times, a 12 times; two images have both, and three none."""
    data = samples({("chest", (0,)): 10, ("chest", (0, 1)): 2, ("chest", (1,)): 2, ("chest", ()): 3, (None, None): 5})
    balance = balance_of(data, flags(vitask_class_balance=1))
    assert {one.name: len(one.members) for one in balance.classes} == {"a": 10, "b": 4, "no finding": 3, None: 5}
    assert [*lines(balance)] == [
        "an epoch draws 17 samples for the 17 of chest: a 5.7 for 10, b 5.7 for 4, no finding 5.7 for 3",
        "an epoch holds data without a task as it is: 5 samples",
    ]


def test_off_is_off_and_the_temperature_alone_leaves_classes():
    data = samples({("large", 0): 60, ("large", 1): 21, ("small", 0): 6, ("small", 2): 3})
    assert balance_of(data, flags()) is None
    balance = balance_of(data, flags(vitask_set_temperature=2))
    assert [*lines(balance)] == [  # the roots of 81 and 9 are as 3 to 1
        "an epoch draws 68 samples for the 81 of large: a 50 for 60, b 18 for 21",
        "an epoch draws 22 samples for the 9 of small: a 15 for 6, c 7.5 for 3",
    ]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"vitask_class_balance": -0.5}, "--vitask_class_balance is -0.5; it must be from 0 .off. to 1"),
        ({"vitask_class_balance": float("nan")}, "--vitask_class_balance is nan"),
        ({"vitask_class_balance": 2}, "--vitask_class_balance is 2"),
        ({"vitask_set_temperature": 0.5}, "--vitask_set_temperature is 0.5; it must be 1 .off. or more"),
        ({"vitask_set_temperature": float("inf")}, "--vitask_set_temperature is inf"),
    ],
)
def test_values_that_cannot_work(values, sentence):
    with pytest.raises(VITaskError, match=sentence):
        flags(**values)
