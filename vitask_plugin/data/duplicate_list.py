"""Pictures that are there more than once, as a table: every pair, whether it has two labels, what was dropped."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vitask_plugin.files import atomic_path

DUPLICATES_FILE = "duplicates.csv"
SAME, NEAR = "same", "near"  # the same pixels, or nearly
_COLUMNS = (
    *("kind", "split", "name", "label", "other_split", "other_name", "other_label"),
    *("two_labels", "dropped"),
)


class Place(NamedTuple):
    """A picture: its split, its owner's name for it, its answer in words, and whether it was left out of the data."""

    split: str
    name: str
    label: str
    dropped: bool = False


def write_pairs(path: str | Path, pairs: Iterable[tuple[str, Place, Place]]) -> int:
    """Writes (kind, picture, picture) as CSV; returns how many there are. Without any, no file is written."""
    rows = [
        [
            *(kind, one.split, one.name, one.label, other.split, other.name, other.label),
            "yes" if one.label != other.label else "no",
            "; ".join(place.name for place in (one, other) if place.dropped),
        ]
        for kind, one, other in pairs
    ]
    if rows:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(rows)
    return len(rows)
