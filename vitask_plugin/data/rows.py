"""A labelled file of somebody's own images, as a folder or a table names it, and how class and group are written."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vitask_plugin.data.names import plain
from vitask_plugin.errors import VITaskError

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Row:
    """One labelled file.

    Attributes:
        name: where it was named, for messages.
        path: the file.
        labels: its class names.
        split: train, val or test, None if none was given.
        group: what it shares with the images that have to stay in its split (patient, lesion, slide); None: nothing.
    """

    name: str
    path: Path
    labels: tuple[str, ...]
    split: str | None
    group: str | None = None


def natural(name: str) -> str:
    """A class name as it is said: `basal_cell_carcinoma` -> `basal cell carcinoma`; what cannot be seen is left out."""
    return plain(name.replace("_", " "))


@dataclass(frozen=True)
class GroupPattern:
    """`--group-pattern`: a regular expression that finds the group in the name of a file.

    It is searched for in the file's name, or, if it holds a `/`, in the path below the folder. The group is what its
    capture group found (the one called `group`, if there are several), else the whole match.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            found = re.compile(self.text)
        except re.error as error:
            raise VITaskError(
                f"--group-pattern {self.text!r} is no regular expression ({error}); write it as Python does"
            ) from None
        if found.groups > 1 and "group" not in found.groupindex:
            raise VITaskError(
                f"--group-pattern {self.text!r} has {found.groups} capture groups; keep one, or call it (?P<group>...)"
            )

    def find(self, relative: str) -> str | None:
        """The group of a file, None where the pattern is not found or what it finds is empty."""
        compiled = re.compile(self.text)
        found = compiled.search(relative if "/" in self.text else PurePosixPath(relative).name)
        if found is None:
            return None
        return plain(found["group" if "group" in compiled.groupindex else min(compiled.groups, 1)] or "") or None
