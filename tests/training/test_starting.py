"""What a stage starts from: features that its ranks extract together, and what ZeRO-3 has divided by then."""

import json
import shutil
from pathlib import Path

import pytest
from curves import apart
from mixture import LORA, flags
from ranks import Ended, launch
from saved import finish

from vitask_plugin.files import sha256_file

LOSS, WEIGHT, MEAN = 1e-5, 1e-4, 1e-8  # as in tests/equivalence


def test_lora_goes_on_from_a_base_that_has_a_projector(
    tmp_path, tiny_llava, tiny_checkpoint, mixture, mixture_features, command
):
    """As LLaVA-1.5 has: its projector is divided already when the earlier stage's is loaded into it."""

    def run(name: str, count: int, *more: str) -> None:
        base = ("--model_name_or_path", str(tiny_checkpoint), "--per_device_train_batch_size", str(8 // count), *LORA)
        finish(count, flags(tiny_llava, mixture, mixture_features, tmp_path / name, *base, *more))

    run("llava-lora-1", 1)
    second = ("--vitask_stage", "2", "--vitask_connector_path", str(tmp_path / "llava-lora-1"))
    run("llava-lora-one", 1, *second)
    run("llava-lora-zero3", 2, *second, "--deepspeed", command.zero("zero3"))
    losses, weight, mean = apart(tmp_path / "llava-lora-zero3", tmp_path / "llava-lora-one")
    assert len(losses) == 5 and max(losses.values()) < LOSS and weight < WEIGHT and mean < MEAN


def lives_briefly() -> None:
    """A short timeout of collectives, and an extraction whose batches take longer than all of it."""
    import time

    from vitask_plugin.tsm.model import TSM

    forward = TSM.forward

    def slow(self, pixels):
        if len(pixels) > 1:  # not the one that measures the widths
            time.sleep(14)
        return forward(self, pixels)

    TSM.forward = slow


def dies_while_it_extracts() -> None:
    import os

    from vitask_plugin.training import peers
    from vitask_plugin.tsm.extraction import Extraction

    peers.SILENCE = 3.0
    peers.BEAT = 0.5
    Extraction.compute = lambda *args: os._exit(9)


def waits_for_the_dead() -> None:
    from vitask_plugin.training import peers

    peers.SILENCE = 3.0


def meets_a_bad_image() -> None:
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.tsm.extraction import Extraction

    def compute(*args):
        raise VITaskError("image 'it.png' cannot be read")

    Extraction.compute = compute


@pytest.fixture
def extracting(command, mixture, tmp_path):
    """Starts two ranks that extract features with the mixture's TSM before the first step."""

    def run(*more: str, **kwargs) -> Ended:
        flags = command(tmp_path / "out", "ddp", 2, "full", "--save_strategy", "no", *more)
        place = flags.index("--vitask_features")
        flags[place : place + 2] = ["--vitask_tsm", str(Path(flags[place + 1]).parent / "tsm")]
        return launch(2, flags, tmp_path / "logs", kill_others=False, **kwargs)

    return run


def errors(ended: Ended) -> list[str]:
    return [line for line in "\n".join(log.read_text() for log in ended.logs).splitlines() if "vitask: error: " in line]


def test_an_extraction_may_last_longer_than_a_collective(extracting, mixture_features, tmp_path):
    ended = extracting("--ddp_timeout", "10", before={0: lives_briefly, 1: lives_briefly})
    assert ended.statuses == [0, 0], ended.text
    found = tmp_path / "out" / "vitask_features"
    for name in ("features.npy", "logits.npy"):
        assert (found / name).read_bytes() == (mixture_features / name).read_bytes()
    assert not list((tmp_path / "out").glob(".vitask_features*"))


def test_features_of_an_earlier_start_in_another_dtype_are_refused(extracting, mixture_features, tmp_path):
    stored = tmp_path / "out" / "vitask_features"
    shutil.copytree(mixture_features, stored)
    ended = extracting("--vitask_features_dtype", "float16")
    assert ended.statuses == [1, 1], ended.text
    (line,) = errors(ended)
    assert f"{str(stored)!r} of an earlier start are float32, and --vitask_features_dtype is float16" in line


def test_a_rank_that_dies_while_it_extracts_takes_the_other_along(extracting):
    ended = extracting(before={0: waits_for_the_dead, 1: dies_while_it_extracts})
    assert ended.statuses == [1, 9], ended.text
    assert len(errors(ended)) == 1 and "rank 1 on " in errors(ended)[0] and "no sign of life" in errors(ended)[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_of_one_rank_ends_both_with_its_sentence(extracting, rank):
    ended = extracting(before={rank: meets_a_bad_image})
    assert ended.statuses == [1, 1], ended.text
    assert errors(ended) == ["vitask: error: image 'it.png' cannot be read"]
    assert "Traceback" not in ended.text


def test_ranks_share_the_looking_and_a_restart_does_not_read_again(mixture, command, tmp_path):
    from vitask_plugin.data.contents import Contents

    finish(2, command(tmp_path / "out", "ddp", 2, "full", "--save_strategy", "no"))
    (found,) = (tmp_path / "out" / "vitask_images").iterdir()  # nothing is left of the shares
    assert found.name.startswith("node-0-")
    contents = Contents.open(found)
    images = {sample["image"] for sample in json.loads((mixture / "train.json").read_text()) if "image" in sample}
    assert len(contents) == len(images)
    for image in images:
        assert contents.sha256(image) == sha256_file(mixture / "images" / image)
