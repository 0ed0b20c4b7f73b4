"""`labels.json` of a data set that was written, and samples that have to be of it.

Of one set it holds "task", "choices", "modality", "type" and more; of several, which `vitask data merge` put together,
"sets": these by the name of each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.labels_format import LABELS, SETS
from vitask_plugin.data.names import same_names
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json

LABELS_FILE = "labels.json"
_KEYS = {"task", "choices", "modality", "type"}


def read_labels(folder: str | Path, what: str) -> dict[str, Any]:
    """The label set of the folder of one data set.

    Args:
        what: names the file in an error.

    Raises:
        VITaskError: it is absent, none, or that of several sets.
    """
    path = Path(folder) / LABELS_FILE
    labels = read_json(path, what, finite=True)
    if sets_in(labels):
        raise VITaskError(
            f"{str(path)!r} has the label sets of several data sets, {', '.join(sets_in(labels))}; give the folder of "
            f"one of them, such as {str(Path(folder) / next(iter(sets_in(labels))))!r}"
        )
    LABELS.check(labels, f"{what} {str(path)!r}")
    return labels


def read_sets(folder: str | Path, what: str) -> dict[str, Any]:
    """`{name: label set}` of a folder of several data sets, empty where it is one set's.

    Raises:
        VITaskError: it is absent, or a set's is none.
    """
    path = Path(folder) / LABELS_FILE
    labels = read_json(path, what, finite=True)
    found = sets_in(labels)
    if found:
        SETS.check(labels, f"{what} {str(path)!r}")
    return found


def sets_in(labels: Any) -> dict[str, Any]:
    """`{name: label set}` of parsed JSON that holds those of several sets; nothing of any other."""
    sets = labels.get("sets") if isinstance(labels, dict) and not labels.keys() & _KEYS else None
    return sets if isinstance(sets, dict) and all(map(_is_set, sets.values())) else {}


def _is_set(labels: Any) -> bool:
    return isinstance(labels, dict) and labels.keys() >= _KEYS


def check_sample(sample: Mapping[str, Any], labels: Mapping[str, Any], path: str | Path) -> None:
    """Refuses a sample with a `vitask` block of another task, or of other labels, than the label set beside its file.

    Raises:
        VITaskError: naming the file `path` and the sample.
    """
    block, several = sample["vitask"], labels["type"] == MULTI_LABEL
    if isinstance(block["label"], list) != several:
        raise VITaskError(
            f"{str(path)!r}, sample {sample.get('id')!r}: the label is {block['label']!r}, and {LABELS_FILE} has "
            f"the type {labels['type']!r}; write the folder again"
        )
    if block["task"] != labels["task"] or not same_names(block["choices"], labels["choices"]):
        raise VITaskError(
            f"{str(path)!r}, sample {sample.get('id')!r}: task {block['task']!r} with the labels "
            f"{block['choices']!r} is not that of {LABELS_FILE}, {labels['task']!r} with {labels['choices']!r}; "
            "write the folder again"
        )
