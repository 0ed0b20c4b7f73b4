"""A model is what its `config.json` says: a path with "mpt" in it is no MPT, and a Mistral called llava is no Llama."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from runs import LORA, arguments, history, train

from vitask_plugin.errors import VITaskError


def renamed(folder: Path, target: Path, **config: object) -> Path:
    """A copy of a model under another name, with other entries in its configuration."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_a_path_with_mpt_in_it_trains_the_llama_that_lies_there(lora, tiny_llava, mixed_data, feature_store, tmp_path):
    base = renamed(tiny_llava.base, tmp_path / "llava-prompted-mpt")
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), "--max_steps", "1", *lora]
    plain = train(tiny_llava, mixed_data, tmp_path / "llava-plain", *flags)
    other = train(tiny_llava, mixed_data, tmp_path / "llava-other", *flags, "--model_name_or_path", str(base))
    assert history(other)[0]["loss"] == history(plain)[0]["loss"]
    from vitask_plugin.llava import loading

    moved = other.rename(tmp_path / "mpt-mistral-lora")  # names that upstream's loader goes by
    loaded = loading.load(moved, base if lora else None)
    assert type(loaded.model).__name__ == "VITaskLlavaLlamaForCausalLM"
    for file in moved.rglob("*"):
        if file.suffix in (".json", ".md"):
            assert "ModelPath" not in file.read_text()


@pytest.mark.parametrize("kind", ["mpt", "llava_mpt", "mistral", "llava_mistral", "qwen2"])
def test_another_model_type_is_refused_whatever_its_path(kind, tiny_llava, tiny_checkpoint, tmp_path, monkeypatch):
    from vitask_plugin.llava import compat, loading
    from vitask_plugin.llava.install import wrap

    compat.prepare()
    from llava.train.train import train

    model = renamed(tiny_checkpoint, tmp_path / "llava-llama", model_type=kind)
    expected = rf"model in '.*llava-llama' is of model_type {kind}, .* \(llama, llava, llava_llama\); give one of those"
    with pytest.raises(VITaskError, match=expected):
        loading.load(model)
    flags = ["--vitask", "True", "--vitask_ep", "none", "--model_name_or_path", str(model)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(tiny_llava, tmp_path, tmp_path / "out", *flags)])
    with pytest.raises(SystemExit, match=f"is of model_type {kind}, "):
        wrap(train)()


def test_a_tower_that_is_no_clip_is_refused(tiny_llava, tiny_checkpoint, tmp_path):
    from vitask_plugin.llava import loading

    tower = renamed(tiny_llava.tower, tmp_path / "openai-clip", model_type="siglip_vision_model")
    model = renamed(tiny_checkpoint, tmp_path / "llava", mm_vision_tower=str(tower))
    with pytest.raises(VITaskError, match=r"vision tower in '.*openai-clip' is of model_type siglip_vision_model"):
        loading.load(model)


def test_transformers_own_llava_has_the_name_but_another_layout(tiny_checkpoint, tmp_path):
    from vitask_plugin.llava import loading

    model = renamed(tiny_checkpoint, tmp_path / "llava", model_type="llava", text_config={"model_type": "llama"})
    with pytest.raises(VITaskError, match="model_type llava in the layout of transformers' own LLaVA"):
        loading.load(model)
