"""Checkpoints as people save them: which weights are taken, under which names, and what is no checkpoint at all."""

import collections
import datetime
import gzip
import io
import json
import pathlib
import pickle
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pictures import write_task
from safetensors.torch import save_file
from torch import Tensor, nn

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.imported import import_tsm
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.weights import read_weights

State = dict[str, Tensor]


def network(seed: int = 3, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=classes).eval()


RIGHT, WRONG = network(3).state_dict(), network(4).state_dict()
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def backbone_prefixed(prefix: str, head: str = "") -> State:
    return {f"{head if name.startswith('fc.') else prefix}{name}": value for name, value in RIGHT.items()}


def without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


LAYOUTS: dict[str, Any] = {
    **{key: {key: RIGHT, "optimizer": OPTIMIZER, "epoch": 3} for key in ("net", "model", "state_dict", "weights")},
    **{key: {key: RIGHT} for key in ("model_state_dict", "ema", "model_ema", "state_dict_ema", "network", "params")},
    **{key: {key: RIGHT} for key in ("teacher", "student", "module", "my_own_name")},
    **{prefix: prefixed(RIGHT, prefix) for prefix in ("module.", "model.", "net.", "_orig_mod.", "backbone.")},
    **{prefix: prefixed(RIGHT, prefix) for prefix in ("encoder.", "student.", "module._orig_mod.", "model.backbone.")},
    "prefix on the backbone alone": backbone_prefixed("backbone."),
    "another on the head": backbone_prefixed("backbone.", "head."),
    "both behind DDP": prefixed(backbone_prefixed("encoder."), "module."),
    "nested": {"checkpoint": {"model": {"module": prefixed(RIGHT, "module.")}}},
    "lightning": {
        "pytorch-lightning_version": "2.1",
        "epoch": 1,
        "state_dict": prefixed(RIGHT, "model.") | {"criterion.weight": torch.ones(3), "val_acc.tp": torch.ones(1)},
        "optimizer_states": [OPTIMIZER],
        "hyper_parameters": {"lr": 0.1},
    },
    "averaged by torch": prefixed(RIGHT, "module.") | {"n_averaged": torch.tensor(3)},
    "a shadow": {"ema": {"decay": 0.99, "shadow_params": RIGHT}, "optimizer": OPTIMIZER},
    "a profiler's leftovers": RIGHT | {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
    "without counters": {name: value for name, value in RIGHT.items() if "num_batches" not in name},
    "half precision": {name: value.half() if value.is_floating_point() else value for name, value in RIGHT.items()},
    "plain values": {
        "model": RIGHT,
        "best": np.float64(0.9),
        "path": pathlib.PosixPath("/runs"),
        "history": collections.defaultdict(list),
    },
    "another teacher": prefixed(RIGHT, "student.") | {"teacher.stem.weight": torch.ones(9)},
    "averaged first": {"model": WRONG, "ema": RIGHT},
    "averaged first, in one list": prefixed(WRONG, "model.") | prefixed(RIGHT, "model_ema.module."),
    "a teacher before its student": {"student": prefixed(WRONG, "module."), "teacher": prefixed(RIGHT, "module.")},
    "in a list": [RIGHT],
    "in a tuple, beside its optimizer": (RIGHT, OPTIMIZER, 3),
    "by number": {0: {"net": RIGHT}},
    "six keys deep": {"run": {"best": {"fold": {"0": {"model": {"module": prefixed(RIGHT, "module.")}}}}}},
    "of the best loss": {"best_loss": RIGHT},
    "in parts": {
        "backbone": without_head(RIGHT),
        "head": {name: RIGHT[name] for name in ("fc.weight", "fc.bias")},
        "criterion": {"weight": torch.ones(3)},
    },
    "a head beside another's": prefixed(without_head(RIGHT), "backbone.")
    | {name: RIGHT[name] for name in ("fc.weight", "fc.bias")}
    | {"momentum_head.fc.weight": torch.zeros(3, RIGHT["fc.weight"].shape[1]), "momentum_head.fc.bias": torch.zeros(3)},
    "averages of the parameters alone": {"ema": {"stem.0.weight": torch.zeros(9)}, "model": RIGHT},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_found(layout, tmp_path):
    torch.save(LAYOUTS[layout], tmp_path / "best.pth")
    found = read_weights(tmp_path / "best.pth", network(5).state_dict(), "test_resnet").weights
    for name, value in RIGHT.items():
        if "num_batches" not in name:
            wanted = value.half() if layout == "half precision" else value
            assert torch.equal(found[name], wanted), name
    network(5).load_state_dict(found)


@pytest.mark.parametrize("legacy", [True, False])
def test_any_file_name_and_both_of_torchs_formats(legacy, tmp_path):
    torch.save({"model": RIGHT}, tmp_path / "model_best", _use_new_zipfile_serialization=not legacy)
    assert read_weights(tmp_path / "model_best", RIGHT, "it").label == "model"
    save_file(RIGHT, tmp_path / "weights.bin")
    assert read_weights(tmp_path / "weights.bin", RIGHT, "it").label == ""


@pytest.fixture
def data(tmp_path) -> Path:
    return write_task(tmp_path, "colour", ["red", "green", "blue"], 6)


def test_of_several_weights_one_is_taken_and_named_and_the_flag_takes_another(data, tmp_path, capsys):
    torch.save({"model": WRONG, "model_ema": prefixed(RIGHT, "module.")}, tmp_path / "best.pth")
    command = ["tsm", "import", "--arch", "test_resnet", "--checkpoint", str(tmp_path / "best.pth"), "--image-size"]
    command += ["32", "--data", str(data)]
    for flags, state in (([], RIGHT), (["--key", "model"], WRONG), (["--key", "model_ema"], RIGHT)):
        assert main([*command, "--out", str(tmp_path / "tsm"), *flags]) == 0
        out = capsys.readouterr().out
        assert ("took 'model_ema.module'; --key takes another of 'model'" in out) == (not flags)
        assert torch.equal(TSM.load(tmp_path / "tsm").backbone.network.fc.weight, state["fc.weight"])
    assert main([*command, "--out", str(tmp_path / "tsm"), "--key", "swa"]) == 1
    assert "has no weights under --key 'swa'; there are" in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "shared"), [(3, True), (6, False)])
