"""Which checkpoint a run goes on from, and from which it must not: one for all ranks, whatever each of them sees."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from curves import apart, assert_identical, history, weights
from ranks import free_port, launch
from saved import finish, sentences, tree

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import resuming, universal

STAGE_1 = VITaskArguments(vitask=True, vitask_features="features")
LOSS, WEIGHT = 1e-4, 2e-4  # nats per response token; after two steps at a learning rate of 1e-3


@pytest.fixture
def cut(whole, tmp_path):
    """Makes an output folder that holds the checkpoints of a finished run, as if it had been cut there."""

    def make(*case: object, steps: tuple[int, ...] = (2,)) -> Path:
        output = tmp_path / "llava-cut"
        for step in steps:
            shutil.copytree(whole(*case) / f"checkpoint-{step}", output / f"checkpoint-{step}")
        return output

    return make


def record_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "vitask.json").read_text())


# Which one -------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


DAMAGES = {
    "weights cut short": (lambda found: truncate(found / "model.safetensors"), "model.safetensors has 1000 of "),
    "optimizer cut short": (lambda found: truncate(found / "optimizer.pt"), "optimizer.pt has 1000 of "),
    "a file is missing": (lambda found: (found / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "record cut short": (lambda found: os.truncate(found / "vitask.json", 100), "is not readable JSON"),
    "hardly begun": (lambda found: [path.unlink() for path in found.iterdir() if path.is_file()], "or was cut short"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_said(name, cut, capsys):
    damage, why = DAMAGES[name]
    output = cut("ddp", 1, "full", steps=(2, 4))
    assert resuming.newest(output) == output / "checkpoint-4"
    assert capsys.readouterr().err == ""
    damage(output / "checkpoint-4")
    assert resuming.newest(output) == output / "checkpoint-2"
    said = capsys.readouterr().err
    assert "checkpoint-4 in" in said and why in said and "going on from checkpoint-2" in said
    assert (output / "checkpoint-4").is_dir()
    shutil.rmtree(output / "checkpoint-2")
    with pytest.raises(VITaskError, match="nothing is left to go on from") as refused:
        resuming.newest(output)
    assert why in str(refused.value) and "remove them to start anew" in str(refused.value)


def test_no_checkpoint_is_no_reason_to_stop(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-2").touch()
    assert resuming.newest(tmp_path) is None
    assert resuming.newest(tmp_path / "absent") is None


def test_weights_alone_are_not_gone_on_from(cut):
    output = cut("ddp", 1, "full")
    record = record_of(output / "checkpoint-2")
    del record["files"]["optimizer.pt"]
    (output / "checkpoint-2" / "vitask.json").write_text(json.dumps(record))
    with pytest.raises(VITaskError, match="--save_only_model"):
        resuming.newest(output)


# Whether this run continues it -------------------------------------------------------------------------------------

REFUSED = {
    "more samples per step": ({"batch": 16}, "8 samples per step, this one has 16 samples per step"),
    "LoRA": ({"lora": True}, "all weights trained, this one has LoRA"),
    "another order": ({"seed": 7}, "--seed 42, this one has --seed 7"),
    "DeepSpeed": ({"zero_stage": 2}, "no DeepSpeed, this one has DeepSpeed ZeRO-1 or 2"),
    "without DeepSpeed": ({"zero_stage": None}, "DeepSpeed ZeRO-1 or 2, this one has no DeepSpeed"),
    "2 to 3": ({"zero_stage": 3}, "DeepSpeed ZeRO-1 or 2, this one has DeepSpeed ZeRO-3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused(name, whole):
    change, why = REFUSED[name]
    case = ("zero2", 2, "full") if "ZeRO-1 or 2, this" in why else ("ddp", 1, "full")
    checkpoint = whole(*case) / "checkpoint-2"
    run = record_of(checkpoint)["run"]
    assert resuming.check(checkpoint, STAGE_1, run) is False
    with pytest.raises(VITaskError, match="is of a run with") as refused:
        resuming.check(checkpoint, STAGE_1, run | change)
    assert why in str(refused.value) and str(checkpoint) in str(refused.value)


def test_what_has_to_be_converted(whole):
    def converted(case: tuple, **change: object) -> bool:
        checkpoint = whole(*case) / "checkpoint-2"
        return resuming.check(checkpoint, STAGE_1, record_of(checkpoint)["run"] | change)

    one, two = ("ddp", 1, "full"), ("zero2", 2, "full")
    assert not converted(one, processes=4, batch=1, accumulation=2)
    assert not converted(two) and not converted(two, batch=2, accumulation=2)
    assert converted(two, zero_stage=1)
    assert converted(two, processes=1, batch=8)


# Going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_fewer_processes_go_on_and_pass_over_what_is_damaged(cut, whole, command):
    output = cut("ddp", 2, "full", steps=(2, 4))
    truncate(output / "checkpoint-4" / "model.safetensors")
    printed = finish(1, command(output, "ddp", 1))
    assert "passed over: model.safetensors has 1000 of" in printed and "going on from checkpoint-2" in printed
    losses, largest, _ = apart(output, whole("ddp", 2, "full"))
    assert max(losses.values()) < LOSS and largest < WEIGHT
    # It was written anew, and by one process.
    assert record_of(output / "checkpoint-4")["run"]["processes"] == 1
    assert resuming.newest(output) == output / "checkpoint-4"


@pytest.mark.compat
@pytest.mark.parametrize(
    ("case", "parallel"), [(("zero2", 2, "full"), "zero1"), (("zero3", 2, "lora"), "zero3")], ids=("2 to 1", "3 to 3")
)
def test_deepspeed_goes_on_with_more_processes(case, parallel, cut, whole, command):
    output = cut(*case)
    printed = finish(4, command(output, parallel, 4, case[2]))
    assert printed.count("converting") == 1
    losses, largest, _ = apart(output, whole(*case))
    assert len(history(output)) == 4
    assert max(losses.values()) < LOSS and largest < WEIGHT
    # The parts that it was made from are still there, for the number of processes that they are of.
    assert resuming.newest(output) == output / "checkpoint-4"
    found = tree(output / "checkpoint-2")
    assert found.items() >= record_of(output / "checkpoint-2")["files"].items()
    assert "latest_universal" in found


def test_what_deepspeed_cannot_convert_ends_every_rank_with_one_sentence(cut, command, tmp_path):
    output = cut("zero2", 2, "full")
    before = tree(output)
    ended = launch(2, command(output, "zero3", 2), tmp_path / "logs")
    assert ended.statuses.count(1) >= 1 and 0 not in ended.statuses
    said = sentences(ended)
    assert len(said) == 1 and "DeepSpeed ZeRO-1 or 2, this one has DeepSpeed ZeRO-3" in said[0], ended.text
    assert tree(output) == before


def test_a_failed_conversion_leaves_nothing_and_says_why(cut):
    output = cut("zero2", 2, "full")
    before = tree(output)
    parts = next((output / "checkpoint-2").glob("global_step2/zero_pp_rank_1*"))
    truncate(parts)
    sentence = universal._convert(output / "checkpoint-2")
    assert "could not convert" in sentence and "\n" not in sentence
    assert "Traceback" not in sentence
    assert tree(output).keys() == before.keys()


def two_nodes(outputs: list[Path], arguments: list[str]) -> list[str]:
    """A process on each of two nodes that see different folders; what each printed."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank, output in enumerate(outputs):
        line = [sys.executable, "-m", "vitask_plugin.llava.train", *arguments, "--output_dir", str(output)]
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(line, env=environment, **pipes))
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in printed)
    return printed


