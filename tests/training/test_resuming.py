"""Which checkpoint a run resumes from, and from which it must not: one for all ranks, whatever each of them sees."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from curves import apart, assert_identical, history, weights
from mixture import with_setting
from ranks import launch
from safetensors.torch import load_file
from saved import finish, sentences, tree

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.model_folder import CONNECTOR_FILE
from vitask_plugin.record.connector_file import load_connector
from vitask_plugin.training import disk, resuming, universal

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
    assert "checkpoint-4 in" in said and why in said and "resuming from checkpoint-2" in said
    assert (output / "checkpoint-4").is_dir()
    shutil.rmtree(output / "checkpoint-2")
    with pytest.raises(VITaskError, match="nothing is left to resume from") as refused:
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
    assert record["run"]["save_only_model"] is False
    record["run"]["save_only_model"] = True
    (output / "checkpoint-2" / "vitask.json").write_text(json.dumps(record))
    with pytest.raises(VITaskError, match="--save_only_model"):
        resuming.newest(output)


# Whether this run continues it -------------------------------------------------------------------------------------

REFUSED = {
    "more samples per step": ({"batch": 16}, "8 samples per step, this one has 16 samples per step"),
    "LoRA": ({"lora_r": 16}, "all weights trained, this one has LoRA of rank 16"),
    "another order": ({"seed": 7}, "--seed 42, this one has --seed 7"),
    "other groups": (
        {"group_by_modality_length": True},
        "--group_by_modality_length False, this one has --group_by_modality_length True",
    ),
    "other data": ({"data": "0" * 64}, "this one has data 000000000000; its place in the data would be another"),
    "other tokens": ({"tokens": "0" * 64}, "this one has tokens 000000000000; the same samples would be other tokens"),
    "another TSM": ({"tsm": "0" * 64}, "this one has TSM 000000000000; its exemplars would mean something else"),
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


def test_flags_that_may_change_are_named(whole):
    checkpoint = whole("ddp", 1, "full") / "checkpoint-2"
    run = record_of(checkpoint)["run"]
    assert resuming.changed(checkpoint, STAGE_1, run) == []
    vitask = dataclasses.replace(STAGE_1, vitask_rda_weight=0.5)
    now = {**run, "schedule": {**run["schedule"], "learning_rate": "0.0005"}}
    expected = ["--vitask_rda_weight 0.5 (1.0 there)", "--learning_rate 0.0005 (0.001 there)"]
    assert resuming.changed(checkpoint, vitask, now) == expected


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
    assert "passed over: model.safetensors has 1000 of" in printed and "resuming from checkpoint-2" in printed
    losses, largest, _ = apart(output, whole("ddp", 2, "full"))
    assert max(losses.values()) < LOSS and largest < WEIGHT
    # It was written anew, and by one process.
    assert record_of(output / "checkpoint-4")["run"]["processes"] == 1
    assert resuming.newest(output) == output / "checkpoint-4"


def test_loading_a_connector_draws_nothing(whole):
    before = torch.get_rng_state()
    load_connector(whole("ddp", 1, "full") / "checkpoint-2")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("parallel", "count"), [("ddp", 1), ("zero2", 2)])
def test_the_second_epoch_keeps_its_groups_of_one_modality(parallel, count, cut, whole, command):
    case = (parallel, count, "full", "--num_train_epochs", "2", "--group_by_modality_length", "True")
    output = cut(*case, steps=(6,))
    finish(count, command(output, *case))
    assert len(history(output)) == 8
    assert_identical(output, whole(*case))


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


def test_deepspeed_without_zero_is_gone_on_from(zero, command, tmp_path):
    """Its optimizer lies among the model's states, in no file of its own."""
    config, output = tmp_path / "zero0.json", tmp_path / "llava"
    with_setting(Path(zero("zero2")), config, stage=0)
    same = command(output, "zero2", 2, "full", "--deepspeed", str(config))
    finish(2, same)
    assert record_of(output / "checkpoint-4")["run"]["zero_stage"] == 0
    before = weights(output)
    shutil.rmtree(output / "checkpoint-4")
    assert resuming.newest(output) == output / "checkpoint-2"
    finish(2, same)
    after = weights(output)
    assert len(before) > 4 and all(torch.equal(after[name], before[name]) for name in before)


