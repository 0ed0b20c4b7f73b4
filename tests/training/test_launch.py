"""Before the first step and after the last: processes that were started differently end together, with one sentence."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
from curves import apart, history
from ranks import Ended, launch
from safetensors.torch import load_file
from saved import finish

from vitask_plugin.llava import compat
from vitask_plugin.llava.install import wrap
from vitask_plugin.training import agreement, disk, processes
from vitask_plugin.training.peers import EveryRankError


def other_versions() -> None:
    found = processes.versions()
    processes.versions = lambda: {**found, "timm": "0.0.1"}


def ends_in_the_first_step() -> None:
    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    VITaskLlavaLlamaForCausalLM._vitask_step = lambda *args, **kwargs: os._exit(9)


def interrupted_in_the_first_step() -> None:
    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def interrupted(*args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    VITaskLlavaLlamaForCausalLM._vitask_step = interrupted


def says_what_is_whole() -> None:
    from vitask_plugin.llava.trainer import VITaskTrainer

    step = VITaskTrainer.training_step

    def said(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        tower = self._vlm.get_vision_tower()
        whole = all(weight.numel() and not hasattr(weight, "ds_id") for weight in tower.parameters())
        divided = self._vlm.model.layers[0].self_attn.q_proj.weight.numel() == 0
        sys.stdout.write(f"tower whole: {whole}, attention divided: {divided}\n")
        return loss

    VITaskTrainer.training_step = said


@pytest.fixture
def start(command, tmp_path):
    """Starts two ranks, each with flags of its own besides the usual ones; returns how they ended."""

    def run(first: list[str], second: list[str], **kwargs) -> Ended:
        usual = command(tmp_path / "out", "ddp", 2, "full", "--save_strategy", "no")
        logs = tmp_path / f"logs-{time.time_ns()}"
        return launch(2, [[*usual, *first], [*usual, *second]], logs, kill_others=False, **kwargs)

    return run


def said(ended: Ended, rank: int, mark: str = "vitask: error: ") -> list[str]:
    return [line for line in ended.logs[rank].read_text().splitlines() if line.startswith(mark)]


def test_other_flags_end_both_with_one_sentence(start):
    ended = start([], ["--learning_rate", "2e-3", "--output_dir", "elsewhere"])
    assert ended.statuses == [1, 1], ended.text
    host = socket.gethostname()
    (sentence,) = said(ended, 0)
    assert f"rank 0 on {host} has --learning_rate 0.001, rank 1 on {host} has --learning_rate 2e-3" in sentence
    assert said(ended, 1) == []


def test_a_process_without_vitask_among_others_is_noticed(start):
    ended = start([], ["--vitask", "False"])
    assert ended.statuses == [1, 1], ended.text
    assert "--vitask True" in said(ended, 0)[0] and "--vitask False" in said(ended, 0)[0]


def test_other_versions_end_both_nodes_and_both_say_it(start):
    ended = start([], [], before={1: other_versions}, nodes=2)
    assert ended.statuses == [1, 1], ended.text
    assert said(ended, 0) == said(ended, 1) and "has timm 0.0.1" in said(ended, 0)[0]


def test_other_data_end_both(start, mixture, tmp_path):
    (tmp_path / "other.json").write_text((mixture / "train.json").read_text() + "\n")
    ended = start([], ["--data_path", str(tmp_path / "other.json")])
    assert ended.statuses == [1, 1], ended.text
    assert "the processes see different data: rank 0" in said(ended, 0)[0] and said(ended, 1) == []
    assert not (tmp_path / "out" / "config.json").exists()


def test_bad_input_that_one_rank_meets_ends_both(start, tmp_path):
    (tmp_path / "cut.json").write_text("[")
    ended = start([], ["--data_path", str(tmp_path / "cut.json")])
    assert ended.statuses == [1, 1], ended.text
    assert "cut.json" in said(ended, 0)[0] and "is not readable JSON" in said(ended, 0)[0]
    assert said(ended, 1) == [] and not any("Traceback" in log.read_text() for log in ended.logs)


def test_an_image_that_differs_on_one_rank_ends_both(start, mixture, tmp_path):
    """Met while the trainer is made, between two moments in which the ranks wait for each other."""
    other = tmp_path / "images"
    shutil.copytree(mixture / "images", other)
    name = json.loads((mixture / "train.json").read_text())[-1]["image"]
    with open(other / name, "ab") as file:
        file.write(b"changed")
    for rank in (0, 1):
        flags = [[], []]
        flags[rank] = ["--image_folder", str(other)]
        ended = start(*flags)
        assert ended.statuses == [1, 1], ended.text
        assert len(said(ended, 0)) == 1 and name in said(ended, 0)[0] and said(ended, 1) == []
        assert not any("Traceback" in log.read_text() for log in ended.logs)


def test_nodes_and_their_disks(start, tmp_path):
    each = ["--save_on_each_node", "True"]
    ended = start(each, each, nodes=2)
    assert "is one folder for all nodes, and --save_on_each_node True makes each" in said(ended, 0)[0]
    own = (["--output_dir", str(tmp_path / "disk-0")], ["--output_dir", str(tmp_path / "disk-1")])
    ended = start(*own, nodes=2)
    assert "is another folder on each node, and without --save_on_each_node True" in said(ended, 0)[0]
    assert not list(tmp_path.rglob(".vitask-*"))
    # Each node with its own folder, told so: both have all that stock LLaVA loads.
    ended = start(*([*flags, *each] for flags in own), nodes=2)
    assert ended.statuses == [0, 0], ended.text
    lines = said(ended, 0, "vitask: ")
    assert lines[0].startswith("vitask: 2 processes on 2 nodes; vitask-plugin ")
    assert "is a folder of its own on each node" in lines[1]
    assert re.fullmatch(r"vitask: data \w{12}, images \w{12}, tokens \w{12}, TSM \w{12} on every rank", lines[2])
    assert said(ended, 1, "vitask: ") == []
    for name in ("config.json", "model.safetensors", "vitask_connector.safetensors", "vitask.json"):
        assert (tmp_path / "disk-1" / name).is_file(), name
    first, second = (load_file(tmp_path / node / "model.safetensors") for node in ("disk-0", "disk-1"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_process_that_ends_takes_the_other_along(start):
    began = time.monotonic()
    ended = start([], [], before={1: ends_in_the_first_step})
    assert ended.statuses == [1, 9], ended.text
    assert "another process of this run has ended or no longer answers" in said(ended, 0)[0]
    assert "Traceback" not in ended.logs[0].read_text()
    assert time.monotonic() - began < 60


def test_zero3_keeps_the_vision_tower_whole_and_nothing_else(start, command, tiny_llava, tmp_path):
    flags = ["--deepspeed", command.zero("zero3")]
    ended = start(flags, flags, before={0: says_what_is_whole, 1: says_what_is_whole})
    assert ended.statuses == [0, 0], ended.text
    assert len(history(tmp_path / "out")) == 4
    for rank in (0, 1):
        assert "is deprecated" not in ended.logs[rank].read_text()
        assert ended.logs[rank].read_text().count("tower whole: True, attention divided: True") == 4
    tower, saved = load_file(tiny_llava.tower / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in tower.items():
        same = [saved[other] for other in saved if "vision_tower" in other and other.endswith(f".{name}")]
        # Upstream holds the tower in half precision.
        assert len(same) == 1 and torch.equal(same[0], weight.half()), name


def test_deepspeed_without_a_launcher_is_one_process(command, tmp_path):
    for name, parallel in (("plain", "ddp"), ("deepspeed", "zero2")):
        finish(1, command(tmp_path / name, parallel, 1, "full", "--save_strategy", "no"))
    losses, largest, _ = apart(tmp_path / "deepspeed", tmp_path / "plain")
    assert max(losses.values()) < 1e-5 and largest < 1e-4


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--deepspeed", "", "--deepspeed '' is no file"),
        ("--deepspeed", "zero3", "--deepspeed 'zero3' is no file; give one, or one of ours"),
        ("--output_dir", "FILE/out", "cannot be written to"),
    ],
)
def test_a_path_that_is_not_there_ends_both_with_one_sentence(flag, value, sentence, start, tmp_path):
    (tmp_path / "file").touch()
    flags = [flag, value.replace("FILE", str(tmp_path / "file"))]
    ended = start(flags, flags)
    assert ended.statuses == [1, 1], ended.text
    assert sentence in said(ended, 0)[0] and said(ended, 1) == []
    assert not any("Traceback" in log.read_text() for log in ended.logs)


def test_ctrl_c_says_how_to_go_on(start):
    ended = start([], [], before={0: interrupted_in_the_first_step, 1: interrupted_in_the_first_step})
    assert ended.statuses == [130, 130], ended.text
    assert said(ended, 0, "vitask: interrupted") and not said(ended, 1, "vitask: interrupted")
    assert not any("Traceback" in log.read_text() for log in ended.logs)


def test_one_process_agrees_with_itself(tmp_path, capsys):
    assert agreement.gathered(3) == [3]
    agreement.agree(None)
    with pytest.raises(EveryRankError, match="too hot"):
        agreement.agree("too hot")
    assert agreement.shared(tmp_path / "new") and not list((tmp_path / "new").iterdir())
    agreement.check_disk(str(tmp_path), save_on_each_node=True)
    processes.leave(for_good=True)  # without a process group nothing is taken down, and the process goes on
    assert capsys.readouterr().err == ""


def test_flags_are_read_as_argparse_reads_them():
    words = ["--a", "1", "--b=2", "--list", "x", "y", "--local-rank=3", "--on"]
    assert processes.flags_of(words) == {"a": "1", "b": "2", "list": "x y", "local_rank": "3", "on": ""}


def test_only_lost_connections_are_taken_for_such(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lost(ValueError("gloom")) is None
    assert processes.lost(OSError("Connection reset by peer")) is None  # some download's
    reset = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5\nmore")
    try:
        try:
            raise reset
        except RuntimeError as error:
            raise ValueError("in a step") from error
    except ValueError as error:
        sentence = processes.lost(error)
    assert "(Connection closed by peer [::1]:5)" in sentence
    monkeypatch.delenv("WORLD_SIZE")
    assert processes.lost(reset) is None


def test_only_the_output_disk_is_taken_for_full(tmp_path):
    assert disk.full(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "model")), tmp_path, "it")
    assert disk.full(OSError(errno.ENOSPC, "No space left on device", "/elsewhere"), tmp_path, "it") is None
    worker = RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")
    assert disk.full(worker, tmp_path, "it") is None


def test_upstreams_mends_outlive_a_run(monkeypatch):
    """The launch check stands around them, and only it is taken away."""
    compat.prepare()
    from llava.train.train import TrainingArguments, train

    monkeypatch.setattr(sys, "argv", ["train.py", "--vitask", "True", "--vitask_ep", "cls"])
    with pytest.raises(SystemExit):
        wrap(train)()
    patched = TrainingArguments.__post_init__
    with pytest.raises(SystemExit):
        wrap(train)()
    assert TrainingArguments.__post_init__ is patched
    assert TrainingArguments(output_dir="unused", use_cpu=True).local_rank == 0  # the workaround "one-writer"; else -1
