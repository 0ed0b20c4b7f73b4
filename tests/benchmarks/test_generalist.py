"""The small real model of the study, of tiny parts: aligned, taken up where it was stopped, loaded by stock classes."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pictures import COLOURS, save

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.tiny import _tokenizer
from vitask_plugin.hf.tiny_templates import CHATS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models/` with a tiny decoder of three layers and a tiny tower, and an archive of pictures in four colours."""
    root = tmp_path_factory.mktemp("generalist")
    torch.manual_seed(0)
    captions = [f"A picture that is {colour}." for colour in COLOURS]
    tokenizer = _tokenizer(CHATS["llava_onevision"], [*captions, "Describe the image."], transformers.LlavaProcessor)
    tokenizer.save_pretrained(root / "models/smollm2-135m")
    own = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True, **own, **ids)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "models/smollm2-135m")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**tower)).save_pretrained(root / "models/dinov2-small")
    lines = ["image,caption"]
    with zipfile.ZipFile(root / "captions.zip", "w") as archive:
        for number in range(48):
            colour = list(COLOURS)[number % 4]
            save(root / "picture.png", colour, number)
            archive.write(root / "picture.png", f"images/{number:02d}.png")
            lines += [f"images/{number:02d}.png,A picture that is {colour}."] * 2
        archive.writestr("captions.csv", "\n".join(lines))
    return root


def made(root: Path, out: Path, *more: str) -> dict[str, Any]:
    import generalist

    words = [out, "--models", root / "models", "--captions", root / "captions.zip", "--cache", root / "cache"]
    words += ["--side", "28", "--batch", "8", *more]
    generalist.make(generalist.parse([str(word) for word in words]))
    return json.loads((out / "generalist.json").read_text())


def test_both_stages_teach_it_to_look(parts: Path, tmp_path: Path) -> None:
    found = made(parts, tmp_path / "whole", "--epochs", "12", "4", "--learning-rate", "5e-3")
    first, second = found["stages"]
    assert (found["layers"], found["image_tokens"], found["pictures"], found["held_out"]) == (3, 4, 36, 12)
    assert (first["name"], first["steps"], second["steps"]) == ("projector", 48, 16)
    assert second["caption_loss"] < first["caption_loss"]
    assert second["caption_loss"] < second["with_another_picture"]
    assert second["right_picture_likelier"] >= 0.75  # of twelve; a model that does not look is right by halves
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and len(found["written"]) == 8
    assert not any("lora" in name for name in model.state_dict())
    tower = transformers.AutoModel.from_pretrained(parts / "models/dinov2-small").state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value.float(), tower[name].bfloat16().float())  # frozen throughout


def test_a_stopped_alignment_ends_where_another_does(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aligning

    monkeypatch.setattr(aligning, "SAVE_EVERY", 2)
    how = ("--layers", "2", "--epochs", "0", "2")
    whole = made(parts, tmp_path / "one", *how)
    assert whole["layers"] == 2 and [one["steps"] for one in whole["stages"]] == [8]
    loss, calls = aligning.Aligner._loss, []

    def stops(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, *given, **more)

    monkeypatch.setattr(aligning.Aligner, "_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        made(parts, tmp_path / "two", *how)
    monkeypatch.setattr(aligning.Aligner, "_loss", loss)
    again = made(parts, tmp_path / "two", *how)
    drop = "seconds"
    assert [{k: v for k, v in one.items() if k != drop} for one in again["stages"]] == [
        {k: v for k, v in one.items() if k != drop} for one in whole["stages"]
    ]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_it_is_tuned_by_the_host(parts: Path, tmp_path: Path) -> None:
    """The template's turns, the image tokens and the weights are what `vitask_plugin.hf` takes."""
    from vitask_plugin.hf import loading

    made(parts, tmp_path / "cut", "--layers", "1", "--epochs", "0", "1")
    loaded = loading.load(tmp_path / "cut")
    from PIL import Image

    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A word."}]
    encoded = loaded.template.encode(turns, [Image.new("RGB", (50, 40))])
    assert int((encoded.ids == loaded.template.image_id).sum()) == 4
    learnt = encoded.ids[encoded.labels != -100]
    assert loaded.template.tokenizer.decode(learnt) == "A word.<|im_end|>"


def test_what_is_missing_is_named(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(VITaskError, match="no HF folder 'smollm2-135m'"):
        made(parts, tmp_path / "out", "--models", str(tmp_path))
    with pytest.raises(VITaskError, match="--layers is 9"):
        made(parts, tmp_path / "out", "--layers", "9")
