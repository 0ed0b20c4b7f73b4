"""A patched checkout: upstream's own scripts take the VITask flags and train as the module way does."""

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import MODULE, arguments, history
from safetensors.torch import load_file

from vitask_plugin.llava import patch


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout made of the installed LLaVA, patched."""
    directory = tmp_path_factory.mktemp("checkout") / "LLaVA"
    upstream = Path(importlib.util.find_spec("llava").submodule_search_locations[0])
    shutil.copytree(upstream, directory / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    list(patch.apply(directory))
    return directory


def run_in(checkout: Path | None, command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """The command in an empty folder; with a checkout, its `llava` is the one that is imported."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)


@pytest.mark.compat
def test_both_scripts_of_a_patched_checkout_train_as_the_module_does(
    tmp_path, patched, tiny_llava, mixed_data, tsm_directory, feature_store
):
    vitask = ["--vitask", "True", "--vitask_tsm", str(tsm_directory), "--vitask_features", str(feature_store)]
    ways = {
        "module": (None, MODULE),
        "train": (patched, [sys.executable, str(patched / "llava" / "train" / "train.py")]),
        "train_mem": (patched, [sys.executable, str(patched / "llava" / "train" / "train_mem.py")]),
    }

    def train(name: str) -> subprocess.CompletedProcess:
        checkout, command = ways[name]
        flags = arguments(tiny_llava, mixed_data, tmp_path / name, *vitask)
        return run_in(checkout, [*command, *flags], tmp_path / f"cwd-{name}")

    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(ways, pool.map(train, ways), strict=True):
            assert done.returncode == 0, name + done.stdout[-3000:] + done.stderr[-3000:]
    curves = {name: history(tmp_path / name) for name in ways}
    assert len(curves["module"]) == 4
    assert {"loss_vanilla", "loss_ep", "loss_rda"} <= set(curves["module"][0])
    for name in ("train", "train_mem"):
        assert curves[name] == curves["module"]
        for kept in ("model.safetensors", "vitask_connector.safetensors"):
            expected, found = load_file(tmp_path / "module" / kept), load_file(tmp_path / name / kept)
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_reverted_checkout_does_not_know_the_flags(tmp_path, patched, tiny_llava, mixed_data):
    reverted = tmp_path / "LLaVA"
    shutil.copytree(patched, reverted)
    list(patch.revert(reverted))
    # The workarounds are made from outside: it has to fail for the flags, not for the age of its imports.
    source = "from vitask_plugin.llava import compat; compat.prepare(); from llava.train.train import train; train()"
    flags = arguments(tiny_llava, mixed_data, tmp_path / "out", "--vitask", "True")
    done = run_in(reverted, [sys.executable, "-c", source, *flags], tmp_path / "cwd")
    assert done.returncode != 0
    assert "--vitask" in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_one_sentence(tmp_path, patched, tiny_llava, mixed_data):
    script = [sys.executable, str(patched / "llava" / "train" / "train.py")]
    flags = arguments(tiny_llava, mixed_data, tmp_path / "out", "--vitask", "True", "--vitask_ep", "cls")
    done = run_in(patched, [*script, *flags], tmp_path / "cwd")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("vitask: error: --vitask_ep cls needs --vitask_tsm DIR")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
