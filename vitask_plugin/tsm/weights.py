"""The weights in a checkpoint as people save them: which of several state dicts, and under which prefixes.

A checkpoint may hold the weights under any key, several of them (a model and its moving average), and each name may
carry the prefixes of wrappers (DDP, torch.compile, Lightning, a class of one's own). What the network expects decides:
the state dict that fits it, whole and with nothing left over that could have a part in its output.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm import formats

State = Mapping[str, Tensor]

# Of several state dicts that fit: averaged weights first, as timm does, then the plain ones, a student last.
_PREFERRED = (r"ema|shadow|averaged|swa", r"teacher|momentum", r"", r"student|online")
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|amp$|rng|callbacks|loops|criterion|loss|hparams|hyper_parameters|args")
# Buffers that have no part in the output, or follow from the sizes.
_OPTIONAL = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked|relative_position_index|attn_mask)$")
# What may lie beside the network: losses, metrics, counters, and averages or teachers that do not fit.
_BESIDE = re.compile(
    r"^(criterion|loss\w*|\w*metrics?|\w*_(acc|accuracy|auc|auroc|f1|loss)|optimizer|n_averaged|initted|step"
    r"|teacher\w*|ema\w*|\w+_ema|momentum\w*)(\.|$)"
)


@dataclass(frozen=True)
class Found:
    """Weights that fit.

    Attributes:
        weights: under the network's own names.
        label: where they were in the checkpoint ("" = at its top, without a prefix).
        others: labels of further weights in the checkpoint that fit too.
    """

    weights: dict[str, Tensor]
    label: str
    others: list[str]


def read_weights(
    path: str | Path, expected: State, name: str, *, key: str | None = None, loose: Sequence[str] = ()
) -> Found:
    """The weights of a checkpoint that fit a network.

    Args:
        path: a torch checkpoint or a safetensors file.
        expected: the network's state dict.
        name: of the network, for the sentence.
        key: which weights, where the checkpoint holds several; by default averaged ones, then plain ones.
        loose: names of the classifier's weights, whose first dimension may be another.

    Raises:
        VITaskError: what the file is, or what was found and what was expected.
    """
    path = Path(path)
    states = list(_states(formats.load(path)))
    if not states:
        raise VITaskError(f"checkpoint {str(path)!r} holds no state dict; save model.state_dict()")
    fits = [fit for label, state in states for fit in _fits(label, state, expected, loose)]
    if key is not None:
        given, fits = fits, [fit for fit in fits if key in (fit[0], *fit[0].split("."))]
        chosen = [state for state in states if key in (state[0], *state[0].split("."))]
        if not fits and not chosen:
            labels = ", ".join(label or "(the whole file)" for label, *_ in given or states)
            raise VITaskError(f"checkpoint {str(path)!r} has no weights under --key {key!r}; there are {labels}")
        states = chosen or states
    if not fits:
        raise VITaskError(_misfit(path, states, expected, name, loose))
    fits.sort(key=lambda fit: _rank(fit[0]))
    (label, weights), others = fits[0], [label for label, _ in fits[1:]]
    return Found(weights, label, others)


def _rank(label: str) -> int:
    for number, words in enumerate(_PREFERRED):
        if words and re.search(rf"(^|[._])({words})([._]|$)", label.lower()):
            return number
    return _PREFERRED.index("")


def _states(value: Any, label: str = "", depth: int = 3) -> Iterator[tuple[str, State]]:
    """(where, state dict) of every mapping from names to tensors in a checkpoint."""
    if not isinstance(value, Mapping) or not value:
        return
    own = {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
    if own and len(own) >= sum(isinstance(item, Tensor) for item in value.values()):
        yield label, own
    for name, item in value.items():
        if depth and isinstance(name, str) and not _NOT_WEIGHTS.search(name.lower()):
            yield from _states(item, f"{label}.{name}" if label else name, depth - 1)


def _fits(label: str, state: State, expected: State, loose: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(label, weights) for every prefix under which a state dict holds the whole network."""
    under: dict[str, dict[str, str]] = {}  # prefix -> the network's name -> the name in the state dict
    for stored in state:
        parts = stored.split(".")
        for cut in range(len(parts)):
            name = ".".join(parts[cut:])
            if name in expected and _alike(name, state[stored], expected[name], loose):
                under.setdefault(".".join(parts[:cut]), {})[name] = stored
    needed = {name for name in expected if not _OPTIONAL.search(name)}
    whole = [prefix for prefix, names in under.items() if needed <= names.keys()]
    covers = {prefix: dict(names) for prefix, names in under.items() if prefix in whole}
    if not whole and under:
        # A prefix on a part of the names alone: the longest list, and the rest from where it can only be meant.
        most = max(under, key=lambda prefix: len(under[prefix]))
        names = dict(under[most])
        for name in needed - names.keys():
            sources = [found[name] for found in under.values() if name in found]
            if len(sources) == 1:
                names[name] = sources[0]
        if needed <= names.keys():
            covers[most] = names
    spare = {stored for prefix in covers for stored in covers[prefix].values()}
    for prefix, names in covers.items():
        left = [stored for stored in state if stored not in spare and not _has_no_part(stored, prefix)]
        if not left:
            weights = {name: state[names[name]] if name in names else own for name, own in expected.items()}
            yield ".".join(filter(None, (label, prefix))), weights


