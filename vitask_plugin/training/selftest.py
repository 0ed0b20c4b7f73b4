"""Before the first step: are all branches over one shared prefix what a forward of their own would give?

Packed is a claim about a model. It holds where a token's state depends on what the mask lets through and on position
ids alone. A model may break that in silence, so it is tried on the user's own model and samples.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.method.connected import Connected
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training.batches import BranchedBatches

# Of the logits' root mean square: float32 sums in another order differ by some 1e-6 of it. Below float32 the noise of
# the model itself is a few units in the last place.
FLOAT32_BOUND = 1e-4
UNITS = 16


def bound(dtype: torch.dtype) -> float:
    """How far logits may lie apart that are the same, relative to their root mean square."""
    return FLOAT32_BOUND if dtype == torch.float32 else UNITS * torch.finfo(dtype).eps


def difference(found: Tensor, expected: Tensor) -> float:
    """How far two tensors of logits lie apart, root mean square, relative to that of `expected`; infinite where either
    holds what is no number."""
    if not expected.numel() and found.shape == expected.shape:
        return 0.0  # answers that are cut off
    scale = expected.float().square().mean().sqrt().clamp(min=1e-12)
    apart = float((found.float() - expected.float()).square().mean().sqrt() / scale)
    return apart if math.isfinite(apart) else math.inf


def references(
    model: Connected,
    collator: BranchedBatches,
    pair: Sequence[Contrasted],
    branch: Callable[..., Tensor],
    ready: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """See `Host.reference_logits`.

    Args:
        branch: (sample, sample whose image it is asked about, exemplar [E, D] if it has one) to [n, V] logits of the
            stock forward.
        ready: moves a tensor as the Trainer does.
    """
    found: dict[str, list[Tensor]] = {"plain": [], "prompted": [], "negative": []}
    for index, negative in pair:
        found["plain"].append(branch(index, index))
        if collator.vitask.uses_exemplar:
            exemplar = model.exemplars(ready(collator.exemplars.of(index)[None]))[0]
            found["prompted"].append(branch(index, index, exemplar))
        if collator.vitask.uses_negatives:
            found["negative"].append(branch(index, negative))
    return {kind: torch.cat(logits) for kind, logits in found.items() if logits}


def choose(asked: str, name: str, differs: Callable[[str], float], dtype: torch.dtype) -> tuple[str, str]:
    """The engine of a run, and a line that says why.

    Args:
        asked: --vitask_engine. name: of the model. differs: engine -> `difference` from stock forwards of one branch
            each. dtype: that the step computes in.

    Raises:
        VITaskError: no engine, or not the one that was asked for, gives the model's own numbers.
    """
    limit = bound(dtype)
    tried = ("packed", "branches") if asked == "auto" else (asked,)
    differences: dict[str, float] = {}
    for engine in tried:
        differences[engine] = differs(engine)
        if differences[engine] <= limit:
            return engine, _line(engine, name, differences, limit)
    figures = ", ".join(f"{engine} {figure:.1e}" for engine, figure in differences.items())
    advice = (
        "VITask cannot train it" if asked == "auto" else "leave --vitask_engine out, or give the other one of the two"
    )
    raise VITaskError(
        f"--vitask_engine {asked} would not train {name!r} on its own numbers: on two samples the logits differ from "
        f"its stock forward by {figures} of their size (at most {limit:.0e} is rounding); {advice}"
    )


def _line(engine: str, name: str, differences: dict[str, float], limit: float) -> str:
    own = f"{engine}, {differences[engine]:.1e} of the logits' size from stock forwards of one branch each"
    if "packed" in differences and engine != "packed":
        return (
            f"engine: {own}; a shared prefix would differ by {differences['packed']:.1e} (at most {limit:.0e} is "
            f"rounding) in {name!r}, so each branch gets a forward of its own"
        )
    return f"engine: {own}"
