"""What one rank sends in one optimizer step, by formula: DDP, ZeRO-2, ZeRO-3, one forward or several.

Every collective is counted as a ring does it, which is what each rank sends at least: an all-reduce of M bytes sends
2 (N-1)/N M, an all-gather to M bytes or a reduce-scatter of M bytes (N-1)/N M.

N ranks, T trained elements, G elements that ZeRO-3 gathers, L of them in the decoder's layers, A micro-batches in a
step (gradient accumulation), F forwards of those layers in a micro-batch (1 packed, 3 branch by branch in stage 2; the
embeddings before and the logits behind them are computed once), b bytes of an element (2 in bfloat16).

    DDP     2 (N-1)/N b T
    ZeRO-2  A 2 (N-1)/N b T + (N-1)/N b T          gradients of each micro-batch, weights of each step
    ZeRO-3  A (N-1)/N b (g (G + (F-1) L) + T)      g gathers of a weight for each forward and its backward

DeepSpeed's ZeRO-2 all-reduces its gradients and keeps a part (`use_multi_rank_bucket_allreduce`, its default), hence
the 2. A weight is used by all forwards of a step, but autograd adds its gradients up before DeepSpeed reduces them: F
multiplies the gathers alone. Offloading changes nothing here; it moves bytes between host and device.
"""


def all_reduce(size: float, ranks: int) -> float:
    """Bytes sent by each of `ranks` for a result of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def all_gather(size: float, ranks: int) -> float:
    """Bytes sent by each of `ranks`, which together hold `size` bytes."""
    return (ranks - 1) / ranks * size


def reduce_scatter(size: float, ranks: int) -> float:
    """Bytes sent by each of `ranks`, each of which holds `size` bytes."""
    return (ranks - 1) / ranks * size


def gathers(*, lora: bool, gradient_checkpointing: bool) -> int:
    """g: how often ZeRO-3 gathers a weight for one forward and its backward, at most.

    Counted in DeepSpeed 0.19.8 (`benchmarks/scaling.py`): once forward and once backward, where the weights that a
    recomputed layer gathered serve its backward too. LoRA's frozen weights are released between the two. What DeepSpeed
    keeps from the forward (`stage3_max_live_parameters`) makes it less.
    """
    return 3 if lora and gradient_checkpointing else 2


def ddp(trained: int, ranks: int, *, element: int = 2) -> float:
    """Bytes that a rank sends in one step; DDP waits with its all-reduce for the last micro-batch."""
    return all_reduce(element * trained, ranks)


def zero2(trained: int, ranks: int, *, accumulation: int = 1, element: int = 2) -> float:
    """Bytes that a rank sends in one step."""
    return accumulation * all_reduce(element * trained, ranks) + all_gather(element * trained, ranks)


def zero3(
    gathered: int,
    layers: int,
    trained: int,
    ranks: int,
    *,
    times: int,
    forwards: int = 1,
    accumulation: int = 1,
    element: int = 2,
) -> float:
    """Bytes that a rank sends in one step, at most.

    Args:
        gathered: G. layers: L. times: g, from `gathers`. forwards: F.
    """
    weights = times * (gathered + (forwards - 1) * layers)
    return accumulation * (all_gather(element * weights, ranks) + reduce_scatter(element * trained, ranks))
