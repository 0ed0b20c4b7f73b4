"""Two hosts for real: both launchers, the curve of one host, and what happens when one of them dies."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from curves import assert_identical
from hosts import ADDRESSES
from page import environment, script

PORT = 29500  # the hosts' own: nobody else can have it
SECONDS = 240


@pytest.fixture(autouse=True)
def emptied(hosts) -> Iterator[None]:
    """What a test that failed has left running must not be in the way of the next."""
    yield
    hosts.plug()
    for node in (0, 1):
        hosts.kill(node)


def start(hosts, nodes, name: str, flags: list[str], work: Path, logs: Path, **more: str) -> list[subprocess.Popen]:
    logs.mkdir(parents=True, exist_ok=True)
    variables = environment(PORT, MASTER_ADDR=ADDRESSES[0], **more)
    return [
        hosts.start(node, script(name, flags), logs / f"node-{node}.log", work, **variables, NODE_RANK=str(node))
        for node in nodes
    ]


def wait(processes: list[subprocess.Popen], seconds: float = SECONDS) -> list[int]:
    deadline = time.monotonic() + seconds
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]


def printed(logs: Path, node: int) -> str:
    return (logs / f"node-{node}.log").read_text()


def errors(logs: Path, node: int) -> list[str]:
    """The sentences that a node ended with."""
    return re.findall(r"^vitask: error: (.+)$", printed(logs, node), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("nodes-torchrun", "zero2"),
        ("nodes-deepspeed", "zero3"),
        ("nodes-torchrun-patched", "zero3"),
        ("nodes-deepspeed-patched", "zero2"),
    ],
)
def test_two_hosts_give_the_curve_of_one(name, zero, hosts, work, command, one_host, tmp_path):
    output = tmp_path / "llava-two-hosts"
    nodes = start(hosts, (0, 1), name, command(zero, output), work, tmp_path)
    assert wait(nodes) == [0, 0], printed(tmp_path, 0)[-3000:] + printed(tmp_path, 1)[-3000:]
    assert_identical(output, one_host(zero))
    said = [line for line in printed(tmp_path, 0).splitlines() if line.startswith("vitask: ")]
    assert any(f"2 processes on 2 nodes, DeepSpeed ZeRO-{zero[-1]}" in line for line in said)
    assert any("on every rank" in line for line in said)
    assert any("is one folder for all nodes" in line for line in said)
    assert "vitask: " not in printed(tmp_path, 1)


def until_saved(output: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + SECONDS
    while not (output / "checkpoint-1").exists():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("name", "zero", "dies"), [("nodes-torchrun", "zero2", 1), ("nodes-deepspeed", "zero3", 0)])
def test_a_host_dies_and_the_same_command_goes_on(name, zero, dies, hosts, work, command, one_host, tmp_path):
    """Without the first host there is nobody left to ask; without the second, its connections are closed."""
    output = tmp_path / "llava-killed"
    flags = command(zero, output, "--save_strategy", "steps", "--save_steps", "1")
    nodes = start(hosts, (0, 1), name, flags, work, tmp_path / "killed")
    until_saved(output, nodes)
    hosts.kill(dies)
    began = time.monotonic()
    lives = 1 - dies
    assert wait([nodes[lives]], 60)[0] not in (0, -9)
    assert time.monotonic() - began < 60
    (sentence,) = errors(tmp_path / "killed", lives)
    assert "another process of this run has ended or no longer answers" in sentence
    assert not (output / "trainer_state.json").exists()
    hosts.kill(lives)
    again = start(hosts, (0, 1), name, flags, work, tmp_path / "again")
    assert wait(again) == [0, 0], printed(tmp_path / "again", 0)[-3000:] + printed(tmp_path / "again", 1)[-3000:]
    assert_identical(output, one_host(zero))


def test_a_host_that_vanishes_is_noticed_after_ddp_timeout(hosts, work, command, tmp_path):
    """The cable is pulled: no connection is closed, so only the time tells."""
    output, seconds = tmp_path / "llava-unplugged", 20
    flags = command("zero2", output, "--save_strategy", "steps", "--save_steps", "1", "--ddp_timeout", str(seconds))
    nodes = start(hosts, (0, 1), "nodes-deepspeed", flags, work, tmp_path)
    until_saved(output, nodes)
    hosts.unplug(1)
    assert all(status != 0 for status in wait(nodes, seconds + 30))
    for node in (0, 1):
        (sentence,) = errors(tmp_path, node)
        assert "another process of this run has ended or no longer answers" in sentence
    assert not (output / "trainer_state.json").exists()


@pytest.mark.parametrize("name", ["nodes-torchrun", "nodes-deepspeed"])
def test_an_address_where_nobody_answers(name, hosts, work, command, tmp_path):
    """The second host alone. torchrun itself looks for the first one, for ten minutes unless it is told otherwise."""
    seconds = 10
    flags = command("zero2", tmp_path / "llava-alone", "--ddp_timeout", str(seconds))
    (node,) = start(hosts, (1,), name, flags, work, tmp_path, PET_RDZV_CONF=f"timeout={seconds}")
    # Most of it goes into imports.
    assert wait([node], seconds + 60)[0] not in (0, -9)
    if name == "nodes-deepspeed":
        (sentence,) = errors(tmp_path, 1)
        assert f"do not find each other at {ADDRESSES[0]}:{PORT}" in sentence
    else:
        assert (
            printed(tmp_path, 1).rstrip().splitlines()[-1].startswith("torch.distributed.DistNetworkError: The client")
        )
        assert f"({ADDRESSES[0]}, {PORT})" in printed(tmp_path, 1).rstrip().splitlines()[-1]
