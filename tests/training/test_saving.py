"""A checkpoint is whole or absent, whatever happens while it is written; a full disk ends a run, and loses nothing."""

import contextlib
import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from curves import assert_identical
from mixture import with_setting
from ranks import launch
from safetensors.torch import load_file
from saved import finish, interrupt, sentences, tree

from vitask_plugin.errors import VITaskError
from vitask_plugin.llava.loading import load
from vitask_plugin.model_folder import CONNECTOR_FILE
from vitask_plugin.training import resuming
from vitask_plugin.training.zero import check_gathers

CASES = [("ddp", 1, "full"), ("zero2", 2, "full"), ("zero3", 2, "lora")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_says_what_it_is_made_of(case, whole):
    output = whole(*case)
    folders = {path.name for path in output.iterdir() if path.is_dir()}
    assert folders == {"checkpoint-2", "checkpoint-4", "vitask_images"}
    for checkpoint in output.glob("checkpoint-*"):
        record = json.loads((checkpoint / "vitask.json").read_text())
        found = tree(checkpoint)
        found.pop("vitask.json")
        assert record["files"] == found and any("optim" in name for name in found)
        assert record["run"]["processes"] == case[1] and record["run"]["lora_r"] == (8 if case[2] == "lora" else None)
        assert record["run"]["zero_stage"] == (int(case[0][-1]) if case[1] == 2 else None)
    assert "files" not in json.loads((output / "vitask.json").read_text())


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("tuning", ["full", "stage 2, LoRA"])
def test_a_checkpoint_in_mid_run_is_opened_as_a_model(parallel, tuning, whole):
    base = None
    case = (parallel, 2, "full")
    if tuning != "full":
        base = whole("ddp", 2, "full")
        case = (parallel, 2, "lora", "--vitask_stage", "2", "--model_name_or_path", str(base))
    output = whole(*case)
    found = {step: load(output / f"checkpoint-{step}", base).model for step in (2, 4)}
    for step, model in found.items():
        shapes = {name: weight.shape for name, weight in model.vitask_connector.named_parameters()}
        saved = load_file(output / f"checkpoint-{step}" / CONNECTOR_FILE)
        assert shapes == {name: weight.shape for name, weight in saved.items()} and len(shapes) == 4
        assert all(weight.numel() for weight in saved.values())
    last = load(output, base).model.state_dict()
    after = found[4].state_dict()
    assert after.keys() == last.keys() and all(torch.equal(after[name], last[name]) for name in last)
    earlier = found[2].state_dict()
    trained = [name for name in last if not torch.equal(earlier[name], last[name])]
    assert any("mm_projector" in name for name in trained) and any("q_proj" in name for name in trained)


def ungathered() -> None:
    """What is left of the connector on one rank: a write that has to be refused."""
    from vitask_plugin.llava.trainer import VITaskTrainer

    VITaskTrainer._connector_weights = lambda self: {}


@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_what_cannot_be_saved_under_deepspeed_ends_the_run(parallel, command, tmp_path):
    """Upstream takes a ValueError for a config that gathers nothing, and trains on without having saved."""
    output = tmp_path / "llava"
    ended = launch(2, command(output, parallel, 2), tmp_path / "logs", before=dict.fromkeys((0, 1), ungathered))
    assert 0 not in ended.statuses, ended.text
    said = set(sentences(ended))
    (refused,) = [line for line in said if f"{CONNECTOR_FILE} is not written into" in line]
    assert "gather them first" in refused
    assert all("another process of this run has ended" in line for line in said - {refused})
    assert "Traceback" not in ended.logs[0].read_text()
    assert not (output / ".saving").exists() and not list(output.glob("checkpoint-*"))


def test_a_config_that_leaves_the_weights_divided_is_refused(zero, tmp_path):
    config = tmp_path / "divided.json"
    with_setting(Path(zero("zero3")), config, stage3_gather_16bit_weights_on_model_save=False)

    def check(path: Path | str, *, lora: bool = False) -> None:
        parsed = HfDeepSpeedConfig(str(path))
        check_gathers(SimpleNamespace(deepspeed=str(path), lora_enable=lora, hf_deepspeed_config=parsed))

    with pytest.raises(VITaskError, match='set "stage3_gather_16bit_weights_on_model_save": true') as refused:
        check(config)
    assert str(config) in str(refused.value)
    check(config, lora=True)
    check(zero("zero3"))
    check(zero("zero2"))
    check_gathers(SimpleNamespace(deepspeed=None, lora_enable=False))


@pytest.fixture
def killed(command, tmp_path):
    """A run of two processes under ZeRO-2, killed while it wrote its second checkpoint."""
    output = tmp_path / "llava-killed"
    staged = output / ".saving" / "checkpoint-4"
    ended = interrupt(
        2,
        command(output, "zero2", 2),
        tmp_path / "logs",
        when=lambda: staged.is_dir() and any(staged.iterdir()),
        act=lambda pid: os.kill(pid, signal.SIGKILL),
    )
    assert set(ended.statuses) == {-signal.SIGKILL}, ended.text
    return output


@pytest.mark.compat
def test_killed_while_saving_and_started_again(killed, whole, command):
    before = whole("zero2", 2, "full")
    assert (killed / ".saving" / "checkpoint-4").is_dir(), "it was killed too late"
    assert {path.name for path in killed.glob("checkpoint-*")} == {"checkpoint-2"}
    assert resuming.newest(killed) == killed / "checkpoint-2"
    # What was renamed early would be kept here, at the price of the one that is whole.
    finish(2, command(killed, "zero2", 2, "full", "--save_total_limit", "1"))
    assert {path.name for path in killed.iterdir() if path.is_dir()} == {"checkpoint-4", "vitask_images"}
    assert tree(killed / "checkpoint-4").keys() == tree(before / "checkpoint-4").keys()
    assert_identical(killed, before)


def check_ended(ended, output: Path, what: str, *, survivor: str) -> str:
    """It ended with one sentence, and nothing half written is left; returns the sentence."""
    assert 1 in ended.statuses and 0 not in ended.statuses, ended.text
    said = set(sentences(ended))
    full = [line for line in said if f"no room for {what} in {str(output)!r}" in line]
    assert len(full) == 1 and f"{survivor} there is untouched" in full[0], ended.text
    assert "the same command resumes from it" in full[0]
    # A rank that is not the one without room can say no more than that another one has ended.
    assert all("another process of this run has ended" in line for line in said - set(full))
    assert not (output / ".saving").exists()
    assert resuming.newest(output) == output / survivor
    return full[0]


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_file_that_cannot_be_written_to_its_end(case, whole, command, tmp_path):
    """EFBIG from the file-size limit: the way to a failing write that needs no right to mount."""
    output = tmp_path / "llava-limited"
    limit = (500_000, resource.RLIM_INFINITY)
    ended = interrupt(
        case[1],
        command(output, *case),
        tmp_path / "logs",
        when=(output / "checkpoint-2").is_dir,
        act=lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, limit),
    )
    check_ended(ended, output, "checkpoint-4", survivor="checkpoint-2")
    finish(case[1], command(output, *case))
    assert_identical(output, whole(*case))


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk takes the right to mount one: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def used(output: Path) -> tuple[int, int]:
    """Bytes and files of a checkpoint of a finished run."""
    files = tree(output / "checkpoint-2")
    return sum(files.values()), len(files)


FULL_DISKS = {
    # Seen before anything is written.
    "no room for a second checkpoint": (CASES[1], "checkpoint-4", "checkpoint-2", ()),
    "no room for the weights": (CASES[0], "the trained weights", "checkpoint-4", ("--save_steps", "4")),
    # There is room, and writing fails all the same: ENOSPC, since the disk takes no more files.
    "no more files": (CASES[1], "checkpoint-4", "checkpoint-2", ()),
}


@pytest.mark.parametrize("name", FULL_DISKS)
def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(name, whole, command, tmp_path):
    case, what, survivor, more = FULL_DISKS[name]
    size, files = used(whole(*case))
    options = f"nr_inodes={int(1.5 * files) + 8}" if name == "no more files" else f"size={size + (1 << 20) + 200_000}"
    disk = tmp_path / "disk"
    with small_disk(disk, options):
        output = disk / "llava"
        same = command(output, *case, *more)
        said = check_ended(launch(case[1], same, tmp_path / "logs"), output, what, survivor=survivor)
        assert ("No space left on device" in said) == (name == "no more files")
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=4096", disk], check=True)
        finish(case[1], same)
        assert_identical(output, whole(*case))
