"""A TSM's training that is killed goes on behind its last whole epoch, as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import write_task

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.fitting import Fit
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.progress import training_folder
from vitask_plugin.tsm.train import Settings, train

# What draws random numbers in every way there is: dropout, flips, pictures, mixing; and has a state beside the weights.
HARD = {"drop": 0.1, "hflip": 0.5, "color_jitter": 0.4, "mixup": 0.2, "model_ema": True, "model_ema_warmup": True}
BASE = {"arch": "test_resnet", "image_size": 32, "batch_size": 8, "device": "cpu", "epochs": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 18), ("val", 9)):
        write_task(root, "three", ["red", "green", "blue"], count, split=split)
    return root


def run(data: Path, output: Path, **changes) -> TSM:
    settings = Settings(**(BASE | changes))
    return train(settings, [data / "three-train.json"], [data / "three-val.json"], [data / "images"], output)


class Killed(BaseException):
    """As a signal: nobody catches it."""


def killed_after(monkeypatch, epochs: int) -> None:
    kept, count = Fit._keep, []

    def keep(fit: Fit) -> None:
        kept(fit)
        count.append(1)
        if len(count) == epochs:
            raise Killed

    monkeypatch.setattr(Fit, "_keep", keep)


@pytest.mark.parametrize(
    ("changes", "after"),
    [({}, 2), (HARD, 2), ({"workers": 1, "aa": "rand-m9-mstd0.5", "sched": "step"}, 2), ({"folds": 2}, 6)],
)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(data, tmp_path, monkeypatch, changes, after):
    whole = run(data, tmp_path / "whole", **changes)
    killed_after(monkeypatch, after)
    with pytest.raises(Killed):
        run(data, tmp_path / "tsm", **changes)
    monkeypatch.undo()
    assert not (tmp_path / "tsm").exists() and training_folder(tmp_path / "tsm").is_dir()
    torch.rand(7)  # what the process draws elsewhere has no part in it
    assert run(data, tmp_path / "tsm", **changes).hash == whole.hash
    assert sorted(os.listdir(tmp_path)) == ["tsm", "whole"]
    for name in ("metrics.json", "log.jsonl"):
        assert (tmp_path / "tsm" / name).read_text() == (tmp_path / "whole" / name).read_text()
    lines = [json.loads(line) for line in (tmp_path / "tsm/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(isinstance(line[key], float) for line in lines for key in ("train_loss", "lr", "val_loss", "val_auc"))


def test_a_killed_command_goes_on(data, tmp_path):
    """SIGTERM and SIGKILL at epochs that the log names, and the same command again."""
    command = [sys.executable, "-m", "vitask_plugin.cli", "tsm", "train", "--arch", "test_resnet", "--device", "cpu"]
    command += ["--data", str(data / "three-train.json"), "--val", str(data / "three-val.json"), "--batch-size", "8"]
    command += ["--image-folder", str(data / "images"), "--image-size", "32", "--epochs", "24"]
    command += ["--out", str(tmp_path / "tsm")]
    log, done = training_folder(tmp_path / "tsm") / "whole/log.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 240
        while not (log.is_file() and len(log.read_text().splitlines()) >= done + 3):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() == -number
        done = len(log.read_text().splitlines())
        assert done < 24 and not (tmp_path / "tsm").exists()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert any(f"TSM: goes on after epoch {one} of 24" in said for one in (done, done + 1))
    assert TSM.load(tmp_path / "tsm").hash == run(data, tmp_path / "whole", epochs=24).hash


def test_other_flags_or_data_are_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "tsm"
    killed_after(monkeypatch, 1)
    with pytest.raises(Killed):
        run(data, out)
    monkeypatch.undo()
    with pytest.raises(
        VITaskError, match=r"had other flags: --lr 0\.001 \(now 0\.01\); give those to go on with it, or"
    ):
        run(data, out, lr=0.01)
    rows = json.loads((data / "three-train.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(VITaskError, match="had other training data; go on with the same, or remove the folder '"):
        train(Settings(**BASE), [tmp_path / "fewer.json"], [data / "three-val.json"], [data / "images"], out)
    assert run(data, out, workers=1).hash == run(data, tmp_path / "whole").hash  # workers have no part in it


@pytest.mark.parametrize("flag", ["init", "pretrained"])
def test_other_weights_at_the_same_place_are_refused(flag, data, tmp_path, monkeypatch):
    place = tmp_path / "start"
    run(data, place, epochs=1)
    start = {"init": {"arch": None, "image_size": None, "init": str(place)}}
    start |= {"pretrained": {"pretrained": str(place / "tsm.safetensors")}}
    killed_after(monkeypatch, 1)
    with pytest.raises(Killed):
        run(data, tmp_path / "tsm", **start[flag])
    monkeypatch.undo()
    run(data, place, epochs=1, seed=1)
    with pytest.raises(VITaskError, match=r"had other weights to start from; go on with the same, or remove"):
        run(data, tmp_path / "tsm", **start[flag])


def test_a_damaged_checkpoint_is_named(data, tmp_path, monkeypatch):
    killed_after(monkeypatch, 1)
    with pytest.raises(Killed):
        run(data, tmp_path / "tsm")
    monkeypatch.undo()
    path = training_folder(tmp_path / "tsm") / "whole/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(VITaskError, match=r"checkpoint\.pt' is damaged .*remove the folder '.*\.tsm\.training'"):
        run(data, tmp_path / "tsm")


def test_a_checkpoint_is_whole_or_absent(data, tmp_path, monkeypatch):
    """A kill in the middle of the writing leaves the epoch before."""
    saved, count = torch.save, []

    def half(value, file):
        count.append(1)
        if len(count) == 3:
            file.write(b"half")
            raise Killed
        saved(value, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        run(data, tmp_path / "tsm")
    monkeypatch.undo()
    (training_folder(tmp_path / "tsm") / "whole/.checkpoint.pt.killed.pt").write_bytes(b"half")
    assert run(data, tmp_path / "tsm").hash == run(data, tmp_path / "whole").hash
