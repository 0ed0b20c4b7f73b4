"""What a step's activations take, and the sentence for a step that does not fit."""

from typing import Any

import torch

from vitask_plugin.method.layout import Branches

FLOAT32 = 4  # bytes


def activation_bytes(
    config: Any, positions: int, predicted: int, *, dtype: torch.dtype, gradient_checkpointing: bool, lora: bool
) -> int:
    """An estimate of what the decoder keeps for the backward pass, in bytes.

    A layer of a Llama or of its kind (grouped keys, gated MLP) keeps, per position: three vectors of the hidden width D
    around each of its two norms, queries, and attention's result before and after its heads are joined (all heads
    wide, mostly D), keys and values (all key heads wide), and four of the MLP's width I; further norms, such as Qwen3's
    and Gemma3's, are left out. Below float32 the norms keep two float32 vectors of D each instead of two of their
    three. Every predicted token keeps about three float32 rows of the vocabulary. With gradient checkpointing each
    layer keeps its input alone, and one layer at a time is whole. LoRA keeps what its dropout made of each linear
    layer's input, in float32, and a byte per element that says which were dropped. Weights, autocast's 16-bit copies of
    them, gradients, optimizer and vision tower are not in it.

    Args:
        config: of the language model. positions: that the decoder computes, pads included. predicted: labelled tokens.
    """
    size = torch.finfo(dtype).bits // 8
    hidden, mlp = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    norms = 2 * 3 * hidden * size if size == FLOAT32 else 2 * (2 * FLOAT32 + size) * hidden
    layer = norms + (3 * queries + 2 * keys + 4 * mlp) * size
    if lora:
        layer += (5 * hidden + queries + mlp) * (FLOAT32 + 1)  # into q, k, v, gate and up; into o; into down
    layers = config.num_hidden_layers
    per_position = layers * hidden * size + layer if gradient_checkpointing else layers * layer
    return positions * per_position + predicted * config.vocab_size * 3 * FLOAT32


def sentence(config: Any, branches: Branches, embeds_dtype: torch.dtype, args: Any) -> str:
    """Which knob to turn, and what it would save.

    Args:
        branches: of the batch that did not fit. args: upstream's training arguments.
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
