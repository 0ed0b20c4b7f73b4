"""`vitask tsm train --init`: a network that starts from an earlier TSM's weights, and says so in its record.

Shapes: K_all = classes of all tasks side by side in the head.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from vitask_plugin.data.names import plain
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.backbone import head_names
from vitask_plugin.tsm.joint import Tasks, columns
from vitask_plugin.tsm.model import TSM, read_tsm_record


def load_initial(directory: str | Path, arch: str | None) -> TSM:
    """The TSM to start from.

    Args:
        arch: that is to be trained; None = the same.

    Raises:
        VITaskError: not a timm model, another architecture, or not a whole TSM.
    """
    source = read_tsm_record(directory)["source"]
    if "timm" not in source:
        raise VITaskError(
            f"--init {str(directory)!r} is the Python module {source['module']!r}, and only timm models are trained "
            "here; train it where it was trained, and import the result"
        )
    if arch is not None and arch.split(".")[0] != source["timm"].split(".")[0]:
        raise VITaskError(
            f"--init {str(directory)!r} is a {source['timm']}, --arch is {arch}; weights go from one architecture to "
            "the same only"
        )
    return TSM.load(directory)


def lineage(tsm: TSM) -> list[str]:
    """Hashes of the TSMs that one started from `tsm` descends from, the latest first: `init` of its record."""
    return [tsm.hash, *tsm.record.get("init", [])]


@torch.no_grad()
def start_from(network: nn.Module, tasks: Tasks, tsm: TSM) -> str:
    """Copies the weights of `tsm` into `network`, and the rows of its head for each class that both know.

    Args:
        network: a timm model of the same architecture, its head for `tasks`.

    Returns:
        What was and what was not taken over, in words.

    Raises:
        VITaskError: weights of other shapes beyond the head, such as those of another image size.
    """
    old, own = tsm.backbone.network.state_dict(), network.state_dict()
    head = set(head_names(network))
    rows, fresh = _rows(tasks, tsm.record["tasks"])
    for name, weight in own.items():
        if name in head and name in old:
            for here, there in rows:
                weight[here] = old[name][there]
        elif name in old and old[name].shape == weight.shape:
            weight.copy_(old[name])
        else:
            found = f"has it as {_shape(old[name])}" if name in old else "has it not"
            raise VITaskError(
                f"--init: weight {name!r} is {_shape(weight)}, and TSM {tsm.hash[:12]} {found}; use its --arch and "
                f"its --image-size ({tsm.record['image_size']})"
            )
    said = f"started from TSM {tsm.hash[:12]}: {len(own.keys() - head)} tensors and the head of {len(rows)} classes"
    return f"{said}; new in the head: {', '.join(fresh)}" if fresh else f"{said}, all there are"


def _rows(tasks: Tasks, old: Tasks) -> tuple[list[tuple[int, int]], list[str]]:
    """(row of the head, row of the old head) of each class of a task that both have, and the names of all others."""
    rows, fresh = [], []
    for task, entry in tasks.items():
        known = old.get(task, {"choices": [], "multi_label": entry["multi_label"]})
        choices = [plain(name) for name in known["choices"]] if known["multi_label"] == entry["multi_label"] else []
        here = _indices(tasks, task)
        for choice, row in zip(entry["choices"], here, strict=True):
            if plain(choice) in choices:
                rows.append((row, _indices(old, task)[choices.index(plain(choice))]))
            else:
                fresh.append(f"{choice!r} of {task}")
    return rows, fresh


def _indices(tasks: Tasks, task: str) -> list[int]:
    found = columns(tasks, task)
    return list(range(found.start, found.stop))


def _shape(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape)) or "a number"
