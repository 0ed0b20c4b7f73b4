"""Optimizer and weights in the host's memory: the same curve, and upstream's parameter groups."""

import shutil

import pytest
from cases import FP32, Case
from curves import apart
from ranks import launch

FULL = Case("one", 1, "full", "whole", "packed", False, "fp32")


@pytest.mark.skipif(not all(map(shutil.which, ("g++", "ninja"))), reason="DeepSpeed compiles its Adam for CPUs")
@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_one_curve(config, runs, command, tmp_path):
    output = tmp_path / "llava-offloaded"
    ended = launch(2, command(config, output, "--per_device_train_batch_size", "4"), tmp_path / "logs")
    assert ended.statuses == [0, 0], ended.text
    losses, largest, mean = apart(output, runs(FULL).output)
    assert max(losses.values()) <= FP32.loss, losses
    assert largest <= FP32.weight and mean <= FP32.mean
