"""A model in training, asked for a moment as it would be afterwards: later steps are the same bit for bit."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def out_of_training(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """While the block runs, no dropout, no gradients, and the precision of a step.

    Afterwards each module is in the mode it was in, and random numbers go on where they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # On a CPU bitsandbytes packs 4-bit weights anew when asked out of training; no gradient passes then.
        module.training = type(module).__module__.startswith("bitsandbytes")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        # A step goes through the model's forward, which accelerate puts under autocast.
        with torch.random.fork_rng(devices=devices), torch.no_grad(), accelerator.autocast():
            yield
    finally:
        for module, training in modes:
            module.training = training
