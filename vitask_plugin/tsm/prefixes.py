"""The names of a state dict beside those that a network expects: prefixes, buffers, and what may lie beside it."""

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from vitask_plugin.tsm.tensors import shape_of

State = Mapping[str, Tensor]
Names = dict[str, str]  # the network's name -> the name in the state dict

# Buffers that have no part in the output, or follow from the sizes.
_OPTIONAL = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked|relative_position_index|attn_mask)$")
# What may lie beside the network: losses, metrics, counters, and averages or teachers that do not fit.
_BESIDE = re.compile(
    r"^(criterion|loss\w*|\w*metrics?|\w*_(acc|accuracy|auc|auroc|f1|loss)|optimizer|n_averaged|initted|step"
    r"|teacher\w*|ema\w*|\w+_ema|momentum\w*)(\.|$)"
)


def necessary(expected: State) -> set[str]:
    """The names without which the network does not give what it gave."""
    return {name for name in expected if not _OPTIONAL.search(name)}


def has_no_part(stored: str, prefix: str) -> bool:
    """Whether a name that the network does not have may be left out, where the network's stand behind `prefix`."""
    own = stored.removeprefix(f"{prefix}.") if prefix else stored
    return bool(_OPTIONAL.search(stored) or _BESIDE.search(stored) or _BESIDE.search(own))


def alike(name: str, found: Tensor, expected: State, loose: Sequence[str]) -> bool:
    """Whether a tensor has the shape of the network's `name`; of a `loose` one the first dimension may differ."""
    if name not in expected:
        return False
    skip, shape, wanted = int(name in loose), shape_of(found), shape_of(expected[name])
    return shape is not None and wanted is not None and len(shape) == len(wanted) and shape[skip:] == wanted[skip:]


def names_under_prefixes(state: State, belongs: Callable[[str, str], bool]) -> dict[str, Names]:
    """For every prefix of the stored names, what stands behind it: {prefix: {name: stored}}.

    Args:
        belongs: whether a name without its prefix, and the stored one, go together.
    """
    under: dict[str, Names] = {}
    for stored in state:
        parts = stored.split(".")
        for cut in range(len(parts)):
            name = ".".join(parts[cut:])
            if belongs(name, stored):
                under.setdefault(".".join(parts[:cut]), {})[name] = stored
    return under


def completed(names: Names, needed: set[str], under: Mapping[str, Names]) -> Names:
    """`names`, and those missing from it that stand elsewhere: without a prefix, or behind a single other one.

    No stored name is taken twice: `layer1.0.bn1.weight` is not `bn1.weight` where it is already itself.
    """
    names = dict(names)
    taken = set(names.values())
    for name in sorted(needed - names.keys()):
        sources = [found[name] for found in under.values() if name in found and found[name] not in taken]
        exact = [stored for stored in sources if stored == name]
        if len(exact or sources) == 1:
            names[name] = (exact or sources)[0]
            taken.add(names[name])
    return names
