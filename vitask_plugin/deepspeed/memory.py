"""Memory of one rank and of one node, by formula, with what is frozen left out of what only trained weights need.

A weight takes 2 bytes (bfloat16). A trained one has a gradient (2), and in the optimizer a float32 copy of itself and
AdamW's two moments (12); while the optimizer steps, a float32 copy of its gradient too (4). Divided by N where it is
partitioned. With full fine-tuning that is the 18 + 2 of DeepSpeed's own estimators.
"""

from dataclasses import dataclass

import torch

from vitask_plugin.deepspeed.activations import activation_bytes
from vitask_plugin.deepspeed.configs import Zero
from vitask_plugin.deepspeed.sizes import Sizes
from vitask_plugin.errors import VITaskError

WEIGHT, GRADIENT, OPTIMIZER, STEP = 2, 2, 12, 4  # bytes per element
BRANCHES = 3  # of a stage-2 sample: plain, exemplar-prompted, negative
GIB = 2**30
CARDS = (24, 40, 80, 141)  # GiB, as they are sold
USABLE = 0.9  # of a card; the rest is CUDA's context, communication buffers and what fragmentation loses


@dataclass(frozen=True)
class Step:
    """The step that activations are counted for: stage 2, a negative found in the batch.

    Attributes:
        batch: samples per rank. prefix: tokens up to the last image token. continuation: of question and answer.
        answer: of the answer alone. packed: one forward for all branches; else one for each.
    """

    batch: int = 4
    prefix: int = 611
    continuation: int = 80
    answer: int = 6
    packed: bool = True
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        if min(self.batch, self.prefix, self.continuation, self.answer) < 1 or self.answer > self.continuation:
            raise VITaskError(
                f"--batch-size {self.batch} --tokens {self.prefix} {self.continuation} {self.answer}: each must be at "
                "least 1, and the answer is part of the continuation"
            )

    @property
    def positions(self) -> int:
        """That the decoder computes: one exemplar token, and in a packed row one prefix and one question."""
        whole = self.prefix + self.continuation
        sample = whole + 1 + self.continuation + self.answer if self.packed else BRANCHES * whole + 1
        return self.batch * sample

    @property
    def predicted(self) -> int:
        return self.batch * BRANCHES * self.answer


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, and of the host of one node.

    Attributes:
        weights, gradients, optimizer: that lie on the GPU through the whole step. gathered: ZeRO-3's, at most.
        activations: until the backward pass is over. stepping: of the optimizer's step, which comes after it.
        host: of a node, all its ranks together.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    stepping: float
    host: float

    @property
    def peak(self) -> float:
        states = self.weights + self.gradients + self.optimizer
        return states + max(self.gathered + self.activations, self.stepping)

    def fits(self, card: float) -> bool:
        """In `card` GiB, a tenth of which is left for what is not counted."""
        return self.peak <= USABLE * card * GIB


def memory_of(sizes: Sizes, zero: Zero, step: Step, *, ranks: int, nodes: int = 1, lora: bool) -> Memory:
    """The estimate for one configuration.

    Args:
        ranks: N, over all nodes, one GPU each.
    """
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise VITaskError(f"{ranks} ranks on {nodes} nodes: give at least one of each, as many on every node")
    optimizer_share = ranks if zero.stage >= 1 else 1
    gradient_share = ranks if zero.stage >= 2 else 1
    weight_share = ranks if zero.stage == 3 else 1
    divided = WEIGHT * sizes.divided / weight_share
    gradients = GRADIENT * sizes.trained / gradient_share
    optimizer, stepping = (bytes_ * sizes.trained / optimizer_share for bytes_ in (OPTIMIZER, STEP))
    gathers = zero.stage == 3 and (ranks > 1 or zero.offload_param)
    host = 0.0
    if zero.offload_param:
        host, divided = host + divided, 0.0
    if zero.offload_optimizer:
        # The 2 bytes beside the optimizer's are ZeRO-3's gradients; in ZeRO-2 the new weights on their way back.
        host += optimizer + stepping + gradients
        gradients = optimizer = stepping = 0.0
    return Memory(
        weights=divided + WEIGHT * sizes.whole,
        gathered=WEIGHT * min(sizes.divided, zero.max_live_parameters) if gathers else 0.0,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(
            sizes.config,
            step.positions,
            step.predicted,
            dtype=torch.bfloat16,
            gradient_checkpointing=step.gradient_checkpointing,
            lora=lora,
        ),
        stepping=stepping,
        host=host * ranks / nodes,
    )


def deepspeed_estimate(sizes: Sizes, zero: Zero, *, ranks: int, nodes: int = 1) -> tuple[int, int] | None:
    """DeepSpeed's own estimators on the same model: bytes of a node's host and of a GPU.

    They take every weight for trained, add half as much again on the host, and know nothing of activations. None below
    ZeRO-2, which they do not cover.
    """
    common = {"num_gpus_per_node": ranks // nodes, "num_nodes": nodes, "cpu_offload": zero.offload_optimizer}
    if zero.stage == 2:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        host, gpu = estimate_zero2_model_states_mem_needs(sizes.total, **common)
    elif zero.stage == 3:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            sizes.total, sizes.largest_layer, cpu_offload_params=zero.offload_param, **common
        )
    else:
        return None
    return host, gpu
