"""`vitask merge`: whole weights that are the adapter's and the base's sum, in the format of the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitask_plugin import cli, model_folder
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.llava import compat, loading
from vitask_plugin.llava.export import export
from vitask_plugin.merge import MARK_FILE, merge
from vitask_plugin.record import checkpoint

compat.prepare()


@pytest.fixture(scope="module")
def merged(tmp_path_factory, lora_checkpoint: Path, tiny_llava) -> Path:
    """The LLaVA checkpoint, through the command. Read only."""
    output = tmp_path_factory.mktemp("merged") / "llava-merged"
    assert cli.main(["merge", str(lora_checkpoint), str(output), "--model-base", str(tiny_llava.base)]) == 0
    return output


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory, tiny_checkpoint: Path) -> Path:
    """A tiny `LlavaForConditionalGeneration`. Read only."""
    return Path(export_to(tmp_path_factory.mktemp("hf-base") / "base", tiny_checkpoint))


def export_to(output: Path, source: Path) -> Path:
    export(source, output)
    return output


def make_adapter(base: Path, directory: Path) -> Path:
    """A PEFT adapter of random weights, with a processor of its own beside it and a record of VITask's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    whole = ["multi_modal_projector"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, modules_to_save=whole)
    adapted = get_peft_model(model, settings)
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(directory)
    AutoProcessor.from_pretrained(base).save_pretrained(directory)
    record = {"format": 1, "tasks": {"drawn": ["a", "b"]}, "run": {"seed": 1}, "files": {"x": 1}}
    (directory / "vitask.json").write_text(json.dumps(record))
    return directory


@torch.no_grad()
def hf_logits(model, base: Path) -> torch.Tensor:
    from transformers import AutoProcessor

    size = AutoProcessor.from_pretrained(base).image_processor.crop_size["height"]
    patches = (size // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, 40, *[model.config.image_token_id] * patches, 50, 60, 70]])
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids, pixel_values=pixels).logits


# LLaVA --------------------------------------------------------------------------------------------------------------


def test_merged_llava_is_what_the_adapter_loads_as(merged: Path, lora_checkpoint: Path, tiny_llava) -> None:
    found, expected = loading.load(merged), loading.load(lora_checkpoint, tiny_llava.base)
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("vitask_connector") for name in ours)
    before = load_file(tiny_llava.base / "model.safetensors")
    moved = [name for name, weight in before.items() if not torch.equal(weight, ours[name])]
    assert len(moved) == 14  # all that LoRA adapts, seven matrices in each of two layers
    assert vars(found.model.config)["mm_vision_tower"] == str(tiny_llava.tower)
    assert found.tokenizer("What is it?").input_ids == expected.tokenizer("What is it?").input_ids


@pytest.mark.compat
def test_stock_llava_loads_it_without_a_base(merged: Path) -> None:
    from llava.model.builder import load_pretrained_model

    tokenizer, stock, processor, _ = load_pretrained_model(
        str(merged), None, merged.name, device_map="cpu", device="cpu"
    )
    expected = {name: weight.half() for name, weight in loading.load(merged).model.state_dict().items()}
    found = stock.state_dict()
    assert found.keys() == {name for name in expected if not name.startswith("vitask_connector")}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert len(tokenizer) == len(found["lm_head.weight"]) and processor is not None
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlavaLlamaForCausalLM"]


def test_connector_and_record_go_with_it(merged: Path, lora_checkpoint: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.model", MARK_FILE}
    assert not model_folder.has_adapter(merged) and "non_lora_trainables.bin" not in names
    assert not any(name.startswith("model.vision_tower") for name in load_file(merged / "model.safetensors"))
    assert sha256_file(merged / model_folder.CONNECTOR_FILE) == sha256_file(
        lora_checkpoint / model_folder.CONNECTOR_FILE
    )
    before, after = checkpoint.read_record(lora_checkpoint), checkpoint.read_record(merged)
    assert checkpoint.RUN in before and checkpoint.BASE in before
    of_the_folder = (checkpoint.RUN, checkpoint.FILES, checkpoint.BASE)
    assert after == {key: value for key, value in before.items() if key not in of_the_folder}


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base(tmp_path: Path, lora_checkpoint: Path, tiny_llava) -> None:
    base = shutil.copytree(tiny_llava.base, tmp_path / "base")
    weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    merge(lora_checkpoint, tmp_path / "llava-merged", base)
    found = load_file(tmp_path / "llava-merged" / "model.safetensors")
    exact = loading.load(lora_checkpoint, base).model.state_dict()
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in found.items())


