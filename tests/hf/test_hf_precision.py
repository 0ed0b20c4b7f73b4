"""Without VITask in bfloat16: what is trained is float32 under autocast, and otherwise the run is stock Trainer's."""

import functools
import json

import pytest
import torch
import transformers
from hf_runs import LORA, history, plain, vitask
from safetensors.torch import load_file

from vitask_plugin.data.instructions import read_samples
from vitask_plugin.hf.batch import EncodedSamples, PlainBatches
from vitask_plugin.hf.train import train
from vitask_plugin.hf.trainer import HFTrainer

BF16 = ("--bf16", "True", "--max_steps", "2", "--learning_rate", "2e-5", "--lr_scheduler_type", "constant")


@pytest.fixture
def seen(monkeypatch):
    """What a run in this process computes with: dtypes in its first step, and the trained weights before and after."""
    found, step, fit = {}, HFTrainer.training_step, HFTrainer.train

    @functools.wraps(step)
    def training_step(self, model, *args, **kwargs):
        if "trained" not in found:
            found["trained"] = {weight.dtype for weight in self.model.parameters() if weight.requires_grad}
            found["frozen"] = {weight.dtype for weight in self.model.parameters() if not weight.requires_grad}
            layer = next(part for name, part in self.model.named_modules() if name.endswith("layers.0.mlp.up_proj"))
            hook = layer.register_forward_hook(lambda module, given, output: found.update(computed=output.dtype))
        loss = step(self, model, *args, **kwargs)
        if "hook" not in found and "computed" in found:
            found["hook"] = hook.remove()
        return loss

    @functools.wraps(fit)
    def watched(self, *args, **kwargs):
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        found["before"] = {name: weight.detach().clone() for name, weight in trained.items()}
        result = fit(self, *args, **kwargs)
        found["after"] = {name: weight.detach().clone() for name, weight in trained.items()}
        return result

    monkeypatch.setattr(HFTrainer, "training_step", training_step)
    monkeypatch.setattr(HFTrainer, "train", watched)
    return found


def stock_losses(tiny, data, output) -> list[float]:
    """The run as a plain script has it: stock class, its trained weights in float32, stock Trainer."""
    args = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    transformers.set_seed(args.seed)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny.folder, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.requires_grad_("vision_tower" not in name)
        if weight.requires_grad:
            weight.data = weight.data.float()
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=EncodedSamples(read_samples(str(data / "train.json")), str(data / "images"), tiny.template, 512),
        data_collator=PlainBatches(tiny.template.tokenizer.pad_token_id),
    )
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def test_float32_weights_under_autocast_and_files_of_the_dtype_it_started_from(seen, tiny_hf, sized_mixture, tmp_path):
    tiny, output = tiny_hf("llava"), tmp_path / "ours"
    train(plain(tiny.folder, sized_mixture, output, *BF16))
    assert seen["trained"] == {torch.float32} and seen["frozen"] == {torch.bfloat16}
    assert seen["computed"] == torch.bfloat16
    # Most updates of this size would be lost between two numbers of bfloat16.
    layers = [(weight, seen["after"][name]) for name, weight in seen["before"].items() if ".layers." in name]
    one, other = (torch.cat([pair[place].flatten() for pair in layers]) for place in (0, 1))
    assert (one != other).double().mean() > 0.9
    assert (one.bfloat16() != other.bfloat16()).double().mean() < 0.5
    losses = [(entry["loss"], entry["grad_norm"]) for entry in history(output)]
    assert len(losses) == 2 and losses == stock_losses(tiny, sized_mixture, tmp_path / "stock")
    # As the run with VITask that it is held against.
    saved = load_file(output / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    stock = transformers.AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
    weights = {name: weight for name, weight in stock.named_parameters() if name in seen["after"]}
    assert weights.keys() == seen["after"].keys()
    assert all(torch.equal(weight, seen["after"][name].bfloat16()) for name, weight in weights.items())


@pytest.mark.parametrize("tuning", [(), LORA], ids=["full", "lora"])
def test_files_are_as_those_with_vitask(tuning, seen, tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    tiny = tiny_hf("llava")
    train(plain(tiny.folder, sized_mixture, tmp_path / "plain", *BF16, *tuning))
    train(vitask(tiny.folder, sized_mixture, sized_mixture_features, tmp_path / "vitask", *BF16, *tuning))
    name = "adapter_model.safetensors" if tuning else "model.safetensors"
    kinds = [
        {tensor: weight.dtype for tensor, weight in load_file(tmp_path / run / name).items()}
        for run in ("plain", "vitask")
    ]
    assert kinds[0] == kinds[1]


def test_it_resumes_from_float32_weights(tiny_hf, sized_mixture, tmp_path):
    folder = tiny_hf("llava").folder
    saving = ("--save_strategy", "steps", "--save_steps", "1")
    train(plain(folder, sized_mixture, tmp_path / "whole", *BF16, *saving))
    middle = load_file(tmp_path / "whole" / "checkpoint-1" / "model.safetensors")
    assert {weight.dtype for name, weight in middle.items() if "lm_head" in name} == {torch.float32}
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "again" / "checkpoint-1")
    train(plain(folder, sized_mixture, tmp_path / "again", *BF16, *saving))
    whole, again = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "again"))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    assert len(history(tmp_path / "again")) == 2
