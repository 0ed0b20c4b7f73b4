"""The connector's own learning rate: its parameter groups, what is said before the first step, DeepSpeed, resuming."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from saved import SAVING, finish, sentences
from torch import nn

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json
from vitask_plugin.training import own_optimizer, rates, resuming

RATE, OWN = 1e-3, 1e-2


def groups_of(optimizer: torch.optim.Optimizer) -> dict[tuple[float, float], list[nn.Parameter]]:
    return {(group["lr"], group["weight_decay"]): group["params"] for group in optimizer.param_groups}


def test_the_connector_gets_groups_of_its_own() -> None:
    llm, connector = nn.Linear(3, 3), nn.Linear(3, 3)
    decaying = {"params": [llm.weight, connector.weight], "weight_decay": 0.1, "betas": (0.8, 0.9)}
    optimizer = torch.optim.AdamW(
        [decaying, {"params": [connector.bias], "weight_decay": 0.0}, {"params": [llm.bias], "weight_decay": 0.0}],
        lr=RATE,
    )
    rates.give_own_rate(optimizer, connector.parameters(), OWN)
    found = groups_of(optimizer)
    assert {key: list(map(id, params)) for key, params in found.items()} == {
        (RATE, 0.1): [id(llm.weight)],
        (RATE, 0.0): [id(llm.bias)],
        (OWN, 0.1): [id(connector.weight)],
        (OWN, 0.0): [id(connector.bias)],
    }
    assert optimizer.param_groups[-2]["betas"] == (0.8, 0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert sorted(schedule.get_last_lr()) == [RATE / 2, RATE / 2, OWN / 2, OWN / 2]


def before_first_step(samples: int, batch: int, processes: int, epochs: float) -> tuple[list[str], list[str]]:
    said, warned = [], []
    args = SimpleNamespace(
        train_batch_size=batch,
        world_size=processes,
        gradient_accumulation_steps=1,
        num_train_epochs=epochs,
        max_steps=-1,
        get_warmup_steps=lambda steps: -(-3 * steps // 100),
    )
    callback = rates.BeforeFirstStep(
        samples, {"run": 2e-5, "connector": 1e-3}, teaches=True, say=said.append, warn=warned.append
    )
    steps = int(epochs * -(-samples // (batch * processes)))
    callback.on_train_begin(args, SimpleNamespace(max_steps=steps), None)
    return said, warned


def test_samples_steps_and_rates_are_said_and_too_few_steps_warned_about() -> None:
    said, warned = before_first_step(546, 16, 8, 1)  # BreastMNIST on 8 GPUs
    assert said == [
        "546 samples, 128 per step, 1 epoch: 5 steps, 1 of them warm-up; learning rates: run 2e-05, connector 0.001"
    ]
    (sentence,) = warned
    assert sentence.startswith("5 steps are too few to teach a connector")
    epochs = int(sentence.partition("--num_train_epochs ")[2].partition(",")[0])
    assert before_first_step(546, 16, 8, epochs)[1] == [] != before_first_step(546, 16, 8, epochs - 1)[1]


def moved(output: Path, first: int, last: int) -> dict[str, float]:
    """The largest change of connector and projector between two checkpoints."""
    found = {}
    for part, name, file in (
        ("connector", "layers.", "vitask_connector.safetensors"),
        ("projector", "model.mm_projector.", "model.safetensors"),
    ):
        before, after = (load_file(output / f"checkpoint-{step}" / file) for step in (first, last))
        found[part] = max((after[key] - before[key]).abs().max().item() for key in after if key.startswith(name))
    return found


@pytest.mark.parametrize("own", [OWN, 0.0])
def test_a_run_moves_the_connector_at_its_own_rate(own, command, tmp_path) -> None:
    output = tmp_path / "llava"
    more = ("--vitask_connector_lr", str(own), "--lr_scheduler_type", "constant", "--learning_rate", str(RATE))
    printed = finish(1, command(output, "ddp", 1, "full", *more))
    rate = own or RATE
    assert f"32 samples, 8 per step, 1 epoch: 4 steps, 0 of them warm-up; learning rates: run {RATE:g}, " in printed
    assert f"connector {rate:g}\n" in printed and "4 steps are too few to teach a connector" in printed
    # Two steps of Adam move a weight by twice the rate at most, and some weight by nearly as much.
    found = moved(output, 2, 4)
    assert rate < found["connector"] <= 2.2 * rate and RATE < found["projector"] <= 2.2 * RATE


UPSTREAMS = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": "auto",
        "gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_a_configuration_like_upstreams_keeps_the_rates(command, tmp_path) -> None:
    """With DeepSpeed's own optimizer and schedule, and the gather key without its prefix."""
    output, config = tmp_path / "llava", tmp_path / "config.json"
    write_json(config, UPSTREAMS)
    more = ("--vitask_connector_lr", str(OWN), "--warmup_steps", "1", "--per_device_train_batch_size", "4", *SAVING)
    printed = finish(2, command.make(output, "--deepspeed", str(config), *more))
    assert "the run's own is used" in printed and "follow WarmupLR of the DeepSpeed configuration" in printed
    found = moved(output, 2, 4)
    assert OWN < found["connector"] <= 2.2 * OWN and RATE < found["projector"] <= 2.2 * RATE


def test_a_configuration_that_would_lose_the_rates_is_refused() -> None:
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (RATE, OWN)])
    for section, match in (
        ({"type": "Lamb", "params": {"lr": RATE}}, "Lamb"),
        ({"type": "AdamW", "params": {"lr": RATE, "torch_adam": True}}, "torch_adam"),
    ):
        with pytest.raises(VITaskError, match=match):
            own_optimizer.take_over({"optimizer": section})
    with pytest.raises(VITaskError, match="OneCycle"):
        own_optimizer.keep_rates({"scheduler": {"type": "OneCycle"}}, optimizer)
    assert own_optimizer.take_over({}) is own_optimizer.keep_rates({}, optimizer) is None


def test_flags_and_configuration_that_differ_end_with_one_sentence(command, tmp_path) -> None:
    config = tmp_path / "config.json"
    write_json(config, {**UPSTREAMS, "bf16": {"enabled": True}})
    more = ("--deepspeed", str(config), "--per_device_train_batch_size", "8")
    ended = launch(1, command.make(tmp_path / "llava", *more), tmp_path / "logs")
    (sentence,) = sentences(ended)
    assert "bf16.enabled=True" in sentence and '"auto"' in sentence


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_checkpoint_without_the_connectors_groups_is_refused_with_what_resumes_it(tuning, whole, tmp_path) -> None:
    """As the released version wrote it, which knew no --vitask_connector_lr."""
    directory = whole("ddp", 1, tuning) / "checkpoint-2"
    record = json.loads((directory / "vitask.json").read_text())
    del record["arguments"]["vitask_connector_lr"]
    write_json(tmp_path / "vitask.json", record)
    run = record["run"]
    flags = {"vitask": True, "vitask_features": "features"}
    with pytest.raises(VITaskError, match="give --vitask_connector_lr 0 to resume it"):
        resuming.check(tmp_path, VITaskArguments(**flags), run)
    assert not resuming.check(tmp_path, VITaskArguments(**flags, vitask_connector_lr=0.0), run)
    with pytest.raises(VITaskError, match=r"give --vitask_connector_lr 0\.00"):
        resuming.check(directory, VITaskArguments(**flags, vitask_connector_lr=0.0), run)