# HF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_merged_adapter_gives_the_adapters_logits(tmp_path: Path, hf_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    adapter = make_adapter(hf_base, tmp_path / "adapter")
    done = merge(adapter, tmp_path / "merged")
    assert done["model_base"] == str(hf_base)  # as the adapter's configuration says
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(hf_base, dtype=torch.float32)
    plain, projector = hf_logits(base, hf_base), base.model.multi_modal_projector.linear_1.weight.clone()
    adapted = hf_logits(PeftModel.from_pretrained(base, adapter), hf_base)
    assert (hf_logits(model, hf_base) - adapted).abs().max() <= 1e-5
    assert (adapted - plain).abs().max() > 1e-2
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, projector)  # which was trained as well
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.chat_template == AutoProcessor.from_pretrained(hf_base).chat_template
    record = json.loads((tmp_path / "merged" / "vitask.json").read_text())
    assert record == {"format": 1, "tasks": {"drawn": ["a", "b"]}}
    merge(adapter, tmp_path / "merged", hf_base)  # over its own earlier output


def test_adapter_without_a_processor_takes_the_bases(tmp_path: Path, hf_base: Path) -> None:
    adapter = make_adapter(hf_base, tmp_path / "adapter")
    kept = ("adapter_config.json", "adapter_model.safetensors")
    for path in adapter.iterdir():
        if path.name not in kept:
            path.unlink()
    merge(adapter, tmp_path / "merged")
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        assert sha256_file(tmp_path / "merged" / name) == sha256_file(hf_base / name)
    assert not (tmp_path / "merged" / "vitask.json").exists()


# Refused ------------------------------------------------------------------------------------------------------------


def test_wrong_folders_are_refused(
    tmp_path: Path, merged: Path, lora_checkpoint: Path, hf_base: Path, tiny_llava, tiny_checkpoint: Path
) -> None:
    for source, base in ((tiny_checkpoint, None), (hf_base, None), (tiny_checkpoint, tiny_llava.base)):
        with pytest.raises(VITaskError, match=r"holds no adapter .*nothing to merge"):
            merge(source, tmp_path / "out", base)
    with pytest.raises(VITaskError, match=r"is a LoRA checkpoint.*--model-base"):
        merge(lora_checkpoint, tmp_path / "out")
    with pytest.raises(VITaskError, match="does not exist"):
        merge(tmp_path / "none", tmp_path / "out")
    mine = shutil.copytree(merged, tmp_path / "mine")
    (mine / MARK_FILE).unlink()
    with pytest.raises(VITaskError, match="not an earlier output"):
        merge(lora_checkpoint, mine, tiny_llava.base)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_another_base_is_refused(tmp_path: Path, hf_base: Path, tiny_checkpoint: Path) -> None:
    adapter = make_adapter(hf_base, tmp_path / "adapter")

    def changed(name: str, **settings: object) -> Path:
        """The base with other entries for its LLM; weights that are missing are drawn."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(hf_base)
        config.text_config.update(settings)
        AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    others = {
        changed("deep", num_hidden_layers=3): "is in one of them alone",
        changed("wide", intermediate_size=96): "size mismatch for ",
    }
    for other, why in others.items():
        with pytest.raises(VITaskError, match=rf"does not fit the model .*{why}.*--model-base"):
            merge(adapter, tmp_path / "out", other)
    with pytest.raises(VITaskError, match=r"cannot be loaded .*--model-base"):
        merge(adapter, tmp_path / "out", tmp_path / "gone")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(VITaskError, match=r"does not say which model.*--model-base"):
        merge(adapter, tmp_path / "out")
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(VITaskError, match="does not fit the model"):
        merge(adapter, tmp_path / "out", hf_base)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
