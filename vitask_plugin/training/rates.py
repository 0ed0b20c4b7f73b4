"""How fast each part learns, and for how many steps: the connector's own rate, and what is said before the first step.

The connector is new and small beside an LLM that was trained for months: at the LLM's rate it hardly moves. The default
rate and `ENOUGH_STEPS` come from `benchmarks/connector_rate.py`, chosen on validation data.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

# Fewer optimizer steps than this have not taught a connector at the default rate.
ENOUGH_STEPS = 120


def give_own_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], rate: float) -> None:
    """Moves `parameters` into groups of their own, which keep all other settings of the groups they were in.

    Weight decay stays what it was for each of them. A group that holds nothing else vanishes.

    Args:
        optimizer: not stepped yet, and without a schedule: a schedule scales the rate each group has when it is made.
    """
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if not moved:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        settings = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        if not group["params"]:
            optimizer.param_groups[:] = [other for other in optimizer.param_groups if other is not group]
        optimizer.add_param_group({**settings, "params": moved, "lr": rate})


class BeforeFirstStep(TrainerCallback):
    """Says how many samples, steps and warm-up steps a run has, and at which rates; and that there are too few.

    Args:
        samples: of the data set. rates: `{part: learning rate}`.
        teaches: whether a connector is taught, which takes `ENOUGH_STEPS`.
        say: takes a line. warn: takes a sentence.
    """

    def __init__(
        self,
        samples: int,
        rates: dict[str, float],
        *,
        teaches: bool,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.samples, self.rates, self.teaches = samples, rates, teaches
        self._say, self._warn = say, warn

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        in_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        steps, warm_up = state.max_steps, args.get_warmup_steps(state.max_steps)
        rates = ", ".join(f"{part} {rate:g}" for part, rate in self.rates.items())
        epochs = f"{args.num_train_epochs:g} epoch{'s'[: args.num_train_epochs != 1]}"
        length = f"--max_steps {args.max_steps}" if args.max_steps > 0 else epochs
        self._say(
            f"{self.samples} samples, {in_a_step} per step, {length}: {steps} steps, {warm_up} of them warm-up; "
            f"learning rates: {rates}"
        )
        if self.teaches and steps < ENOUGH_STEPS:
            self._warn(
                f"{steps} steps are too few to teach a connector, which takes about {ENOUGH_STEPS}: with "
                f"{self.samples} samples give --num_train_epochs {epochs_for(self.samples, in_a_step)}, or fewer "
                f"samples per step than {in_a_step} (batch per device x processes x accumulation)"
            )


def epochs_for(samples: int, in_a_step: int) -> int:
    """The fewest epochs that make `ENOUGH_STEPS`."""
    steps_per_epoch = -(-samples // in_a_step)
    return -(-ENOUGH_STEPS // steps_per_epoch)