def _has_no_part(stored: str, prefix: str) -> bool:
    own = stored.removeprefix(f"{prefix}.") if prefix else stored
    return bool(_OPTIONAL.search(stored) or _BESIDE.search(stored) or _BESIDE.search(own))


def _alike(name: str, found: Tensor, wanted: Tensor, loose: Sequence[str]) -> bool:
    skip = 1 if name in loose else 0
    return found.ndim == wanted.ndim and found.shape[skip:] == wanted.shape[skip:]


# The sentence --------------------------------------------------------------------------------------------------------


def _misfit(path: Path, states: Sequence[tuple[str, State]], expected: State, name: str, loose: Sequence[str]) -> str:
    label, state, plain = max(
        ((label, state, _plain(state, expected)) for label, state in states),
        key=lambda found: len(found[2].keys() & expected.keys()),
    )
    wrong = [key for key in expected if key in plain and not _alike(key, plain[key], expected[key], loose)]
    needed = [key for key in expected if not _OPTIONAL.search(key)]
    missing = [key for key in needed if key not in plain]
    more = [key for key in plain if key not in expected and not _has_no_part(key, "")]
    advice = "check the name and --image-size"
    if len(missing) == len(needed):
        cause = "none of its names is one of the network's, so it is of another architecture"
        advice = "check the name of the architecture"
    elif wrong:
        cause = f"{_shown(plain, wrong[:1])} there, {_shown(expected, wrong[:1])} expected"
        cause += f", and {len(wrong) - 1} more shapes differ" if len(wrong) > 1 else ""
    elif missing:
        cause = f"{len(missing)} of {len(expected)} are missing: {', '.join(missing[:3])}"
    else:
        cause = f"it has {len(more)} weights that the network does not have, {_shown(plain, more[:3])}"
        advice = "check the name, or remove them if they have no part in the output"
    where = f" under {label!r}" if label else ""
    return (
        f"checkpoint {str(path)!r} does not fit {name} ({cause}); found{where}: {_shown(state, list(state)[:3])}, ...; "
        f"expected: {_shown(expected, list(expected)[:3])}, ...; {advice}"
    )


def _plain(state: State, expected: State) -> dict[str, Tensor]:
    """A state dict without the prefixes that stand before names of the network."""
    plain = {}
    for stored, tensor in state.items():
        parts = stored.split(".")
        names = (".".join(parts[cut:]) for cut in range(len(parts)))
        plain[next((name for name in names if name in expected), stored)] = tensor
    return plain


def _shown(state: State, names: Sequence[str]) -> str:
    return ", ".join(f"{name} [{', '.join(map(str, state[name].shape))}]" for name in names)
