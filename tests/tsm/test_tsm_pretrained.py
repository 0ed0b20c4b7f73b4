"""`vitask tsm train --pretrained`: what is taken from a file, what is said of it, and a head that starts small."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from pictures import write_task
from safetensors.torch import save_file

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.backbone import head_names
from vitask_plugin.tsm.pretrained import start_pretrained

CLASSES = 4


def write(path: Path, arch: str, classes: int, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    network = timm.create_model(arch, num_classes=classes, **options)
    state = network.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
    return state


@pytest.mark.parametrize(
    ("arch", "options"),
    [("resnet10t", {}), ("efficientnet_lite0", {}), ("vit_tiny_patch16_224", {"img_size": 64})],
)
def test_a_new_head_starts_at_the_loss_of_knowing_nothing(tmp_path, arch, options):
    state = write(tmp_path / "weights.safetensors", arch, 10, **options)
    torch.manual_seed(0)
    network, said = start_pretrained(arch, CLASSES, options, str(tmp_path / "weights.safetensors"), {})
    head = head_names(network)
    own = network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in state.items() if name not in head)
    taken = len(own) - len(head)
    assert said.endswith(
        f"weights.safetensors: {taken} of {len(own)} tensors loaded; not loaded: the head (10 classes there, 4 here)"
    )
    pixels, labels = 3 * torch.randn(16, 3, 64, 64), torch.arange(16) % CLASSES
    loss = torch.nn.functional.cross_entropy(network.train()(pixels), labels).item()
    assert loss == pytest.approx(math.log(CLASSES), abs=0.05)
    fresh = timm.create_model(arch, num_classes=CLASSES, **options).state_dict()
    assert own[head[0]].std() < 0.01 * fresh[head[0]].std().clamp(min=1e-3) and own[head[0]].std() > 0


def test_a_head_of_as_many_classes_is_kept(tmp_path):
    state = write(tmp_path / "weights.pth", "test_resnet", CLASSES)
    network, said = start_pretrained("test_resnet", CLASSES, {}, str(tmp_path / "weights.pth"), {})
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert "under 'model': " in said and said.endswith("tensors loaded; the head too")


def test_a_file_without_a_head(tmp_path):
    state = write(tmp_path / "weights.safetensors", "test_vit", 0)
    network, said = start_pretrained("test_vit", CLASSES, {}, str(tmp_path / "weights.safetensors"), {})
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert said.endswith("tensors loaded; the file has no head, so that of 4 classes is new")


def test_positions_for_another_image_size_are_resampled_as_timm_does(tmp_path):
    write(tmp_path / "weights.safetensors", "test_vit", 10)  # made for 160 pixels
    network, said = start_pretrained("test_vit", CLASSES, {"img_size": 64}, str(tmp_path / "weights.safetensors"), {})
    config = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 10}
    expected = timm.create_model(
        "test_vit", num_classes=CLASSES, img_size=64, pretrained=True, pretrained_cfg_overlay=config
    ).state_dict()
    head = head_names(network)
    for name, value in network.state_dict().items():
        assert name in head or torch.allclose(value, expected[name], atol=1e-6), name
    assert "tensors loaded, for images of 64 pixels; not loaded: the head" in said


@pytest.mark.parametrize(
    ("arch", "pretrained", "sentence"),
    [
        ("test_resnet", "absent.pth", r"checkpoint 'absent\.pth' does not exist; check the path"),
        (
            "resnet18",
            "nothing_of_that_name",
            r"is no file, and timm has no weights of that name for resnet18; it has: ",
        ),
        ("test_resnet", "{other}", r"does not fit test_resnet .*of another architecture"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, arch, pretrained, sentence):
    write(tmp_path / "other.safetensors", "test_vit", 10)
    with pytest.raises(VITaskError, match=sentence):
        start_pretrained(arch, CLASSES, {}, pretrained.format(other=tmp_path / "other.safetensors"), {})


def test_the_command_says_and_records_what_it_did(tmp_path, capsys):
    for split, count in (("train", 9), ("val", 6)):
        write_task(tmp_path, "three", ["red", "green", "blue"], count, split=split)
    write(tmp_path / "weights.safetensors", "test_resnet", 10)
    command = ["tsm", "train", "--arch", "test_resnet", "--image-size", "32", "--epochs", "1", "--device", "cpu"]
    command += ["--data", str(tmp_path / "three-train.json"), "--val", str(tmp_path / "three-val.json")]
    command += ["--image-folder", str(tmp_path / "images"), "--out", str(tmp_path / "tsm")]
    assert main([*command, "--pretrained", str(tmp_path / "weights.safetensors"), "--opt", "sgd"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("started from ")]
    assert len(said) == 1 and "the head (10 classes there, 3 here)" in said[0]
    settings = json.loads((tmp_path / "tsm/metrics.json").read_text())["settings"]
    assert settings["lr"] == 1e-4 and settings["opt"] == "sgd" and settings["batch_size"] == 64
    assert settings["pretrained"] == str(tmp_path / "weights.safetensors")
    # The switch alone is still timm's own weights, of which there are none for this one.
    assert main([*command[:2], "--pretrained", *command[2:3], "resnet10", *command[4:]]) == 1
    assert "timm has no model 'resnet10'" in capsys.readouterr().err
