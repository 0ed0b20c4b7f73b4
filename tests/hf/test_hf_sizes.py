"""The counts of `vitask estimate-memory` for each HF family, against models that were really built."""

import re
from pathlib import Path

import pytest
import torch

from vitask_plugin.cli import main
from vitask_plugin.deepspeed.configs import read_zero
from vitask_plugin.deepspeed.memory import Step, memory_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.sizes import sizes_of
from vitask_plugin.hf.tiny import FAMILIES, make_tiny

PROJECTORS = re.compile(r"model\.(multi_modal_projector\.|image_newline$|visual\.(merger|deepstack_merger_list)\.)")
TOWERS = re.compile(r"model\.(vision_tower|visual)\.")
RANK = 4


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory, drawn_texts):
    """(family, folder, weights by name) of a model in memory."""
    from transformers import AutoModelForImageTextToText

    directory = make_tiny(
        tmp_path_factory.mktemp("sizes") / request.param, family=request.param, texts=drawn_texts, seed=0
    )
    model = AutoModelForImageTextToText.from_pretrained(directory)
    return request.param, directory, model


def test_counts_are_those_of_a_built_model(tiny, tmp_path: Path) -> None:
    family, directory, model = tiny
    only = tmp_path / "config-alone"
    only.mkdir()
    (only / "config.json").write_bytes((directory / "config.json").read_bytes())  # weights are not read
    sizes = sizes_of(str(only))
    own = dict(model.named_parameters())  # a tied one is in it once
    projector = sum(weight.numel() for name, weight in own.items() if PROJECTORS.match(name))
    tower = sum(weight.numel() for name, weight in own.items() if TOWERS.match(name) and not PROJECTORS.match(name))
    assert projector and tower and (sizes.projector, sizes.tower) == (projector, tower), family
    total = sum(weight.numel() for weight in own.values())
    hidden = model.config.get_text_config().hidden_size
    assert (sizes.llm, sizes.trained) == (total - projector - tower, total - tower)
    assert sizes.connector == 768 * hidden + hidden + hidden * hidden + hidden
    assert sizes.total == sizes.divided == sum(sizes.numels) == total + sizes.connector
    assert sum(sizes.layer_numels) == sum(
        weight.numel() for name, weight in own.items() if name.startswith("model.language_model.layers.")
    )


def test_lora_is_counted_as_the_host_adds_it(tiny) -> None:
    from types import SimpleNamespace

    from vitask_plugin.hf import loading

    family, directory, model = tiny
    sizes = sizes_of(str(directory), RANK)
    # Changes the model; it is the last test of it.
    model.requires_grad_(False)
    wrapped = loading.add_lora(model, SimpleNamespace(lora_r=RANK, lora_alpha=1, lora_dropout=0.0), projector=True)
    trained = {name: weight.numel() for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert sizes.adapters == sum(number for name, number in trained.items() if "lora_" in name) > 0, family
    assert sizes.trained == sum(trained.values())


def test_the_tower_is_divided_too(tiny) -> None:
    _, directory, _ = tiny
    sizes = sizes_of(str(directory))
    memory = memory_of(sizes, read_zero("zero3"), Step(), ranks=8, lora=False)
    assert memory.weights == 2 * sizes.total / 8


@pytest.mark.parametrize(("hidden", "heads", "keys", "head", "mlp"), [(128, 4, 2, 32, 344), (128, 4, 1, 64, 256)])
def test_activations_of_grouped_keys_and_wide_heads(hidden, heads, keys, head, mlp) -> None:
    """Against what autograd keeps: Qwen2 as it is, and a Llama whose heads together are wider than the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vitask_plugin.deepspeed.activations import activation_bytes

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeds = torch.randn(2, 256, hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert hidden_states.requires_grad
    estimate = activation_bytes(config, 512, 0, dtype=torch.float32, gradient_checkpointing=False, lora=False)
    assert estimate == pytest.approx(sum(kept.values()), rel=0.1)


def test_the_command_takes_an_hf_folder_and_refuses_what_is_none(tmp_path: Path, drawn_texts, capsys) -> None:
    directory = make_tiny(tmp_path / "vlm", family="gemma3", texts=drawn_texts, seed=0)
    words = ["estimate-memory", "--model", str(directory), "--config", "zero2", "--tokens", "900", "60", "5"]
    assert main(words) == 0
    assert f"{4 * (960 + 1 + 60 + 5)} positions" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": {}, "vision_config": {}}')
    with pytest.raises(VITaskError, match="'clip', which cannot be built here"):
        sizes_of(str(tmp_path))
