"""Each bad input to the HF host ends with one sentence that says what, where and what to do."""

import json
import os
import shutil

import pytest
import transformers
from hf_runs import LORA, plain, vitask
from ranks import launch

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf import loading
from vitask_plugin.hf.train import train


@pytest.fixture
def refused(tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    """Runs the training command in this process; the sentence it ends with."""

    def run(*flags: str, family: str = "llava", off: bool = False) -> str:
        model, output = tiny_hf(family).folder, tmp_path / "output"
        line = plain(model, sized_mixture, output, *flags)
        if not off:
            line = vitask(model, sized_mixture, sized_mixture_features, output, *flags)
        with pytest.raises(VITaskError) as error:
            train(line)
        assert "\n" not in str(error.value)
        assert not [path for path in output.rglob("*.safetensors")]
        return str(error.value)

    return run


def copied(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("off", [False, True], ids=["vitask", "plain"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model_max_length", "20"), "takes 16 tokens, and --model_max_length 20 would cut it and the answer"),
        (("--model_name_or_path", "nobody/nothing"), "'nobody/nothing' is no folder here, and the Hub gave no model"),
        (("--lora_alfa", "4"), "neither the HF host nor VITask has a flag --lora_alfa; perhaps --lora_alpha was meant"),
        (("--version", "v1"), "--version is a flag of LLaVA's own code, and the model's chat template says it here"),
        (
            ("--vision_tower", "clip"),
            "--vision_tower is a flag of LLaVA's own code, and the model's folder says it here",
        ),
        (("--mm_projector_lr", "1e-3"), "--mm_projector_lr is a flag of LLaVA's own code"),
        (
            ("--lora_enable", "True", "--freeze_vision_tower", "False"),
            "--freeze_vision_tower False would have no effect",
        ),
        (("--lora_enable", "True", "--freeze_language_model", "True"), "--freeze_language_model True forbids"),
        (("--bits", "5"), "--bits 5: weights are quantized to 4 or 8 bits"),
        (("--bits", "4"), "add --lora_enable True"),
        (("--bf16", "True", "--use_cpu", "False"), "give --bf16 False, and --use_cpu True to train on the CPU"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_flags(flags, message, off, refused):
    assert message in refused(*flags, off=off)


def test_answers_that_are_cut_off(refused):
    found = refused("--model_max_length", "30", family="qwen2_5_vl")
    assert "samples have no answer token left to learn: --model_max_length 30 cuts them" in found


def test_models_of_another_kind(refused, tiny_hf, tmp_path):
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(text).save_pretrained(tmp_path / "text")
    found = refused("--model_name_or_path", str(tmp_path / "text"))
    assert "image" in found and str(tmp_path / "text") in found
    (tmp_path / "video").mkdir()
    transformers.VideoLlavaConfig().save_pretrained(tmp_path / "video")
    assert str(tmp_path / "video") in refused("--model_name_or_path", str(tmp_path / "video"))


def test_a_folder_that_is_not_whole(refused, tiny_hf, tmp_path):
    folder = copied(tiny_hf("llava").folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert str(folder) in refused("--model_name_or_path", str(folder))
    (tmp_path / "empty").mkdir()
    assert "has no config.json, so it is no model" in refused("--model_name_or_path", str(tmp_path / "empty"))
    folder = copied(tiny_hf("llava").folder, tmp_path / "no-processor")
    (folder / "processor_config.json").unlink(missing_ok=True)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    assert str(folder) in refused("--model_name_or_path", str(folder))
    folder = copied(tiny_hf("llava").folder, tmp_path / "no-template")
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in refused("--model_name_or_path", str(folder))


def test_an_adapter_of_another_base(tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    first = tmp_path / "first"
    train(vitask(tiny_hf("llava").folder, sized_mixture, sized_mixture_features, first, "--max_steps", "1", *LORA))
    with pytest.raises(VITaskError, match="was trained on other weights than those in"):
        earlier = ("--vitask_stage", "2", "--vitask_connector_path", str(first), *LORA)
        train(vitask(tiny_hf("gemma3").folder, sized_mixture, sized_mixture_features, tmp_path / "second", *earlier))
    with pytest.raises(VITaskError, match="was trained on other weights than those in"):
        loading.load(first, tiny_hf("gemma3").folder)
    with pytest.raises(VITaskError, match="without --lora_enable True its adapter would be lost"):
        earlier = ("--vitask_stage", "2", "--vitask_connector_path", str(first))
        train(vitask(tiny_hf("llava").folder, sized_mixture, sized_mixture_features, tmp_path / "second", *earlier))


def test_weights_that_one_rank_finds_truncated_end_the_other(tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    """Two nodes, each with a copy of the model. Nobody kills the rank whose copy is whole."""
    whole = tiny_hf("llava").folder
    cut = copied(whole, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 1000)
    flags = [vitask(model, sized_mixture, sized_mixture_features, tmp_path / "output") for model in (whole, cut)]
    ended = launch(2, flags, tmp_path / "logs", nodes=2, host="hf", kill_others=False)
    assert ended.statuses == [1, 1], ended.text
    assert all(f"vitask: error: model {str(cut)!r}" in log.read_text() for log in ended.logs), ended.text
