"""Two hosts, a patched checkout, and what one host gives with two processes."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import ADDRESSES, CannotMakeHosts, Hosts
from mixture import flags
from page import environment, script
from ranks import free_port

import vitask_plugin.deepspeed
from vitask_plugin.llava import patch


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts() as made:
            yield made
    except CannotMakeHosts as error:
        pytest.skip(f"two hosts cannot be made here: {error}")


@pytest.fixture(scope="session")
def command(tiny_llava, mixture, mixture_features) -> Callable[..., list[str]]:
    """(zero2 or zero3, output, flags...) to FLAGS: 4 samples a process, 4 steps."""

    def make(zero: str, output: Path, *more: str) -> list[str]:
        config = Path(vitask_plugin.deepspeed.__file__).with_name(f"{zero}.json")
        usual = ("--per_device_train_batch_size", "4", "--deepspeed", str(config))
        return flags(tiny_llava, mixture, mixture_features, output, *usual, *more)

    return make


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """The working directory on both hosts, one disk: `hostfile`, and `LLaVA`, a checkout that is patched."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    upstream = Path(importlib.util.find_spec("llava").submodule_search_locations[0])
    shutil.copytree(upstream, directory / "LLaVA" / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    list(patch.apply(directory / "LLaVA"))
    return directory


@pytest.fixture(scope="session")
def one_host(work, command) -> Callable[[str], Path]:
    """zero2 or zero3 to the output of two processes on one host, by the page's own commands."""
    made: dict[str, Path] = {}

    def run(zero: str) -> Path:
        if zero not in made:
            output = work / f"llava-one-host-{zero}"
            name = {"zero2": "one-host-torchrun", "zero3": "one-host-deepspeed"}[zero]
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment(free_port(), GPUS="2")}
            done = subprocess.run(
                ["bash", "-c", script(name, command(zero, output))],
                capture_output=True,
                text=True,
                timeout=200,
                cwd=work,
                env=variables,
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            made[zero] = output
        return made[zero]

    return run
