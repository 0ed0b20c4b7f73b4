"""Checkpoints without a state dict, and weights that fit by name and shape and are still of no use."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import write_task
from safetensors.torch import save_file
from torch import Tensor

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.imported import import_tsm
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.weights import read_weights

State = dict[str, Tensor]
RIGHT: State = timm.create_model("test_resnet", num_classes=3).state_dict()


@pytest.fixture
def data(tmp_path) -> Path:
    return write_task(tmp_path, "colour", ["red", "green", "blue"], 6)


# No state dict -------------------------------------------------------------------------------------------------------

NOTHING = {
    "a list of tensors": ([torch.ones(2, 3), torch.ones(3)], r"a list of 2 \(0: tensor \[2, 3\], 1: tensor \[3\]\)"),
    "pairs": (list(RIGHT.items())[:1], r"a list of 1 \(0: tuple of 2\)"),
    "a tensor": (torch.ones(3), r"a tensor \[3\];"),
    "figures": ({"epoch": 3, "best": [0.5]}, r"a dict of 2 \('epoch': int, 'best': list of 1\)"),
    "an optimizer": ({"optimizer": {"state": {}, "param_groups": []}}, r"a dict of 1 \('optimizer': dict of 2\)"),
    "nothing": ({}, "a dict of 0;"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_there_in_place_of_a_state_dict_is_said(case, tmp_path):
    content, sentence = NOTHING[case]
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(VITaskError, match=rf"holds no state dict \(names with their tensors\), but {sentence}"):
        read_weights(tmp_path / "best.pth", RIGHT, "it")


# Weights that fit and are of no use ----------------------------------------------------------------------------------

HEAD = RIGHT["fc.weight"]
INFINITE = torch.full_like(RIGHT["bn1.running_var"], float("inf"))


def changed(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


def nested(*shapes: int) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(size) for size in shapes])


UNUSABLE: dict[str, tuple[State, str]] = {
    "NaN": ({"fc.weight": changed(HEAD, float("nan"))}, f"fc.weight holds 1 of {HEAD.numel()} values that are NaN or"),
    "infinite": ({"fc.bias": changed(RIGHT["fc.bias"], -float("inf"))}, "fc.bias holds 1 of 3 values that are NaN or"),
    "statistics": (
        {"bn1.running_var": INFINITE},
        "bn1.running_var holds",
    ),
    "too large for float32": ({"fc.weight": changed(HEAD.double(), 1e300)}, "fc.weight holds 1 of"),
    "sparse": ({"fc.weight": HEAD.to_sparse()}, "fc.weight is a tensor of the layout sparse_coo; save it dense"),
    "sparse rows": (
        {"fc.weight": HEAD.to_sparse_csr()},
        "of the layout sparse_csr; save it dense",
    ),
    "meta": ({"fc.weight": HEAD.to("meta")}, "fc.weight is on the meta device and has no values; save"),
    "all meta": ({name: value.to("meta") for name, value in RIGHT.items()}, "weight is on the meta device"),
    "quantized": (
        {"fc.weight": torch.quantize_per_tensor(HEAD, 0.1, 0, torch.qint8)},
        r"fc.weight is quantized \(qint8\); give the weights from before",
    ),
    "integers": ({"fc.weight": HEAD.to(torch.int8)}, "fc.weight holds int8 in place of floating-point numbers; give"),
    "8-bit floats": ({"fc.weight": HEAD.to(torch.float8_e4m3fn)}, "fc.weight holds float8_e4m3fn in place of"),
    "complex": ({"fc.weight": HEAD.to(torch.complex64)}, "fc.weight holds complex64 in place of"),
    "several lengths": ({"fc.weight": nested(2, 3)}, r"\(fc.weight \[...\] there, fc.weight \[3, "),
    "a head in disagreement": (
        {"fc.weight": HEAD[:1]},
        r"unlike .*, fc.weight \[1, \d+\], fc.bias \[3\];",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNUSABLE)
def test_weights_of_no_use_are_named(case, data, tmp_path, capsys):
    content, sentence = UNUSABLE[case]
    torch.save({"model": RIGHT | content}, tmp_path / "best.pth")
    command = ["tsm", "import", "--arch", "test_resnet", "--checkpoint", str(tmp_path / "best.pth"), "--image-size"]
    assert main([*command, "32", "--data", str(data), "--out", str(tmp_path / "tsm")]) == 1
    error = capsys.readouterr().err
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(error)
    assert error.count("\n") == 1 and "best.pth" in error and not (tmp_path / "tsm").exists()


def test_other_weights_of_the_checkpoint_are_offered(tmp_path):
    bad = RIGHT | {"fc.weight": HEAD * float("nan")}
    torch.save({"ema": bad, "model": RIGHT}, tmp_path / "best.pth")
    with pytest.raises(VITaskError, match=r"best.pth' under 'ema': fc.weight .*, or another with --key \(model\)"):
        read_weights(tmp_path / "best.pth", RIGHT, "it")
    assert torch.equal(read_weights(tmp_path / "best.pth", RIGHT, "it", key="model").weights["fc.weight"], HEAD)


def test_a_mask_may_be_infinite_where_the_networks_own_is(tmp_path):
    own = {"mask": torch.tensor([0.0, -float("inf")]), "weight": torch.ones(2)}
    torch.save(own, tmp_path / "best.pth")
    assert torch.equal(read_weights(tmp_path / "best.pth", own, "it").weights["mask"], own["mask"])
    with pytest.raises(VITaskError, match="mask holds 1 of 2 values"):
        read_weights(tmp_path / "best.pth", own | {"mask": torch.zeros(2)}, "it")


def test_a_tsm_with_a_weight_that_is_not_finite_is_not_loaded(data, tmp_path):
    torch.save(RIGHT, tmp_path / "best.pth")
    import_tsm(tmp_path / "tsm", [data], arch="test_resnet", checkpoint=tmp_path / "best.pth", image_size=32)
    save_file(RIGHT | {"fc.weight": changed(HEAD, float("nan"))}, tmp_path / "tsm" / "tsm.safetensors")
    with pytest.raises(VITaskError, match=r"TSM 'test_resnet' has a weight .* fc.weight holds 1 of \d+ values that"):
        TSM.load(tmp_path / "tsm")


@pytest.mark.parametrize("legacy", [True, False])
def test_changed_bytes_are_a_sentence(legacy, tmp_path):
    path, generator = tmp_path / "best.pth", np.random.default_rng(0)
    torch.save({"model": {"weight": torch.ones(3)}}, path, _use_new_zipfile_serialization=not legacy)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), 5):
            content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            read_weights(path, {"weight": torch.ones(3)}, "it")
        except VITaskError:
            refused += 1
    assert refused > 30
