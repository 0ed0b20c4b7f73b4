"""What a step's activations take, by formula."""

from typing import Any

import torch

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
