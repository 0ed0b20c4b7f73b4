"""A TSM folder that names Python code: nothing is imported without consent at that moment, through any door."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from evaluating import open_model
from trained import make_tsm

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.data.comparison import Seen
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat
from vitask_plugin.method.connector import ExemplarConnector
from vitask_plugin.record import checkpoint, connector_file
from vitask_plugin.tsm.backbone import build_timm
from vitask_plugin.tsm.model import TSM

# Being imported leaves a mark.
MODULE = """
from pathlib import Path

Path(__file__).with_name("imported").touch()

from torch import nn


def make():
    return nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint, drawn_data):
    """A TSM of code, an own TSM of timm, and a checkpoint that was trained with the one of code."""
    root = tmp_path_factory.mktemp("trust")
    (root / "marked.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        words = ["tsm", "import", "--module", "marked:make", "--image-size", "32", "--data", drawn_data / "train.json"]
        words += ["--mean", *"111", "--std", *"111", "--out", root / "tsm"]
        assert main([str(word) for word in words]) == 0, "naming the code on the command line is consent"
        tsm = TSM.load(root / "tsm", trust_code=True)
        directory = shutil.copytree(tiny_checkpoint, root / "llava")
        torch.manual_seed(0)
        connector = ExemplarConnector("linear", 5, 64)
        connector_file.save_connector(connector, connector.state_dict(), directory)
        # That training was allowed to import it, says the record; that is no consent for today.
        flags = VITaskArguments(vitask=True, vitask_tsm="tsm", vitask_trust_tsm_code=True, vitask_connector="linear")
        tasks = {DRAWN.task: {"choices": list(DRAWN.choices)}}
        checkpoint.save_record(directory, flags, connector, {"hash": tsm.hash, "width": 5}, tasks, "v1")
        make_tsm(root / "other")
        yield SimpleNamespace(root=root, tsm=root / "tsm", checkpoint=directory, other=root / "other", data=drawn_data)
    sys.modules.pop("marked", None)


def command(made, output: Path, name: str, trust: bool) -> None:
    folders = {"data": made.data / "train.json", "image-folder": made.data / "images", "out": output, "device": "cpu"}
    flags = {
        "tsm extract": {"tsm": made.tsm},
        "connector fit": {"checkpoint": made.checkpoint, "tsm": made.tsm, "steps": 1, "batch-size": 4},
        "connector align": {"checkpoint": made.checkpoint, "from-tsm": made.tsm, "tsm": made.other},
    }[name] | folders
    words = [*name.split(), *(str(w) for n, v in flags.items() for w in (f"--{n}", v))]
    if main([*words, "--trust-tsm-code"] if trust else words):
        raise VITaskError(sys.stderr.getvalue())


def training(made, output: Path, part: str, trust: bool) -> None:
    """Both places in which a training run loads the TSM."""
    compat.prepare()
    from vitask_plugin.training import starting

    flags = VITaskArguments(vitask=True, vitask_tsm=str(made.tsm), vitask_trust_tsm_code=trust)
    images = [sample["image"] for sample in json.loads((made.data / "train.json").read_text())]
    data = SimpleNamespace(
        data_path=made.data / "train.json",
        image_folder=made.data / "images",
        task_images=lambda: images,
        seen=Seen("", None),
    )
    args = SimpleNamespace(
        output_dir=output, dataloader_num_workers=0, device="cpu", save_on_each_node=False, should_save=True
    )
    if part == "open":
        starting.extract_features(VITaskArguments(**{**flags.flags(), "vitask_trust_tsm_code": True}), data, args)
        sys.modules.pop("marked")
        (made.root / "imported").unlink()
        starting.open_features(flags, output)
    else:
        starting.extract_features(flags, data, args)


def evaluation(made, output: Path, _: str, trust: bool) -> None:
    try:
        open_model(made.checkpoint, tsm=made.tsm, **({"trust_tsm_code": True} if trust else {}))
    except SystemExit as stopped:
        raise VITaskError(str(stopped)) from None


DOORS = {
    "tsm extract": command,
    "connector fit": command,
    "connector align": command,
    "extract": training,
    "open": training,
    "lmms-eval": evaluation,
}


@pytest.mark.parametrize("door", DOORS)
def test_no_code_without_consent(door, made, tmp_path, monkeypatch):
    import io

    sys.modules.pop("marked", None)
    (made.root / "imported").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(VITaskError) as refused:
        DOORS[door](made, tmp_path / "refused", door, False)
    said = str(refused.value)
    assert f"TSM {str(made.tsm)!r}" in said and "import module 'marked' and call its 'make'" in said
    for flag in ("--trust-tsm-code", "--vitask_trust_tsm_code True", "trust_tsm_code=True"):
        assert flag in said
    assert not (made.root / "imported").exists() and "marked" not in sys.modules
    DOORS[door](made, tmp_path / "allowed", door, True)
    assert (made.root / "imported").exists()


def test_a_record_cannot_hide_code_behind_a_timm_name(made, tmp_path):
    """Not by naming both, and not by a name that timm would fetch or read from elsewhere."""
    sys.modules.pop("marked", None)
    (made.root / "imported").unlink(missing_ok=True)
    make_tsm(tmp_path)
    record = json.loads((tmp_path / "tsm.json").read_text())
    for source, sentence in (
        ({"module": "marked:make"}, "would import module 'marked'"),
        (record["source"] | {"module": "marked:make"}, "expected either 'timm' or 'module' in it"),
        ({"module": ["marked:make"]}, r"/source/module is \['marked:make'\]; expected a text"),
        ("marked:make", "/source is 'marked:make'; expected an object"),
    ):
        (tmp_path / "tsm.json").write_text(json.dumps(record | {"source": source}))
        with pytest.raises(VITaskError, match=sentence):
            TSM.load(tmp_path)
    assert not (made.root / "imported").exists()
    for name in ("hf-hub:a/b", "hf_hub:a/b", f"local-dir:{tmp_path}", "resnet18.hf-hub:a/b", f"test_vit.x:{tmp_path}"):
        (tmp_path / "tsm.json").write_text(json.dumps(record | {"source": {"timm": name}}))
        with pytest.raises(VITaskError, match=r"timm has no model|timm cannot build"):
            TSM.load(tmp_path)
        with pytest.raises(
            VITaskError, match=r"timm has no model|timm cannot build|no pretrained weights|cannot be had"
        ):
            build_timm(name, 4, {}, pretrained=not timm.is_model(name))


@pytest.mark.parametrize("path", [".marked:make", "marked:", ":make", "marked..x:make", "os:system", "marked:a.b"])
def test_what_is_no_module_is_not_imported_either(path, made, tmp_path):
    sys.modules.pop("marked", None)
    (made.root / "imported").unlink(missing_ok=True)
    shutil.copytree(made.tsm, tmp_path / "tsm")
    record = json.loads((tmp_path / "tsm" / "tsm.json").read_text())
    (tmp_path / "tsm" / "tsm.json").write_text(json.dumps(record | {"source": {"module": path}}))
    with pytest.raises(VITaskError, match="is not of the form package"):
        TSM.load(tmp_path / "tsm", trust_code=True)
    assert not (made.root / "imported").exists()
