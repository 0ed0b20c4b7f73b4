"""What a step gives back, whatever model computed its logits: the loss of its stage, and the sums behind the log."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.method import objective
from vitask_plugin.method.layout import Branches


@dataclass
class VITaskOutput(ModelOutput):
    """The loss of one step, and the sums behind the log: `{name: scalar}` (see `trainer.LOGGED`)."""

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None


def output_of(logits: Tensor, branches: Branches, vitask: VITaskArguments, denominator: Tensor) -> VITaskOutput:
    """The output of a step.

    Args:
        logits: [n, V] of all labelled tokens of all branches.
        denominator: scalar, response tokens of the whole accumulation step over all ranks.
    """
    sums = objective.sums(logits, branches, detach=vitask.vitask_rda_detach)
    loss = objective.total(
        sums,
        stage=vitask.vitask_stage,
        rda_weight=vitask.vitask_rda_weight,
        crt_weight=vitask.vitask_crt_weight,
        denominator=denominator,
    )
    return VITaskOutput(loss=loss, sums={name: value.detach() for name, value in sums.items()})
