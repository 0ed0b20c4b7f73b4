"""Classifiers trained elsewhere: timm checkpoints and modules by import path, and what does not fit."""

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from pictures import write_task
from safetensors.torch import save_file

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.formats import load
from vitask_plugin.tsm.imported import import_tsm
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.train import Settings, train
from vitask_plugin.tsm.weights import read_weights

MODULE = '''
import torch
from torch import nn


class Split(nn.Module):
    """Has forward_features and forward_head, as timm's models have."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 3)

    def forward_features(self, x):
        return self.body(x)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Plain(nn.Module):
    """Shows nothing: hooks have to look. Two linear layers, the classifier is the last that runs."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(5, 3)
        self.stem, self.norm, self.pool = nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.classifier(self.hidden(self.pool(x).flatten(1)).tanh())


class Tokens(nn.Module):
    """A class token before 4 x 4 patches, and an output object as of transformers."""

    def __init__(self):
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 6, 8, 8), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.cls, self.head = nn.Parameter(torch.ones(1, 1, 6)), nn.Linear(6, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))
        return type("Output", (), {"logits": self.head(x[:, 0])})()


class NoHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 3, 8)

    def forward(self, x):
        return self.body(x).mean((2, 3))


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def split():
    return seeded(Split)


def plain():
    return seeded(Plain)


def tokens():
    return seeded(Tokens)


def no_head():
    return seeded(NoHead)


def not_a_module():
    return 3


def diverged():
    module = plain()
    module.norm.running_mean[2] = float("nan")
    return module


def without_values():
    with torch.device("meta"):
        return plain()


def sparse():
    module = plain()
    module.classifier.weight = nn.Parameter(module.classifier.weight.detach().to_sparse())
    return module


def lazy():
    module = plain()
    module.classifier = nn.LazyLinear(3)
    return module
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("val", 12)):
        write_task(root, "colour", ["red", "green", "blue"], count, split=split)
    write_task(root, "two", ["red", "blue"], 4)
    return root


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    (tmp_path / "elsewhere.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("elsewhere", None)


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["safetensors", "pth", "training"])
def test_a_timm_checkpoint(data, tmp_path, form):
    torch.manual_seed(3)
    network = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    weights = network.state_dict()
    if form == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(weights, file)
    elif form == "pth":
        file = tmp_path / "weights.pth"
        torch.save(weights, file)
    else:  # as timm's training script writes it, wrapped by DDP, with averaged weights
        file = tmp_path / "model_best.pth.tar"
        wrong = {f"module.{name}": torch.zeros_like(value) for name, value in weights.items()}
        right = {f"module.{name}": value for name, value in weights.items()}
        arguments = argparse.Namespace(model="test_vit", lr=0.1)
        torch.save({"epoch": 3, "args": arguments, "state_dict": wrong, "state_dict_ema": right}, file)
    tsm, found = import_tsm(
        tmp_path / "tsm", [data / "colour-train.json"], arch="test_vit", checkpoint=file, image_size=32
    )
    assert found is None
    for model in (tsm, TSM.load(tmp_path / "tsm")):
        assert torch.equal(model(pixels()).logits, network(pixels()))
    assert tsm.record["mean"] == list(network.pretrained_cfg["mean"])


def test_the_accuracy_shows_whether_it_was_imported_rightly(data, tmp_path, capsys):
    settings = Settings("test_resnet", image_size=32, epochs=12, batch_size=16, device="cpu")
    trained = train(
        settings, [data / "colour-train.json"], [data / "colour-val.json"], [data / "images"], tmp_path / "tsm"
    )
    command = ["tsm", "import", "--arch", "test_resnet", "--checkpoint", str(tmp_path / "tsm" / "tsm.safetensors")]
    command += ["--data", str(data / "colour-val.json"), "--image-folder", str(data / "images")]
    command += ["--image-size", "32"]
    assert main([*command, "--out", str(tmp_path / "right")]) == 0
    best = json.loads((tmp_path / "tsm" / "metrics.json").read_text())["best"]["val_accuracy"]
    assert best > 0.9 and f"accuracy on colour: {best:.3f}" in capsys.readouterr().out
    assert TSM.load(tmp_path / "right").hash == trained.hash
    flags = ["--mean", "1", "1", "1", "--std", "0.1", "0.1", "0.1"]
    assert main([*command, "--out", str(tmp_path / "wrong"), *flags]) == 0
    found = json.loads((tmp_path / "wrong" / "metrics.json").read_text())["val_accuracy"]
    assert found < 0.9 and f"accuracy on colour: {found:.3f}" in capsys.readouterr().out


STATISTICS = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(("name", "width"), [("split", 6), ("plain", 5), ("tokens", 6)])
def test_a_module_by_import_path(data, elsewhere, name, width):
    output = elsewhere / "tsm"
    tsm, _ = import_tsm(output, [data / "colour-train.json"], module=f"elsewhere:{name}", **STATISTICS)
    network = getattr(__import__("elsewhere"), name)().eval()
    expected = network(pixels())
    for model in (tsm, TSM.load(output, trust_code=True)):
        found = model(pixels())
        torch.testing.assert_close(found.logits, getattr(expected, "logits", expected))
        assert found.pooled.shape == (2, width) and found.patches.shape == (2, 16, 6)
        head = network.classifier if name == "plain" else network.head
        torch.testing.assert_close(head(found.pooled), found.logits)
    if name == "tokens":  # the patches, without the class token before them
        seen = []
        network.block.register_forward_hook(lambda *call: seen.append(call[2]))
        network(pixels())
        torch.testing.assert_close(tsm(pixels()).patches, seen[0][:, 1:])
    if name == "plain":  # what comes out of the norm, place by place
        torch.testing.assert_close(tsm(pixels()).patches[:, 5], network.norm(network.stem(pixels()))[:, :, 1, 1])


def test_a_module_with_a_checkpoint(data, elsewhere):
    network = import_module("elsewhere").plain().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.5
    torch.save(network.state_dict(), elsewhere / "weights.pt")
    arguments = {"module": "elsewhere:plain", "checkpoint": elsewhere / "weights.pt", **STATISTICS}
    import_tsm(elsewhere / "tsm", [data / "colour-train.json"], **arguments)
    assert torch.equal(TSM.load(elsewhere / "tsm", trust_code=True)(pixels()).logits, network(pixels()))


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_checkpoints_that_are_damaged_or_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(3), "more": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(VITaskError, match=r"evil.pth' holds more than weights \(posix.system\), and would run code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "hacked").exists()

    torch.save({"weight": torch.ones(300)}, tmp_path / "whole.pth")
    save_file({"weight": torch.ones(300)}, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        for size in (len(data) - 20, 30, 0):
            (tmp_path / name).write_bytes(data[:size])
            with pytest.raises(VITaskError, match=rf"checkpoint '.*{name}' is {'damaged' if size else 'empty'}"):
                load(tmp_path / name)
    with pytest.raises(VITaskError, match=r"checkpoint 'gone.pth' does not exist; check the path"):
        load(Path("gone.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(VITaskError, match=r"list.pth' holds no state dict .* a list of 2 \(0: int, 1: int\); save"):
        read_weights(tmp_path / "list.pth", {}, "a network")


def test_what_does_not_fit(data, elsewhere):
    network = timm.create_model("test_vit", num_classes=3, img_size=32)
    torch.save(network.state_dict(), elsewhere / "three.pth")
    torch.save(import_module("elsewhere").plain().state_dict(), elsewhere / "plain.pth")
    vit = {"arch": "test_vit", "checkpoint": elsewhere / "three.pth", "image_size": 32}
    module = {"module": "elsewhere:plain", **STATISTICS}
    colour, two = [data / "colour-train.json"], [data / "two-train.json"]
    cases = [
        (two, vit, r"has a head for 3 classes, but the data's tasks, two \(2\), have 2 together"),
        (
            colour + two,
            vit,
            r"has a head for 3 classes, but the data's tasks, colour \(3\), two \(2\), have 5 together",
        ),
        (two, module, r"'elsewhere:plain' gives 3 logits, but its tasks, two \(2\), have 2 classes together"),
        (colour, vit | {"image_size": 64}, "does not fit test_vit .*pos_embed.*check the name and --image-size"),
        (
            colour,
            vit | {"arch": "test_resnet"},
            r"does not fit test_resnet \(none of its names .*; check the name",
        ),
        (colour, vit | {"checkpoint": None}, "--arch test_vit needs --checkpoint FILE"),
        (colour, vit | {"std": [0, 1, 1]}, r"--std is \[0, 1, 1\]; expected three numbers"),
        (colour, vit | {"mean": [123.7, 116.3, 103.5]}, r"--mean is \[123.7.* divide those of pixels in 0..255 by 255"),
        (colour, vit | {"std": [58.4, 57.1, 57.4]}, r"--std is \[58.4.* from 0.00195 to 1"),
        (colour, vit | {"mean": [0.5, 0.5, float("nan")]}, r"--mean is .*nan\]; expected three numbers"),
        (colour, vit | {"module": "elsewhere:plain"}, "give either --arch NAME with --checkpoint FILE, or --module"),
        (colour, {}, "give either --arch NAME with --checkpoint FILE, or --module"),
        (colour, module | {"mean": None}, "needs --image-size, --mean and --std"),
        (colour, module | {"module": "elsewhere:none"}, "'elsewhere:none' cannot be imported .*PYTHONPATH"),
        (colour, module | {"module": "nowhere:none"}, "'nowhere:none' cannot be imported .*PYTHONPATH"),
        (colour, module | {"module": "elsewhere"}, "'elsewhere' is not of the form package.module:factory"),
        (colour, module | {"module": "os:getcwd"}, "'os:getcwd' is not of the form package.module:factory"),
        (colour, module | {"module": "elsewhere:not_a_module"}, "gives a int, expected a torch.nn.Module"),
        (
            colour,
            module | {"module": "elsewhere:no_head"},
            "NoHead has no linear layer that takes one vector per image",
        ),
        (colour, module | {"module": "elsewhere:diverged"}, "norm.running_mean holds 1 of 6 values that are NaN or"),
        (colour, module | {"module": "elsewhere:without_values"}, "classifier.weight is on the meta device and has no"),
        (colour, module | {"module": "elsewhere:sparse"}, "classifier.weight is a tensor of the layout sparse_coo;"),
        (colour, module | {"module": "elsewhere:lazy"}, "classifier.weight is not initialised; save or build"),
        (
            colour,
            module | {"module": "elsewhere:lazy", "checkpoint": elsewhere / "plain.pth"},
            r"does not fit elsewhere:lazy \(classifier.weight \[3, 5\] there, classifier.weight \[...\] expected",
        ),
        (colour, module | {"image_size": 4}, "'elsewhere:plain' cannot take a 4x4 RGB image"),
    ]
    before = sorted(name for name in os.listdir(elsewhere) if name != "__pycache__")
    for files, arguments, sentence in cases:
        with pytest.raises(VITaskError, match=sentence):
            import_tsm(elsewhere / "tsm", files, **arguments)
        assert sorted(name for name in os.listdir(elsewhere) if name != "__pycache__") == before


FAULTY = """
import torch
from torch import nn

class Named(nn.Module):
    key = "logits"
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(3, 3)
    def forward(self, pixels):
        return {self.key: self.classifier(pixels.mean((2, 3)))}

class Unknown(Named):
    key = "scores"

def needs_more(classes):
    return Named()

def raises():
    raise KeyError("a setting")

def broken_forward():
    network = Named()
    network.forward = lambda pixels: network.nothing
    return network
"""


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("needs_more", r"ends with TypeError \(.*'classes'\); it must give the network when called without arguments"),
        ("raises", r"ends with KeyError \('a setting'\); it must give the network"),
        ("Unknown", r"the TSM Unknown gives a dict; expected logits \[B, K\], or an object with them under `logits`"),
        ("broken_forward", r"cannot take a 32x32 RGB image \(.*'nothing'\)"),
    ],
)
def test_faults_of_somebody_elses_code_are_one_sentence(data, elsewhere, factory, sentence):
    (elsewhere / "elsewhere.py").write_text(FAULTY)
    with pytest.raises(VITaskError, match=sentence):
        import_tsm(elsewhere / "tsm", [data / "colour-train.json"], module=f"elsewhere:{factory}", **STATISTICS)


@pytest.mark.parametrize(
    ("code", "name"), [("def make(:", "SyntaxError"), ("raise RuntimeError('no GPU')", "RuntimeError")]
)
def test_a_module_that_cannot_be_imported_is_named(data, elsewhere, code, name):
    (elsewhere / "elsewhere.py").write_text(code)
    with pytest.raises(
        VITaskError, match=rf"TSM module 'elsewhere:make' ends with {name} \(.*\) when imported; fix it"
    ):
        import_tsm(elsewhere / "tsm", [data / "colour-train.json"], module="elsewhere:make", **STATISTICS)


def test_logits_in_a_dict(data, elsewhere):
    (elsewhere / "elsewhere.py").write_text(FAULTY)
    tsm, _ = import_tsm(elsewhere / "tsm", [data / "colour-train.json"], module="elsewhere:Named", **STATISTICS)
    images = pixels()
    assert torch.equal(
        tsm(images).logits, import_module("elsewhere").Named.forward(tsm.backbone.network, images)["logits"]
    )
