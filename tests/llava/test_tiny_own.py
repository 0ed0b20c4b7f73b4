"""`python -m vitask_plugin.llava.tiny --data DIR`, and what loading a checkpoint says of the frozen tower's weights."""

import importlib
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

LABELS = {"task": "mri", "choices": ["glioma", "meningioma"], "modality": "brain MRI", "type": "multi-class"}


@pytest.mark.parametrize("host", ["llava", "hf"])
def test_the_tokenizer_knows_ones_own_labels(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mri").mkdir()
    (tmp_path / "mri" / "labels.json").write_text(json.dumps(LABELS))
    module = importlib.import_module(f"vitask_plugin.{host}.tiny")

    def run(name: str, data: Path) -> None:
        family = ["--family", "llava"] * (host == "hf")
        monkeypatch.setattr(sys, "argv", ["tiny", *family, "--out", str(tmp_path / name), "--data", str(data)])
        module.main()

    run("own", tmp_path / "mri")
    folder = tmp_path / "own" / ("base" if host == "llava" else "")
    pieces = transformers.AutoTokenizer.from_pretrained(folder).tokenize("brain MRI glioma")
    assert len(pieces) <= 4, pieces  # of the drawn task's words it would be letter by letter
    with pytest.raises(SystemExit, match=r"^vitask: error: label set '.*nowhere/labels.json' does not exist"):
        run("none", tmp_path / "nowhere")


def test_a_checkpoints_tower_is_expected_and_nothing_else_is(tiny_checkpoint, tmp_path: Path, caplog) -> None:
    from vitask_plugin.llava.loading import load

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "llava-with-tower")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    both = {name: torch.zeros(4), "model.layers.0.surplus": torch.zeros(4)}
    safetensors.torch.save_file(weights | both, folder / "model.safetensors", {"format": "pt"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "model.layers.0.surplus" in caplog.text and "vision_tower" not in caplog.text.replace(str(folder), "")


def test_the_checkpoint_is_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--checkpoint`: weight by weight the LLM and the projector that lie beside it, with the same tokenizer."""
    from vitask_plugin.llava import tiny

    monkeypatch.setattr(sys, "argv", ["tiny", "--out", str(tmp_path), "--checkpoint", "--seed", "5"])
    tiny.main()
    whole = tmp_path / tiny.CHECKPOINT
    parts = safetensors.torch.load_file(tmp_path / "base/model.safetensors")
    parts |= torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    found = safetensors.torch.load_file(whole / "model.safetensors")
    assert found.keys() == parts.keys() and any("mm_projector" in name for name in parts)
    assert all(torch.equal(found[name], parts[name]) for name in parts)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (whole / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert json.loads((whole / "config.json").read_text())["model_type"] == "llava_llama"
