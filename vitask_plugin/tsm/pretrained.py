"""`vitask tsm train --pretrained`: timm's own weights, others of timm's by name, or those in a file; and a new head
that starts small, so that the first steps do not undo what the weights know.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.backbone import build_timm, head_names
from vitask_plugin.tsm.formats import WEIGHTS
from vitask_plugin.tsm.weights import Found, read_weights

HEAD_SCALE = 1e-3


def start_pretrained(
    arch: str, classes: int, options: Mapping[str, Any], pretrained: bool | str, training: Mapping[str, float]
) -> tuple[nn.Module, str | None]:
    """A timm network with pretrained weights.

    Args:
        options: for timm, of the TSM's record. training: options of the training alone (dropout).
        pretrained: see `Settings`; true.

    Returns:
        The network, and of a file what was loaded and what was not.

    Raises:
        VITaskError: no such weights, or a file that does not fit.
    """
    options = {**options, **training}
    if isinstance(pretrained, str) and _is_file(pretrained):
        network = build_timm(arch, classes, options)
        found, said = _from_file(network, arch, classes, options, pretrained)
        network.load_state_dict(found)
        return network, said
    name = arch if pretrained is True else _named(arch, pretrained)
    network = build_timm(name, classes, options, pretrained=True)
    if network.pretrained_cfg.get("num_classes") != classes:
        shrink_head(network)
    return network, None


@torch.no_grad()
def shrink_head(network: nn.Module) -> None:
    """Makes the logits of a fresh head nearly 0: its weights a thousandth of what they were, its biases 0.

    Some architectures' own start lets the logits of good features be far apart at once.
    """
    own = network.state_dict()  # shares its memory with the network
    for name in head_names(network):
        if name in own:
            own[name].mul_(0 if own[name].ndim == 1 else HEAD_SCALE)


def _is_file(text: str) -> bool:
    """A name of timm's has neither a folder nor the ending of a weights file."""
    return os.path.exists(text) or Path(text).suffix in WEIGHTS or os.sep in text


def _named(arch: str, name: str) -> str:
    """The full name of other pretrained weights of an architecture: of its tag, or itself."""
    import timm

    base = arch.split(".")[0]
    full = name if name.split(".")[0] == base else f"{base}.{name}"
    known = timm.list_pretrained(f"{base}.*")
    if full not in known:
        listed = ", ".join(one.partition(".")[2] for one in known[:8]) or "none"
        raise VITaskError(
            f"--pretrained {name!r} is no file, and timm has no weights of that name for {base}; it has: {listed}"
        )
    return full


def _from_file(
    network: nn.Module, arch: str, classes: int, options: Mapping[str, Any], path: str
) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict for `network`, and what was loaded, in words."""
    head = head_names(network)
    resized = ""
    try:
        found, given = _fitting(network, arch, path, head)
    except VITaskError:
        resampled = _resampled(network, arch, classes, options, path)
        if resampled is None:
            raise
        found, given = resampled
        resized = f", for images of {options['img_size']} pixels"
    own = network.state_dict()
    same = [name for name in head if name in given and found.weights[name].shape == own[name].shape]
    fresh = [name for name in head if name in own and name not in same]
    if fresh:
        shrink_head(network)
        own, same = network.state_dict(), []
    loaded = {name: value for name, value in found.weights.items() if name not in head or name in same}
    widths = sorted({len(found.weights[name]) for name in head if name in given})
    if not fresh:
        new = "the head too"
    elif widths:
        new = f"not loaded: the head ({widths[0]} classes there, {classes} here)"
    else:
        new = f"the file has no head, so that of {classes} classes is new"
    label = f" under {found.label!r}" if found.label else ""
    label += f" (others in it fit too: {', '.join(map(repr, found.others))})" if found.others else ""
    said = f"started from {path}{label}: {len(loaded)} of {len(own)} tensors loaded{resized}; {new}"
    return own | loaded, said


def _resampled(
    network: nn.Module, arch: str, classes: int, options: Mapping[str, Any], path: str
) -> tuple[Found, list[str]] | None:
    """Weights for the architecture's own image size, brought to another as timm does; None where that is not it."""
    if "img_size" not in options or not hasattr(network, "set_input_size"):
        return None
    other, head = build_timm(arch, classes, {n: v for n, v in options.items() if n != "img_size"}), head_names(network)
    try:
        found, given = _fitting(other, arch, path, head)
    except VITaskError:
        return None
    body = {name: value for name, value in found.weights.items() if name not in head}
    other.load_state_dict(other.state_dict() | body)
    other.set_input_size(img_size=options["img_size"])
    body = {name: value for name, value in other.state_dict().items() if name not in head}
    return replace(found, weights=found.weights | body), given


def _fitting(network: nn.Module, arch: str, path: str, head: list[str]) -> tuple[Found, list[str]]:
    """The weights in a file, and which names of the head are in it."""
    expected = network.state_dict()
    try:
        return read_weights(path, expected, arch, loose=head), [name for name in head if name in expected]
    except VITaskError as error:
        try:
            return read_weights(path, {n: v for n, v in expected.items() if n not in head}, arch), []
        except VITaskError:
            raise error from None
