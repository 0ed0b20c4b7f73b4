"""The sentence for a checkpoint that does not fit a network: the cause first, then what was found and expected."""

from collections.abc import Sequence
from pathlib import Path

from vitask_plugin.tsm.prefixes import Names, State, alike, completed, has_no_part, names_under_prefixes, necessary
from vitask_plugin.tsm.tensors import shape_of


def misfit(path: Path, states: Sequence[tuple[str, State]], expected: State, name: str, loose: Sequence[str]) -> str:
    """The sentence, about the state dict that comes nearest.

    Args:
        states: (where, state dict) of each in the checkpoint; `expected`, `name`, `loose` as of `read_weights`.
    """
    compared = [(*state, *_compared(state[1], expected, loose)) for state in states]
    label, state, prefix, names = max(compared, key=lambda one: _nearness(one[1], one[3], expected, loose))
    cause, advice = _cause(state, prefix, names, expected, loose)
    where = f" under {label!r}" if label else ""
    return (
        f"checkpoint {str(path)!r} does not fit {name} ({cause}); found{where}: {shown(state, list(state)[:3])}, ...; "
        f"expected: {shown(expected, list(expected)[:3])}, ...; {advice}"
    )


def shown(state: State, names: Sequence[str]) -> str:
    """Names with their shapes."""
    shapes = ((name, shape_of(state[name])) for name in names)
    return ", ".join(f"{name} [{'...' if shape is None else ', '.join(map(str, shape))}]" for name, shape in shapes)


def _compared(state: State, expected: State, loose: Sequence[str]) -> tuple[str, Names]:
    """The one prefix behind which most names of the network stand, whatever their shapes, and the names."""
    under = names_under_prefixes(state, lambda name, stored: name in expected)
    if not under:
        return "", {}
    prefix = max(under, key=lambda found: _nearness(state, under[found], expected, loose))
    elsewhere = names_under_prefixes(state, lambda name, stored: alike(name, state[stored], expected, loose))
    return prefix, completed(under[prefix], necessary(expected), elsewhere)


def _nearness(state: State, names: Names, expected: State, loose: Sequence[str]) -> tuple[int, int]:
    return len(names), sum(alike(name, state[stored], expected, loose) for name, stored in names.items())


def _cause(state: State, prefix: str, names: Names, expected: State, loose: Sequence[str]) -> tuple[str, str]:
    """What differs, and what to do."""
    needed = [name for name in expected if name in necessary(expected)]
    missing = [name for name in needed if name not in names]
    wrong = [name for name in names if not alike(name, state[names[name]], expected, loose)]
    used = set(names.values())
    more = [stored for stored in state if stored not in used and not has_no_part(stored, prefix)]
    advice = "check the name and --image-size"
    if not names:
        cause = "none of its names is one of the network's, so it is of another architecture"
        return cause, "check the name of the architecture"
    if wrong:
        cause = f"{shown(state, [names[wrong[0]]])} there, {shown(expected, wrong[:1])} expected"
        return cause + (f", and {len(wrong) - 1} more shapes differ" if len(wrong) > 1 else ""), advice
    extra = f"{len(more)} weights that the network does not have, {shown(state, more[:3])}"
    if missing and set(missing) <= set(loose):
        if not more:
            cause = f"its classifier is missing: {', '.join(missing)}"
            return cause, (
                "give the checkpoint of a trained classifier; where its last layer lies elsewhere in the file, save "
                "the state dict of the whole network"
            )
        cause = f"its classifier is missing, {', '.join(missing)}; and it has {extra}"
        return cause, (
            "call the classifier's weights as the network does, if they take the same feature, or give --module with a "
            "factory that builds the network as it was trained"
        )
    if missing:
        cause = f"{len(missing)} of {len(expected)} are missing: {', '.join(missing[:3])}"
        return cause + (f"; and it has {extra}" if more else ""), advice
    return f"it has {extra}", "check the name, or remove them if they have no part in the output"
