"""Dtypes of a model that is trained or asked, one rule for every way in.

- A cast changes weights. Buffers stay as they were computed: a rotary table rounded to bfloat16 turns positions by
  other angles than those the model was trained with.
- What is trained is float32, and autocast computes in 16 bits: most updates are smaller than the distance between two
  16-bit numbers and would be lost. DeepSpeed keeps float32 copies of its own, so there weights stay as they are.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FULL = 32  # bits


# Buffers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """What the block does to all tensors of `model`, such as a cast, rounds no buffer of it; devices do change."""
    before = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    yield
    for module, name, buffer in before:
        now = module._buffers.get(name)
        if now is not None and buffer is not None and _bits(now) < _bits(buffer):
            module._buffers[name] = buffer.to(now.device)


def keep_buffers(module: nn.Module) -> None:
    """From now on no cast of `module` (`.to(dtype)`, `.half()`, ...) rounds its buffers."""
    if "_apply" not in vars(module):
        module._apply = functools.partial(_apply_keeping, module)


def _apply_keeping(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    with buffers_kept(module):
        return type(module)._apply(module, fn, recurse)


def _bits(tensor: Tensor) -> int:
    return torch.finfo(tensor.dtype).bits if tensor.is_floating_point() else 0


# Weights -----------------------------------------------------------------------------------------------------------


def train_in_float32(model: nn.Module) -> None:
    """Trained weights of fewer bits become float32; frozen and quantized ones stay as they are."""
    for weight in model.parameters():
        if weight.requires_grad and 0 < _bits(weight) < FULL:
            weight.written_as = weight.dtype
            weight.data = weight.data.float()


def written_dtype(weight: nn.Parameter) -> torch.dtype:
    """What a weight is written in after the last step: its dtype before `train_in_float32`."""
    return getattr(weight, "written_as", weight.dtype)


def as_written(model: nn.Module) -> None:
    """Undoes `train_in_float32`: a finished run leaves files of the size and dtype that it started from."""
    for weight in model.parameters():
        if hasattr(weight, "written_as"):
            weight.data = weight.data.to(weight.written_as)


# Computing -----------------------------------------------------------------------------------------------------------


def computed(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that autocast computes in, as it is where autocast is off.

    Float32 embeddings would make every activation between two layers float32, and give attention two dtypes.
    """
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def compute_dtype(args: Any, weights: torch.dtype) -> torch.dtype:
    """What a step computes in. `args`: transformers' training arguments. `weights`: dtype of the model's."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weights


def enable_half_on_cpu(accelerator: Any) -> None:
    """float16 on a CPU as on a GPU: autocast and a scaled loss. accelerate leaves both out there, without a word."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
