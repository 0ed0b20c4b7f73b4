"""The other families of the HF host: two processes and ZeRO give the curve of one; a killed run ends as if it were not.

Qwen3-VL stands in the table of `cases` with every way to train; here each other family is trained in four.
"""

import hf_runs
import pytest
from cases import FP32
from curves import apart, assert_identical
from ranks import launch

from vitask_plugin.hf.tiny import FAMILIES

OTHERS = [family for family in FAMILIES if family != "qwen3_vl"]
SAVING = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")
HALF = ("--per_device_train_batch_size", "4")  # on each of two processes
WAYS = {"ddp": (), "zero2": ("zero2",), "zero3": ("zero3",)}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny_hf, sized_mixture, sized_mixture_features, zero):
    """(family, way, flags...) to the output of stage 1 with all weights trained. Read only."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def command(family: str, output, *more: str) -> list[str]:
        return hf_runs.vitask(tiny_hf(family).folder, sized_mixture, sized_mixture_features, output, *more)

    def run(family: str, way: str):
        if (family, way) not in made:
            deepspeed = [word for stage in WAYS.get(way, ()) for word in ("--deepspeed", zero(stage))]
            more = [*HALF, *deepspeed] if way in WAYS else []
            made[family, way] = hf_runs.train(command(family, root / f"{family}-{way}", *more), 1 + (way in WAYS))
        return made[family, way]

    run.command = command
    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", OTHERS)
def test_two_processes_give_the_curve_of_one(family, way, outputs):
    losses, largest, mean = apart(outputs(family, way), outputs(family, "one"))
    assert max(losses.values()) <= FP32.loss, losses
    assert largest <= FP32.weight and mean <= FP32.mean


@pytest.mark.parametrize("family", OTHERS)
def test_killed_and_started_again(family, outputs, tmp_path):
    same = outputs.command(family, tmp_path / "killed", *HALF, *SAVING)
    killed = launch(2, same, tmp_path / "logs-killed", kill_at=(1, 3), host="hf")
    assert killed.statuses[1] == -9, killed.text
    again = launch(2, same, tmp_path / "logs-again", host="hf")
    assert again.statuses == [0, 0] and "resuming from" in again.text, again.text
    assert_identical(tmp_path / "killed", outputs(family, "ddp"))
