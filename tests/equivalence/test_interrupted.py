"""A run that lost a rank to SIGKILL in the middle of a step, and was started again, ends as the one that did not."""

import json
import random

import pytest
from cases import Case
from curves import assert_identical
from mixture import STEPS
from ranks import launch

CASES = [
    Case("zero2", 1, "full", "whole", "packed", False, "fp32"),
    Case("zero2", 2, "lora", "whole", "packed", True, "fp32"),
    Case("zero3", 2, "full", "accumulated", "packed", True, "fp32"),
    Case("ddp", 2, "full", "accumulated", "packed", False, "fp32", "hf"),
    Case("zero3", 2, "lora", "whole", "packed", True, "fp32", "hf"),
]
SAVING = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_killed_at_a_random_step_and_started_again(case, runs, command, tmp_path):
    rank, step = random.randrange(2), random.randint(2, STEPS)  # other ones in every session
    what = f"rank {rank} got SIGKILL in step {step} of {STEPS}\n"
    output = tmp_path / f"{case.host}-killed"
    start = case.start(runs(case.earlier).output) if case.stage == 2 else []
    same = command(case.parallel, output, *case.flags, *start, *SAVING, host=case.host)
    killed = launch(2, same, tmp_path / "logs-killed", kill_at=(rank, step), host=case.host)
    assert killed.statuses[rank] == -9, what + killed.text
    assert not (output / "trainer_state.json").exists()
    assert max(int(path.name[len("checkpoint-") :]) for path in output.glob("checkpoint-*")) == step - 1
    again = launch(2, same, tmp_path / "logs-again", host=case.host)
    assert again.statuses == [0, 0], what + again.text
    # It went on, and did not begin anew.
    for log in again.logs:
        batches = json.loads(log.with_suffix(".json").read_text())["batches"]
        assert len(batches) == (STEPS - (step - 1)) * (2 if case.split == "accumulated" else 1)
    assert_identical(output, runs(case).output)
