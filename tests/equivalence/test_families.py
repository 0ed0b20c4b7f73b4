"""Every family of the HF host: two processes and ZeRO give the curve of one; a killed run ends as if it were not.

Stage 1 with all weights trained, and what a real run adds to it at once: stage 2, gradient checkpointing and LoRA.
Qwen3-VL stands in the table of `cases` with every way to train, its stage 1 among them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import hf_runs
import pytest
import torch
from cases import FP32
from curves import apart, assert_identical, astray, history
from ranks import launch
from safetensors.torch import load_file

from vitask_plugin.hf.tiny import FAMILIES
from vitask_plugin.record.connector_file import CONNECTOR_FILE

OTHERS = [family for family in FAMILIES if family != "qwen3_vl"]
SAVING = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")
WAYS = ("ddp", "zero2", "zero3")
STEPS = 2  # of stage 2: what the first one leaves to Adam and to the weights is in the second
LATER = ("--vitask_stage", "2", "--gradient_checkpointing", "True", "--max_steps", str(STEPS))
LATER += ("--vitask_crt_weight", "1")  # as `cases`: the term that moves the weights far


@dataclass(frozen=True)
class Run:
    """A step is of 8 samples, on one process or on two. Stage 2 recomputes activations and follows one stage 1."""

    family: str
    way: str
    tuning: str = "full"
    stage: int = 1

    def __str__(self) -> str:
        return f"{self.family}-{self.way}-{self.tuning}-{self.stage}"

    @property
    def processes(self) -> int:
        return 1 if self.way == "one" else 2

    @property
    def earlier(self) -> "Run":
        return replace(self, way="one", stage=1)

    @property
    def reference(self) -> "Run":
        return replace(self, way="one")


@pytest.fixture(scope="module")
def command(tiny_hf, sized_mixture, sized_mixture_features, zero, outputs) -> Callable[..., list[str]]:
    """(run, output, flags...) to a command line."""

    def make(run: Run, output: Path, *more: str) -> list[str]:
        model = tiny_hf(run.family).folder
        flags = ["--per_device_train_batch_size", str(8 // run.processes)]
        flags += hf_runs.LORA if run.tuning == "lora" else []
        flags += ["--deepspeed", zero(run.way)] if run.way.startswith("zero") else []
        if run.stage == 2:
            earlier = outputs[run.earlier]
            flags += [*LATER, "--vitask_connector_path", str(earlier)]
            model = earlier if run.tuning == "full" else model
        return hf_runs.vitask(model, sized_mixture, sized_mixture_features, output, *flags, *more)

    return make


@pytest.fixture(scope="module")
def outputs() -> dict[Run, Path]:
    return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, outputs) -> Callable[[Run], Path]:
    """A run to its output, made when first asked for. Read only."""
    root = tmp_path_factory.mktemp("families")

    def of(run: Run) -> Path:
        if run not in outputs:
            if run.stage == 2:
                of(run.earlier)
            outputs[run] = hf_runs.train(command(run, root / str(run)), run.processes)
        return outputs[run]

    return of


def moves(output: Path) -> Path:
    """What `witness` saw move."""
    return output.parent / f"log-{output.name}" / "rank-0.pt"


def assert_one_curve(run: Run, finished: Callable[[Run], Path]) -> None:
    losses, largest, mean = apart(finished(run), finished(run.reference))
    assert max(losses.values()) <= FP32.loss, losses
    assert largest <= FP32.weight and mean <= FP32.mean
    assert astray(moves(finished(run)), moves(finished(run.reference))) <= FP32.moved


def assert_killed_and_started_again(
    run: Run, step: int, finished: Callable[[Run], Path], command, folder: Path
) -> None:
    whole = finished(run)
    same = command(run, folder / "killed", *SAVING)
    killed = launch(2, same, folder / "logs-killed", kill_at=(1, step), host="hf")
    assert killed.statuses[1] == -9, killed.text
    again = launch(2, same, folder / "logs-again", host="hf")
    assert again.statuses == [0, 0] and "resuming from" in again.text, again.text
    left = len(history(whole)) - (step - 1)
    assert [len(json.loads(log.with_suffix(".json").read_text())["batches"]) for log in again.logs] == [left, left]
    assert_identical(folder / "killed", whole)


# Stage 1 with all weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", OTHERS)
def test_two_processes_give_the_curve_of_one(family, way, finished):
    assert_one_curve(Run(family, way), finished)


@pytest.mark.parametrize("family", OTHERS)
def test_killed_and_started_again(family, finished, command, tmp_path):
    assert_killed_and_started_again(Run(family, "ddp"), 3, finished, command, tmp_path)


# Stage 2 with gradient checkpointing -------------------------------------------------------------------------------

LATER_RUNS = [Run(family, way, tuning, 2) for family in FAMILIES for tuning in ("lora", "full") for way in WAYS]


@pytest.mark.parametrize("run", LATER_RUNS, ids=str)
def test_stage_2_on_two_processes_gives_the_curve_of_one(run, finished):
    assert_one_curve(run, finished)
    log = history(finished(run))
    assert len(log) == STEPS and all("loss_crt" in entry for entry in log)
    assert abs(log[0]["loss"] - log[-1]["loss"]) > 10 * FP32.loss  # another step would be found out
    first, second = (load_file(output / CONNECTOR_FILE) for output in (finished(run.earlier), finished(run)))
    assert all(torch.equal(second[name], first[name]) for name in first)


KILLED = [Run(family, "zero2", "lora", 2) for family in FAMILIES]
KILLED += [Run(family, "zero3", "full", 2) for family in ("llava_onevision", "gemma3")]


@pytest.mark.parametrize("run", KILLED, ids=str)
def test_stage_2_killed_and_started_again(run, finished, command, tmp_path):
    assert_killed_and_started_again(run, STEPS, finished, command, tmp_path)