def test_what_deepspeed_cannot_convert_ends_every_rank_with_one_sentence(cut, command, tmp_path):
    output = cut("zero2", 2, "full")
    before = tree(output)
    ended = launch(2, command(output, "zero3", 2), tmp_path / "logs")
    assert ended.statuses.count(1) >= 1 and 0 not in ended.statuses
    said = sentences(ended)
    assert len(said) == 1 and "DeepSpeed ZeRO-1 or 2, this one has DeepSpeed ZeRO-3" in said[0], ended.text
    # What is in the images may be noted before; all else stays.
    assert {name: size for name, size in tree(output).items() if not name.startswith("vitask_images/")} == {
        name: size for name, size in before.items() if not name.startswith("vitask_images/")
    }


def test_a_failed_conversion_leaves_nothing_and_says_why(cut):
    output = cut("zero2", 2, "full")
    before = tree(output)
    parts = next((output / "checkpoint-2").glob("global_step2/zero_pp_rank_1*"))
    truncate(parts)
    sentence = universal._convert(output / "checkpoint-2")
    assert "could not convert" in sentence and "\n" not in sentence
    assert "Traceback" not in sentence
    assert tree(output).keys() == before.keys()


def test_no_room_to_convert_is_said_before(cut, monkeypatch):
    output = cut("zero2", 2, "full")
    before = tree(output)
    states = sum(size for name, size in before.items() if "optim_states" in name)
    free = SimpleNamespace(free=2 * states)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: free)
    sentence = universal._convert(output / "checkpoint-2")
    assert "no room for DeepSpeed's universal form of checkpoint-2" in sentence
    assert tree(output) == before
    free.free = sum(before.values()) * 2
    assert universal._convert(output / "checkpoint-2") is None


def test_a_checkpoint_without_deepspeeds_step_is_said(cut):
    output = cut("zero2", 2, "full")
    (output / "checkpoint-2" / "latest").unlink()
    assert "could not convert" in universal._convert(output / "checkpoint-2")


def two_nodes(outputs: list[Path], arguments: list[str], logs: Path) -> list[str]:
    """A process on each of two nodes that see different folders; what each printed."""
    ended = launch(2, [[*arguments, "--output_dir", str(output)] for output in outputs], logs, nodes=2)
    assert ended.statuses == [0, 0], ended.text
    return [log.read_text() for log in ended.logs]


@pytest.fixture
def nodes(tmp_path) -> list[Path]:
    return [tmp_path / node / "llava" for node in ("first", "second")]


def test_nodes_with_disks_of_their_own_agree(whole, command, nodes, tmp_path):
    """Each writes and reads its own part; the second lost its last checkpoint, and both resume from the one before."""
    same = command(nodes[0], "zero2", 2, "full", "--save_on_each_node", "True")
    two_nodes(nodes, same, tmp_path / "logs")
    for rank, output in enumerate(nodes):
        check_own_part(output, rank)
        assert_same_weights(output, whole("zero2", 2, "full"))
        (output / "model.safetensors").unlink()
    shutil.rmtree(nodes[1] / "checkpoint-4")
    printed = two_nodes(nodes, same, tmp_path / "again")
    assert "checkpoint-4 in" in printed[0] and "it is not there (rank 1)" in printed[0]
    for output in nodes:
        assert_same_weights(output, whole("zero2", 2, "full"))
    assert_identical(nodes[0], whole("zero2", 2, "full"))


def test_under_zero3_the_first_node_has_the_model_and_each_node_what_it_goes_on_from(whole, command, nodes, tmp_path):
    reference = whole("zero3", 2, "full")
    same = command(nodes[0], "zero3", 2, "full", "--save_on_each_node", "True")
    for again in (False, True):
        said = two_nodes(nodes, same, tmp_path / f"logs-{again}")[0]
        assert "the model is written into" in said and "of the first node alone" in said
        for rank, output in enumerate(nodes):
            check_own_part(output, rank)
            for folder in (output, output / "checkpoint-2"):
                assert (folder / "model.safetensors").is_file() == (rank == 0)
        assert_identical(nodes[0], reference)
        (found,) = nodes[1].glob("*.safetensors")
        connector, expected = load_file(found), load_file(reference / CONNECTOR_FILE)
        assert found.name == CONNECTOR_FILE and connector.keys() == expected.keys()
        assert all(torch.equal(connector[name], expected[name]) for name in expected)
        for output in nodes:
            shutil.rmtree(output / "checkpoint-4")
            (output / CONNECTOR_FILE).unlink()


def check_own_part(output: Path, rank: int) -> None:
    parts = {path.name for path in (output / "checkpoint-2" / "global_step2").glob("*_optim_states.pt")}
    assert [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] == [part.removeprefix("bf16_") for part in parts]
    assert resuming.newest(output) == output / "checkpoint-4"


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
