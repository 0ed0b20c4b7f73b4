"""A labelled file of somebody's own images, as a folder or a table names it, and how class and group are written."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vitask_plugin.data.names import look, plain, shown
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
SHOWN_GROUPS = 5  # that are written in several ways, in the log
# What a cell that holds nothing looks like, as pandas, R, SQL and Excel write it; in lower case.
_MISSING = (
    *("", "nan", "-nan", "na", "<na>", "n/a", "#n/a", "#na", "#n/a n/a", "n.a.", "none", "null", "<null>", "nil"),
    *("nat", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "#value!", "#ref!", "#null!", "#div/0!", "#name?"),
)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_BEFORE_NUMBER = re.compile(r"(?<=[^\W\d]) (?=\d)")
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


@dataclass(frozen=True)
class Row:
    """One labelled file.

    Attributes:
        name: where it was named, for messages.
        path: the file.
        labels: its class names.
        split: train, val or test, None if none was given.
        group: what it shares with the images that have to stay in its split (patient, lesion, slide); None: nothing.
        source: what its owner calls it: its path below the folder, or as the table names it.
    """

    name: str
    path: Path
    labels: tuple[str, ...]
    split: str | None
    group: str | None = None
    source: str | None = None


def natural(name: str) -> str:
    """A class name as it is said: `basal_cell_carcinoma` -> `basal cell carcinoma`; what cannot be seen is left out."""
    return plain(name.replace("_", " "))


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value, as programs write that."""
    return plain(cell).casefold() in _MISSING


def group_key(group: str) -> str:
    """The same for two ids that could be one patient's: they look alike, or differ in zeros before a number ("P1",
    "p001", "P-01").

    To take two patients for one costs nothing but freedom of the split; to take one for two makes the test easy.
    """
    return _BEFORE_NUMBER.sub("", _LEADING_ZEROS.sub("", look(group)))


def in_one_spelling(rows: Sequence[Row], source: str) -> list[Row]:
    """The rows, each group written in its most frequent way; where there are several, a warning shows them."""
    spellings: dict[str, Counter[str]] = {}
    for group, count in Counter(row.group for row in rows if row.group is not None).items():
        spellings.setdefault(group_key(group), Counter())[group] = count
    kept = {group: counts.most_common(1)[0][0] for counts in spellings.values() for group in counts}
    several = [counts for counts in spellings.values() if len(counts) > 1]
    if several:
        named = [
            " = ".join(f"{shown(group)} ({count} images)" for group, count in counts.items())
            for counts in several[:SHOWN_GROUPS]
        ]
        logger.warning(
            "%s: %d group(s) are written in more than one way, and each is taken as one: %s%s",
            *(source, len(several), "; ".join(named), "; ..." if len(several) > SHOWN_GROUPS else ""),
        )
    return [row if row.group is None else replace(row, group=kept[row.group]) for row in rows]


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
        # File systems may decompose accents.
        pattern, path = (unicodedata.normalize("NFC", text) for text in (self.text, relative))
        compiled = re.compile(pattern)
        found = compiled.search(path if "/" in self.text else PurePosixPath(path).name)
        if found is None:
            return None
        return plain(found["group" if "group" in compiled.groupindex else min(compiled.groups, 1)] or "") or None
