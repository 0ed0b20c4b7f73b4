"""Ranks whose batches are not alike: text beside images, a last step that has to be filled up."""

import json
from dataclasses import replace

import pytest
from cases import FP32, Case
from curves import apart, history
from mixture import STEPS, flags
from ranks import launch

FULL = Case("one", 1, "full", "whole", "packed", False, "fp32")
ONE_BY_ONE = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")


@pytest.mark.parametrize("host", ["llava", "hf"])
@pytest.mark.parametrize("parallel", ["ddp", "zero3"])
def test_one_rank_has_text_alone_while_the_other_has_an_image(parallel, host, runs, command, tmp_path):
    output = tmp_path / f"{host}-uneven"
    ended = launch(2, command(parallel, output, *ONE_BY_ONE, host=host), tmp_path / "logs", host=host)
    assert ended.statuses == [0, 0], ended.text
    first, second = (json.loads(log.with_suffix(".json").read_text())["batches"] for log in ended.logs)
    # Of one sample each; the HF host puts an image that nobody asks about beside a text alone.
    text_alone = [(ours[0] == 1, theirs[0] == 1) for ours, theirs in zip(first, second, strict=True)]
    assert len(text_alone) == 4 * STEPS and (True, False) in text_alone and (False, True) in text_alone
    losses, largest, mean = apart(output, runs(replace(FULL, host=host)).output)
    assert max(losses.values()) <= FP32.loss, losses
    assert largest <= FP32.weight and mean <= FP32.mean


def test_full_steps_are_alike_where_the_last_one_is_not_full(
    runs, mixture, mixture_features, tiny_llava, zero, tmp_path
):
    """30 samples: one process has 6 in its last step, two fill it up with samples they have seen."""
    samples = json.loads((mixture / "train.json").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(mixture / "images")
    (tmp_path / "data" / "train.json").write_text(json.dumps(samples[:-2]))
    outputs = {}
    for processes, more in ((1, ["--per_device_train_batch_size", "8"]), (2, ["--deepspeed", zero("zero2")])):
        batch = [] if processes == 1 else ["--per_device_train_batch_size", "4"]
        outputs[processes] = tmp_path / f"llava-{processes}"
        line = flags(tiny_llava, tmp_path / "data", mixture_features, outputs[processes], *batch, *more)
        ended = launch(processes, line, tmp_path / f"logs-{processes}")
        assert ended.statuses == [0] * processes, ended.text
    assert len(history(outputs[2])) == STEPS
    losses, _, _ = apart(outputs[2], outputs[1], steps=STEPS - 1)
    assert max(losses.values()) <= FP32.loss, losses


def test_zero3_refuses_separate_branches(command, tmp_path):
    ended = launch(2, command("zero3", tmp_path / "llava-refused", "--vitask_engine", "branches"), tmp_path / "logs")
    assert all(status not in (0, None) for status in ended.statuses)
    assert any("vitask: error: --vitask_engine branches runs as many forwards" in log.read_text() for log in ended.logs)
    assert not any("Traceback" in log.read_text() for log in ended.logs)
    assert not list(tmp_path.glob("llava-refused/*.safetensors"))