def test_nodes_with_disks_of_their_own_agree(whole, command, tmp_path):
    """Each writes and reads its own part; the second lost its last checkpoint, and both go on from the one before."""
    outputs = [tmp_path / node / "llava" for node in ("first", "second")]
    same = command(outputs[0], "zero2", 2, "full", "--save_on_each_node", "True")
    two_nodes(outputs, same)
    for rank, output in enumerate(outputs):
        parts = {path.name for path in (output / "checkpoint-2" / "global_step2").glob("*_optim_states.pt")}
        assert parts == {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"}
        assert resuming.newest(output) == output / "checkpoint-4"
        assert_same_weights(output, whole("zero2", 2, "full"))
        (output / "model.safetensors").unlink()
    shutil.rmtree(outputs[1] / "checkpoint-4")
    printed = two_nodes(outputs, same)
    assert "checkpoint-4 in" in printed[0] and "it is not there (rank 1)" in printed[0]
    for output in outputs:
        assert_same_weights(output, whole("zero2", 2, "full"))
    assert_identical(outputs[0], whole("zero2", 2, "full"))


def assert_same_weights(output: Path, reference: Path) -> None:
    found, expected = weights(output), weights(reference)
    assert found.keys() == expected.keys() and len(expected) > 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_on_several_disks_are_not_converted(tmp_path):
    config: dict = {}
    args = SimpleNamespace(save_on_each_node=True, process_index=0)
    with pytest.raises(VITaskError, match="no node has all of its parts to convert"):
        universal.prepare(tmp_path, args, config, convert=True)
    universal.prepare(tmp_path, args, config, convert=False)
    assert config == {"checkpoint": {"use_node_local_storage": True}}
