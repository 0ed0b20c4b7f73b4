"""What a rank did, seen from inside its process: calls of DeepSpeed's engine, samples of each batch, weights."""

import functools
import hashlib
import importlib
import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn


def watch(path: Path, kill_at_step: int | None = None, host: str = "llava") -> None:
    """Writes `path` when training has ended.

    `engine`: calls of DeepSpeedEngine by name. `batches`: [rows without an image, rows] of each micro-batch.
    `weights`: {name: [before, after]}, a hash of each parameter. Beside it, `.pt`: {name: after - before}, float32, of
    what is trained.

    Args:
        kill_at_step: SIGKILL to this process in the backward pass of that optimizer step, counted from 1.
        host: whose trainer it is.
    """
    calls, batches = Counter(), []
    _count(calls)
    trainer = importlib.import_module(f"vitask_plugin.{host}.trainer").VITaskTrainer
    step, train = trainer.training_step, trainer.train

    @functools.wraps(step)
    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        batches.append([int((~(ids == _image_token(self)).any(1)).sum()), len(ids)])
        if kill_at_step == self.state.global_step + 1:
            self.accelerator.backward = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        return step(self, model, inputs, *args, **kwargs)

    @functools.wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _values(self)
        result = train(self, *args, **kwargs)
        after = _values(self)
        weights = {name: [_hash(before[name]), _hash(after[name])] for name in before}
        # DeepSpeed starts from rounded weights, LoRA's float32 ones too.
        dtype = torch.bfloat16 if self.is_deepspeed_enabled and self.args.bf16 else torch.float32
        moves = {name: end - before[name].to(dtype).float() for name, end in _trained(self).items()}
        torch.save(moves, path.with_suffix(".pt"))
        path.write_text(json.dumps({"engine": calls, "batches": batches, "weights": weights}))
        return result

    trainer.training_step, trainer.train = training_step, watched


def _image_token(trainer: Any) -> int:
    """Id of what stands for an image in a batch's ids."""
    if hasattr(trainer.train_dataset, "template"):
        return trainer.train_dataset.template.image_id
    from llava.constants import IMAGE_TOKEN_INDEX

    return IMAGE_TOKEN_INDEX


def _count(calls: Counter) -> None:
    from deepspeed import DeepSpeedEngine

    def counting(name: str) -> Any:
        call = getattr(DeepSpeedEngine, name)

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return counted

    for name in ("forward", "backward", "step"):
        setattr(DeepSpeedEngine, name, counting(name))


def _values(trainer: Any) -> dict[str, torch.Tensor]:
    """A float32 copy of each parameter, gathered where ZeRO-3 holds parts; the dtype does not matter.

    Of LLaVA, the vision tower's have names of their own: ZeRO-3 is not shown it as a part of the model.
    """
    import deepspeed

    found, own = {}, dict(trainer.model.named_parameters())
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "get_vision_tower"):
        own = {name: weight for name, weight in own.items() if "vision_tower" not in name}
        own |= {f"vision_tower.{name}": weight for name, weight in model.get_vision_tower().named_parameters()}
    else:
        own = {_hf_name(name): weight for name, weight in own.items()}
    for name, parameter in own.items():
        parts = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):
            found[name] = parameter.detach().to(torch.float32, copy=True).contiguous()
    return found


def _hf_name(name: str) -> str:
    """A tower's weights begin with `vision_tower`; what maps its features to the decoder is no part of it."""
    tower = re.search(r"\b(vision_tower|visual)\.(?!merger|deepstack_merger)", name)
    return f"vision_tower.{name[tower.end() :]}" if tower else name


def _trained(trainer: Any) -> dict[str, torch.Tensor]:
    """What the optimizer steps: trained weights in float32, under ZeRO those that lie beside the rounded ones."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    stage = trainer.args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if trainer.args.deepspeed else 0
    if stage:
        found = {name: safe_get_full_fp32_param(weight) for name, weight in found.items()}
    return {name: weight.detach().to(torch.float32, copy=True) for name, weight in found.items()}


def _hash(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
