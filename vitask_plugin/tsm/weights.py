"""The weights in a checkpoint as people save them: which of several state dicts, and under which prefixes.

A checkpoint may hold the weights under any key, several of them (a model and its moving average), and each name may
carry the prefixes of wrappers (DDP, torch.compile, Lightning, a class of one's own). What the network expects decides:
the state dict that fits it, whole and with nothing left over that could have a part in its output.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm import formats
from vitask_plugin.tsm.misfit import misfit, shown
from vitask_plugin.tsm.prefixes import State, alike, completed, has_no_part, names_under_prefixes, necessary
from vitask_plugin.tsm.tensors import fault, shape_of

# Of several state dicts that fit: averaged weights first, as timm does, then the plain ones, a student last.
_PREFERRED = (r"ema|shadow|averaged|swa", r"teacher|momentum", r"", r"student|online")
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callbacks|loops|(^|_)grad(s|ients)?$")


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
    content = formats.load(path)
    states = list(_states(content))
    if not states:
        raise VITaskError(
            f"checkpoint {str(path)!r} holds no state dict (names with their tensors), but a {_described(content)}; "
            "save model.state_dict()"
        )
    fits = [fit for label, state in states for fit in _fits(label, state, expected, loose)]
    if not fits:
        states += _put_together(states)
        fits = [fit for label, state in states for fit in _fits(label, state, expected, loose)]
    if key is not None:
        given, fits = fits, [fit for fit in fits if key in (fit[0], *fit[0].split("."))]
        chosen = [state for state in states if key in (state[0], *state[0].split("."))]
        if not fits and not chosen:
            labels = ", ".join(label or "(the whole file)" for label, *_ in given or states)
            raise VITaskError(f"checkpoint {str(path)!r} has no weights under --key {key!r}; there are {labels}")
        states = chosen or states
    if not fits:
        raise VITaskError(misfit(path, states, expected, name, loose))
    fits.sort(key=lambda fit: _rank(fit[0]))
    (label, weights), others = fits[0], [label for label, _ in fits[1:]]
    _check(path, label, weights, others, expected, loose)
    return Found(weights, label, others)


def _check(
    path: Path, label: str, weights: State, others: Sequence[str], expected: State, loose: Sequence[str]
) -> None:
    """Refuses weights that fit by name and shape and are still of no use."""
    where = f" under {label!r}" if label else ""
    own = {name: tensor if name not in loose else tensor.flatten()[:1] for name, tensor in expected.items()}
    found = fault(weights, own)
    if found is not None:
        another = f", or another with --key ({', '.join(other or 'the top' for other in others)})" if others else ""
        raise VITaskError(f"checkpoint {str(path)!r}{where}: {found}{another}")
    heads = [name for name in loose if name in weights]
    if len({len(weights[name]) for name in heads}) > 1:
        raise VITaskError(
            f"checkpoint {str(path)!r}{where}: the parts of its head are for unlike numbers of classes, "
            f"{shown(weights, heads)}; give the checkpoint as it was saved"
        )


def _rank(label: str) -> int:
    for number, words in enumerate(_PREFERRED):
        if words and re.search(rf"(^|[._])({words})([._]|$)", label.lower()):
            return number
    return _PREFERRED.index("")


def _states(value: Any, label: str = "", depth: int = 8) -> Iterator[tuple[str, State]]:
    """(where, state dict) of every mapping from names to tensors in a checkpoint, in lists too."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return
    own = {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
    if own and len(own) >= sum(isinstance(item, Tensor) for item in value.values()):
        yield label, own
    for name, item in value.items():
        if depth and not _NOT_WEIGHTS.search(str(name).lower()):
            yield from _states(item, f"{label}.{name}" if label else str(name), depth - 1)


def _put_together(states: Sequence[tuple[str, State]]) -> list[tuple[str, State]]:
    """State dicts that lie side by side, as one: of a network that was saved in parts."""
    parts: dict[str, list[tuple[str, State]]] = {}
    for label, state in states:
        beside, _, own = label.rpartition(".")
        if label:
            parts.setdefault(beside, []).append((own, state))
    return [
        (beside, {f"{own}.{name}": tensor for own, state in found for name, tensor in state.items()})
        for beside, found in parts.items()
        if len(found) > 1
    ]


def _described(value: Any, inside: bool = False) -> str:
    """What an object is: its type, and of a collection the keys and types in it."""
    if isinstance(value, Tensor):
        return f"tensor {list(shape_of(value) or ())}"
    if not isinstance(value, Mapping | list | tuple):
        return type(value).__name__
    kind = f"{'dict' if isinstance(value, Mapping) else type(value).__name__} of {len(value)}"
    if inside or not value:
        return kind
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    listed = [f"{name!r}: {_described(item, True)}" for name, item in islice(items, 5)]
    return f"{kind} ({', '.join(listed)}{', ...' if len(value) > 5 else ''})"


def _fits(label: str, state: State, expected: State, loose: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(label, weights) for every prefix under which a state dict holds the whole network."""
    under = names_under_prefixes(state, lambda name, stored: alike(name, state[stored], expected, loose))
    needed = necessary(expected)
    covers = {prefix: names for prefix, names in under.items() if needed <= names.keys()}
    if not covers and under:
        # A prefix on a part of the names alone: the longest list, and the rest from where it can only be meant.
        most = max(under, key=lambda prefix: len(under[prefix]))
        names = completed(under[most], needed, under)
        if needed <= names.keys():
            covers[most] = names
    spare = {stored for prefix in covers for stored in covers[prefix].values()}
    for prefix, names in covers.items():
        if all(stored in spare or has_no_part(stored, prefix) for stored in state):
            weights = {name: state[names[name]] if name in names else own for name, own in expected.items()}
            yield ".".join(filter(None, (label, prefix))), weights
