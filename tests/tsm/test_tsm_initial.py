"""`vitask tsm train --init`: what is taken over from an earlier TSM, and what is not."""

import json

import pytest
import torch
from pictures import write_task

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.backbone import build_timm
from vitask_plugin.tsm.initial import start_from
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.train import Settings, train

QUICK = {"epochs": 1, "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("val", 9)):
        write_task(root, "three", ["red", "green", "blue"], count, split=split)
        write_task(root, "two", ["grey", "blue"], count, split=split)
    return root


def run(data, output, *tasks: str, **settings) -> TSM:
    files = ([data / f"{task}-{split}.json" for task in tasks] for split in ("train", "val"))
    return train(Settings(**(QUICK | settings)), *files, [data / "images"], output)


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("first") / "tsm"
    return run(data, output, "three", arch="test_resnet", image_size=40), output


def test_it_starts_where_the_other_ended_and_says_so(data, first, tmp_path, capsys):
    old, folder = first
    files = [*("--data", data / "three-train.json"), *("--val", data / "three-val.json"), "--lr", "1e-9"]
    words = ["tsm", "train", "--init", folder, *files, "--image-folder", data / "images", "--out", tmp_path / "tsm"]
    assert main([*map(str, words), "--device", "cpu", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"started from TSM {old.hash[:12]}" in printed and "the head of 3 classes, all there are" in printed
    new = TSM.load(tmp_path / "tsm")
    for name in ("source", "image_size", "mean", "std"):
        assert new.record[name] == old.record[name], name
    assert new.record["init"] == [old.hash] and "init" not in old.record
    weights = dict(old.named_parameters())
    fresh = build_timm("test_resnet", 3, {})
    assert any(not torch.allclose(w, weights[f"backbone.network.{n}"]) for n, w in fresh.named_parameters())
    for name, weight in new.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)
    # Another generation names both.
    third = run(data, tmp_path / "third", "three", init=str(tmp_path / "tsm"))
    assert third.record["init"] == [new.hash, old.hash] == TSM.load(tmp_path / "third").record["init"]


def test_the_head_takes_over_what_both_know(first):
    old, _ = first
    tasks = {
        "two": {"choices": ["grey", "blue"], "multi_label": False},
        "three": {"choices": ["blue", "violet", "red"], "multi_label": False},
    }
    torch.manual_seed(9)
    network = build_timm("test_resnet", 5, {})
    head = network.get_classifier()
    before = head.weight.detach().clone()
    said = start_from(network, tasks, old)
    assert "the head of 2 classes" in said
    assert "new in the head: 'grey' of two, 'blue' of two, 'violet' of three" in said
    known = old.backbone.network.get_classifier()
    # red, green, blue -> rows of blue and red of the same task; the blue of another task is another question
    for row, source in ((2, 2), (4, 0)):
        assert torch.equal(head.weight[row], known.weight[source]) and torch.equal(head.bias[row], known.bias[source])
    for row in (0, 1, 3):
        assert torch.equal(head.weight[row], before[row])
    seen = {"three": {"choices": ["red\u200b", " green", "blue"], "multi_label": False}}
    assert "the head of 3 classes, all" in start_from(build_timm("test_resnet", 3, {}), seen, old)
    several = {"three": {"choices": ["red", "green", "blue"], "multi_label": True}}
    assert "the head of 0 classes" in start_from(build_timm("test_resnet", 3, {}), several, old)


def test_what_cannot_be_started_from(data, first, tmp_path):
    _, folder = first
    module = tmp_path / "module"
    module.mkdir()
    record = json.loads((folder / "tsm.json").read_text())
    (module / "tsm.json").write_text(json.dumps(record | {"source": {"module": "nowhere:make"}}))
    vit = tmp_path / "vit"
    run(data, vit, "two", arch="test_vit", image_size=32)
    cases = [
        ({"init": str(folder), "arch": "test_vit"}, "is a test_resnet, --arch is test_vit"),
        ({"init": str(module)}, "is the Python module 'nowhere:make'"),
        ({"init": str(tmp_path / "absent")}, "does not exist"),
        ({"init": str(folder), "pretrained": True}, "are two starts"),
        ({"init": str(folder), "folds": 2}, "--folds 2 and --init .+ exclude each other"),
        ({"init": str(vit), "image_size": 48}, r"'pos_embed' is .*use its --arch and its --image-size \(32\)"),
        ({}, "give --arch NAME, or --init DIR"),
    ]
    for settings, sentence in cases:
        with pytest.raises(VITaskError, match=sentence):
            run(data, tmp_path / "tsm", "two", **settings)
        assert not (tmp_path / "tsm").exists()