def test_a_joint_heads_width_says_whether_tasks_share(tmp_path, classes, shared):
    files = [write_task(tmp_path, task, ["red", "green", "blue"], 6) for task in ("axial", "coronal")]
    torch.save(network(classes=classes).state_dict(), tmp_path / "best.pth")
    arguments = {"arch": "test_resnet", "checkpoint": tmp_path / "best.pth", "image_size": 32}
    tsm, _ = import_tsm(tmp_path / "tsm", files, **arguments)
    assert tsm.columns("coronal") == (slice(0, 3) if shared else slice(3, 6))
    torch.save(network(classes=4).state_dict(), tmp_path / "best.pth")
    with pytest.raises(VITaskError, match=r"for 4 classes, .* have 6 together, or 3 where the same labels share"):
        import_tsm(tmp_path / "tsm", files, **arguments)


# What does not fit --------------------------------------------------------------------------------------------------


def without(name: str) -> State:
    return {key: value for key, value in RIGHT.items() if key != name}


MISFITS = {
    "another architecture": ({"blocks.0.w": torch.ones(2, 3)}, r"none of its names .*; found: blocks.0.w \[2, 3\]"),
    "a shape": (RIGHT | {"fc.weight": torch.ones(7, 9)}, r"\(fc.weight \[7, 9\] there, fc.weight \[3, "),
    "no classifier": (without_head(RIGHT), r"its classifier is missing: fc.weight, fc.bias\)"),
    "a classifier called otherwise": (
        without_head(RIGHT) | {"last.weight": RIGHT["fc.weight"], "last.bias": RIGHT["fc.bias"]},
        r"its classifier is missing, fc.weight, fc.bias; and it has 2 weights .* last.weight \[3, ",
    ),
    "one missing": ({"net": without("fc.bias")}, r"1 of \d+ are missing: fc.bias\); found under 'net': "),
    "more than the network": (RIGHT | {"layer1.0.gamma": torch.ones(4)}, r"1 weights that the network does not have, "),
    "a layer between": (backbone_prefixed("backbone.") | {"neck.w": torch.ones(4)}, "does not have, neck.w"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_the_sentence_shows_both_sides_and_the_cause_first(case, tmp_path):
    content, cause = MISFITS[case]
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(VITaskError, match=cause) as error:
        read_weights(
            tmp_path / "best.pth", RIGHT, "test_resnet", loose=("fc.weight", "fc.bias") if "class" in case else ()
        )
    first = next(iter(RIGHT))
    assert str(error.value).startswith(f"checkpoint '{tmp_path}/best.pth' does not fit test_resnet (")
    assert f"; expected: {first} [{', '.join(map(str, RIGHT[first].shape))}], " in str(error.value)
    assert "\n" not in str(error.value)


def resnet(arch: str) -> State:
    return timm.create_model(arch, num_classes=3).state_dict()


def test_the_cause_is_a_true_difference(tmp_path):
    """A block that the network does not have is not taken for the network's stem, whose last names are the same."""
    small, large = resnet("resnet18"), resnet("resnet34")
    torch.save({"model": prefixed(large, "net.")}, tmp_path / "34.pth")
    torch.save(small, tmp_path / "18.pth")
    more = len(large.keys() - small.keys()) - sum("num_batches" in name for name in large.keys() - small.keys())
    cause = rf"\(it has {more} weights that the network does not have, net.layer1.2.conv1.weight \[64, 64, 3, 3\], "
    with pytest.raises(VITaskError, match=cause):
        read_weights(tmp_path / "34.pth", small, "resnet18", loose=("fc.weight", "fc.bias"))
    missing = [name for name in large if name not in small and "num_batches" not in name]
    with pytest.raises(VITaskError, match=rf"\({more} of \d+ are missing: {', '.join(missing[:3])}\); found: conv1"):
        read_weights(tmp_path / "18.pth", large, "resnet34", loose=("fc.weight", "fc.bias"))
    torch.save(resnet("resnet50"), tmp_path / "50.pth")
    with pytest.raises(
        VITaskError, match=r"\(layer1.0.conv1.weight \[64, 64, 1, 1\] there, layer1.0.conv1.weight \[64"
    ):
        read_weights(tmp_path / "50.pth", small, "resnet18")


def test_one_name_is_not_taken_for_two(tmp_path):
    """The norm of the only block is itself, and not the missing one of the stem."""
    norm = {name: torch.ones(4) for name in ("weight", "bias")}
    expected = prefixed(norm, "norm.") | prefixed(norm, "block.norm.")
    torch.save(prefixed(norm, "block.norm."), tmp_path / "best.pth")
    with pytest.raises(VITaskError, match=r"2 of 4 are missing: norm.weight, norm.bias\)"):
        read_weights(tmp_path / "best.pth", expected, "it")


class Local(nn.Linear):
    """A class of the user's own."""


def whole_module(path: Path) -> None:
    torch.save({"model": Local(2, 2)}, path)


def old_whole_module(path: Path) -> None:
    torch.save(Local(2, 2), path, _use_new_zipfile_serialization=False)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run/best.pth", b"")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("best.pth"), io.BytesIO())


def folder(**files: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_text(json.dumps(content))

    return write


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (content(b""), "is empty; copy or download it again"),
    "LFS": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "git-LFS pointer .*`git lfs pull`"),
    "HDF5": (content(b"\x89HDF\r\n\x1a\n" + b"\0" * 99), "an HDF5 file, as Keras and TensorFlow write it; load it"),
    "ONNX": (content(b"\x08\x07\x12\x07pytorch\x1a\x05"), "an ONNX graph, which has no state dict; use the model"),
    "a web page": (content(b"\n<!DOCTYPE html><html>"), "a web page and not the file itself; download it again"),
    "gzip": (content(gzip.compress(b"x")), "a gzip archive; unpack it"),
    "DVC": (content(b"outs:\n- md5: 12\n  path: best.pth\n"), "a DVC pointer and not the file itself; .*`dvc pull`"),
    "annex": (content(b"/annex/objects/SHA256E-s1--a.pth\n"), "a git-annex pointer .*`git annex get`"),
    "zstd": (content(b"\x28\xb5\x2f\xfd" + b"\xff" * 99), "a Zstandard archive; unpack it"),
    "an error": (
        content(b'{"error":"Invalid username"}'),
        'a text file that begins \'{"error":"Invalid username"}\'; copy',
    ),
    "a message": (content(b"Entry not found"), "a text file that begins 'Entry not found'; copy or download"),
    "torch.export": (exported, r"a program of torch.export .*torch.export.load\('best.pth'\).state_dict,"),
    "other bytes": (
        content(bytes(range(128, 255)) * 9),
        r"no torch checkpoint of weights \(UnpicklingError\); copy it",
    ),
    "zeros": (content(bytes(5000)), r"is damaged \(\w+\); copy it again"),
    "arrays": (
        lambda path: path.write_bytes(pickle.dumps({"a": np.ones(2)}, 2)),
        "a pickle that torch.save did not write",
    ),
    "parts": (
        folder(**{"model-00001-of-00002__safetensors": 0}),
        "a folder with the weights in several files; load them",
    ),
    "tar": (tarred, "a tar archive; unpack it"),
    "NumPy": (lambda path: np.save(path.open("wb"), np.ones(3)), "a NumPy array"),
    "zip": (zipped, r"a zip of files; unpack it and give the checkpoint inside \('run/best.pth'\)"),
    "TorchScript": (torchscript, r"a TorchScript archive .*torch.save\(torch.jit.load\('best.pth'\).state_dict\(\)"),
    "module": (whole_module, r"a whole module that was pickled, .*Local.*torch.save\(model.state_dict\(\)"),
    "old module": (old_whole_module, r"a whole module that was pickled, .*Local.*torch.save\(model.state_dict\(\)"),
    "other objects": (lambda path: torch.save({"a": io.StringIO}, path), r"holds more than weights \(_io.StringIO\)"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Path)), r"holds more than weights \(pathlib.Path\)"),
    "timm folder": (
        folder(config__json={"architecture": "resnet18"}, model__safetensors=0),
        "folder of the timm model 'resnet18'; give --arch resnet18 --checkpoint .*/model.safetensors",
    ),
    "transformers folder": (folder(config__json={"model_type": "vit"}), "transformers' 'vit', .*; give --module"),
    "SavedModel": (folder(saved_model__pb=0), "a TensorFlow SavedModel"),
    "folder": (folder(best__pt=0), r"is a folder; give the checkpoint file inside \('best.pt'\)"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_files_are_named_as_what_they_are(case, data, tmp_path, capsys):
    write, sentence = FOREIGN[case]
    write(tmp_path / "best.pth")
    command = ["tsm", "import", "--arch", "test_resnet", "--checkpoint", str(tmp_path / "best.pth"), "--image-size"]
    assert main([*command, "32", "--data", str(data), "--out", str(tmp_path / "tsm")]) == 1
    error = capsys.readouterr().err
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(error)
    assert error.count("\n") == 1 and not (tmp_path / "tsm").exists()


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_one_of_several_files_is_named_by_its_name(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        VITaskError, match=r"(one of 2 files that hold|the index of) .*save the state dict into one file"
    ):
        read_weights(tmp_path / name, RIGHT, "test_resnet")


def test_torchs_advice_to_run_whatever_is_in_a_file_is_not_passed_on(tmp_path):
    for number, data in enumerate((bytes(5000), bytes(range(128, 255)) * 9, b"\x80\x02}q\x01.")):
        (tmp_path / f"{number}.pth").write_bytes(data)
        with pytest.raises(VITaskError) as error:
            read_weights(tmp_path / f"{number}.pth", RIGHT, "it")
        assert "weights_only" not in str(error.value) and len(str(error.value)) < 400


PLAIN: dict[str, Any] = {
    "array": np.eye(3),
    "texts": np.array(["red", "blue"]),
    "a NumPy text": np.str_("red"),
    "random state": np.random.get_state(),
    "time": datetime.datetime(2024, 1, 1),
    "duration": datetime.timedelta(seconds=3),
    "frozen set": frozenset({1}),
    "namespace": types.SimpleNamespace(lr=0.1),
    "path": pathlib.Path("runs/1"),
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_values_beside_the_weights_are_no_code(value, tmp_path):
    torch.save({"model": RIGHT, "beside": value}, tmp_path / "best.pth")
    assert_right(read_weights(tmp_path / "best.pth", RIGHT, "test_resnet").weights)


@pytest.mark.parametrize("name", ["pathlib\nWindowsPath", "pathlib._local\nPosixPath", "pathlib._local\nWindowsPath"])
def test_a_path_of_another_system_or_python_is_one(name, tmp_path):
    torch.save({"model": RIGHT, "args": pathlib.Path("runs/1")}, tmp_path / "own.pth")
    with zipfile.ZipFile(tmp_path / "own.pth") as own, zipfile.ZipFile(tmp_path / "best.pth", "w") as other:
        for entry in own.infolist():
            data = own.read(entry)
            assert entry.filename != "own/data.pkl" or b"cpathlib\nPosixPath" in data
            other.writestr(entry, data.replace(b"cpathlib\nPosixPath", b"c" + name.encode()))
    assert_right(read_weights(tmp_path / "best.pth", RIGHT, "test_resnet").weights)


def test_torchs_format_under_the_name_of_another(tmp_path):
    torch.save(RIGHT, tmp_path / "best.safetensors")
    assert_right(read_weights(tmp_path / "best.safetensors", RIGHT, "test_resnet").weights)


def assert_right(weights: State) -> None:
    assert weights.keys() == RIGHT.keys() and all(torch.equal(weights[name], RIGHT[name]) for name in RIGHT)


def test_a_head_of_one_output_is_told_what_to_become(tmp_path):
    """The logit z of the second class: softmax over (0, z) is its sigmoid."""
    write_task(tmp_path, "colour", ["red", "green"], 4)
    torch.save(network(classes=1).state_dict(), tmp_path / "best.pth")
    with pytest.raises(
        VITaskError, match=r"a head of one output, .*; give it a row of zeros .*torch.cat\(\[0 \* weight,"
    ):
        import_tsm(
            tmp_path / "tsm", [tmp_path / "colour-train.json"], arch="test_resnet", checkpoint=tmp_path / "best.pth"
        )
