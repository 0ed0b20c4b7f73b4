"""An adapter and a base of the same shape that is not its own, on both hosts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_runs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.host_models import model_of
from vitask_plugin.hf import loading as hf_loading
from vitask_plugin.llava import loading as llava_loading
from vitask_plugin.merge import merge
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, CONNECTOR_FILE
from vitask_plugin.record import base
from vitask_plugin.record.checkpoint import RECORD_FILE

LOADING = {"llava": llava_loading, "hf": hf_loading}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    lora_checkpoint: Path,
    tiny_llava: Any,
    tiny_hf: Callable,
    mixture: Path,
    mixture_features: Path,
) -> dict[str, tuple[Path, Path]]:
    """{host: (folder of an adapter, of the model it was trained from)}. Read only."""
    own, output = tiny_hf("llava").folder, tmp_path_factory.mktemp("hf-lora") / "adapter"
    hf_runs.train(hf_runs.vitask(own, mixture, mixture_features, output, *hf_runs.LORA, "--max_steps", "1"))
    return {"llava": (lora_checkpoint, Path(tiny_llava.base)), "hf": (output, Path(own))}


def changed(folder: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Path:
    """A copy of a model with other weights, of the same shapes."""
    shutil.copytree(folder, target)
    for path in target.glob("model*.safetensors"):
        save_file({name: change(weight).to(dtype) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    return target


def tuned(weight: torch.Tensor) -> torch.Tensor:
    """By one percent, as a model that was instructed differs from what it was."""
    return weight + 0.01 * weight.float().std(correction=0) * torch.randn_like(weight)


@pytest.mark.parametrize("host", ["llava", "hf"])
def test_another_base_of_the_same_shape_is_refused(host: str, trained: dict, tmp_path: Path) -> None:
    (adapter, own), loading = trained[host], LOADING[host]
    torch.manual_seed(0)
    other = changed(own, tmp_path / "other", tuned, torch.float32)
    sentence = rf"the adapter in '{adapter}' was trained on other weights than those in '{other}' \(\d+ of 512 values"
    with pytest.raises(VITaskError, match=sentence) as refused:
        loading.load(adapter, other)
    assert "\n" not in str(refused.value)
    with pytest.raises(VITaskError, match=sentence):
        merge(adapter, tmp_path / "llava-merged", other)
    assert not (tmp_path / "llava-merged").exists()
    with pytest.raises(VITaskError, match=sentence):  # a second stage
        loading.continue_stage(nn.Module(), str(other), str(adapter), lora=True)
    loading.load(adapter, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", ["llava", "hf"])
def test_a_copy_in_another_dtype_is_the_same_base(host: str, dtype: torch.dtype, trained: dict, tmp_path: Path) -> None:
    adapter, own = trained[host]
    base.check(adapter, changed(own, tmp_path / "copy", lambda weight: weight, dtype))


def test_torch_files_are_read_too(trained: dict, tmp_path: Path) -> None:
    adapter, own = trained["llava"]
    torch.manual_seed(0)
    for name, change in (("same", lambda weight: weight), ("other", tuned)):
        folder = changed(own, tmp_path / name, change, torch.float32)
        (path,) = folder.glob("model*.safetensors")
        torch.save(load_file(path), folder / "pytorch_model.bin")
        path.unlink()
    base.check(adapter, tmp_path / "same")
    with pytest.raises(VITaskError, match="other weights"):
        base.check(adapter, tmp_path / "other")


def test_an_early_record_says_nothing_of_its_base(trained: dict, tmp_path: Path) -> None:
    adapter, own = trained["llava"]
    early = shutil.copytree(adapter, tmp_path / "llava-lora-early")
    record = json.loads((early / RECORD_FILE).read_text())
    assert len(record.pop("base")) == base.TENSORS
    (early / RECORD_FILE).write_text(json.dumps(record))
    llava_loading.load(early, changed(own, tmp_path / "other", tuned, torch.float32))


@pytest.mark.parametrize("whose", ["vitask", "upstream"])
def test_a_llava_adapter_names_its_base_itself(
    whose: str, trained: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a name in the Hub's cache, or neither; upstream's own checkpoints have no record beside them."""
    adapter, own = trained["llava"]
    folder = shutil.copytree(adapter, tmp_path / "llava-lora-named")
    if whose == "upstream":
        (folder / RECORD_FILE).unlink()
        (folder / CONNECTOR_FILE).unlink()
    expected = llava_loading.load(folder, own).model.state_dict()

    def named(name: str) -> dict[str, torch.Tensor]:
        path = folder / ADAPTER_CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
        return llava_loading.load(folder).model.state_dict()

    cache = tmp_path / "hub" / "models--lab--base"
    shutil.copytree(own, cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache.parent))
    for name in (str(own), "lab/base"):
        found = named(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[key]) for key, weight in found.items())
    opened = model_of(str(folder))
    opened.open(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    assert opened.folders == [folder, cache / "snapshots" / "0123"]  # cached answers are of both
    said = "is a LoRA checkpoint, and its base 'models/elsewhere' is not here; name the folder .*--model-base"
    with pytest.raises(VITaskError, match=said):
        named("models/elsewhere")
