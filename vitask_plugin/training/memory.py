"""The sentence for a step that does not fit."""

from typing import Any

import torch

from vitask_plugin.deepspeed.activations import activation_bytes
from vitask_plugin.method.layout import Branches


def sentence(config: Any, branches: Branches, embeds_dtype: torch.dtype, args: Any) -> str:
    """Which knob to turn, and what it would save.

    Args:
        branches: of the batch that did not fit. args: the training arguments.
    """
    samples, positions = branches.counts["samples"], branches.layout.positions
    predicted = len(branches.plain) + len(branches.prompted) + len(branches.negative)

    def gibibytes(share: float, checkpointing: bool) -> str:
        size = activation_bytes(
            config,
            int(positions * share),
            int(predicted * share),
            dtype=embeds_dtype,
            gradient_checkpointing=checkpointing,
            lora=args.lora_enable,
        )
        return f"{size / 2**30:.2g} GiB"

    now = args.gradient_checkpointing
    ways = []
    half = samples // 2
    # A sample alone has no negative in its batch, and takes a second prefix: no smaller than two that share.
    if half > 1 or (half == 1 and not branches.counts["negatives"]):
        ways.append(
            f"--per_device_train_batch_size {half} with --gradient_accumulation_steps "
            f"{2 * args.gradient_accumulation_steps} (about {gibibytes(half / samples, now)})"
        )
    if not now:
        ways.append(f"--gradient_checkpointing True (about {gibibytes(1.0, True)})")
    if not args.lora_enable:
        ways.append("--lora_enable True (no gradients and optimizer state of the whole model, but more activations)")
    ways.append("--deepspeed with a ZeRO-3 configuration (weights divided among processes)")
    return (
        f"out of memory on {args.device} in a step of {samples} samples, {positions} positions in all branches; the "
        f"decoder's activations alone take about {gibibytes(1.0, now)}. What helps: {'; '.join(ways)}"
    )
