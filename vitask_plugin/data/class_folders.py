"""Class folders on a disk as rows: DIR/class/image, or DIR/train/class/image with val and test beside train.

What file managers, notebooks, servers and archives leave in a folder is no data: it is passed over and counted.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vitask_plugin.data.leftovers import companions, is_beside_images, is_leftover, is_text, listed
from vitask_plugin.data.names import look, shown
from vitask_plugin.data.rows import SPLIT_NAMES, GroupPattern, Row, is_missing, natural
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)


class ClassFolders:
    """A folder of class folders.

    Attributes:
        rows: its images. classes: class names in order of the alphabet.
        leftovers: names of what was passed over, as `{name: how often}`.
    """

    def __init__(self, root: Path, pattern: GroupPattern | None = None) -> None:
        """Reads the names of all files.

        Raises:
            VITaskError: no class folders, an empty one, or a file outside of them.
        """
        self.root, self._pattern = root, pattern
        self.leftovers: dict[str, int] = {}
        self._others: list[str] = []
        self._beside: list[str] = []
        self._rings: list[str] = []
        self._listed: set[Path] = set()
        parts = self._parts()
        self.rows = [row for split, folder in parts for row in self._class_rows(folder, split)]
        self.classes = sorted({label for row in self.rows for label in row.labels})
        if not self.classes:
            raise VITaskError(
                f"folder {str(root)!r} has no class folders; expected DIR/class/image or DIR/train/class/image"
            )
        if self.leftovers:
            names = ", ".join(f"{name} ({count})" for name, count in sorted(self.leftovers.items()))
            logger.warning("left out, because it is no data: %s", names)
        if self._others:
            logger.warning("not read, because by its name it is no image: %s", listed(self._others))
        if self._beside:
            logger.warning(
                "not read, because by its name it is a mask, an annotation or a thumbnail of other images: %s (%d "
                "file(s) and folder(s)); give another name to what is an image of its class",
                *(listed(self._beside, 3), len(self._beside)),
            )
        if self._rings:
            logger.warning("not followed, because it leads back into a folder that it lies in: %s", listed(self._rings))
        if pattern is None and parts == [(None, root)]:
            self._say_folders()

    def _parts(self) -> list[tuple[str | None, Path]]:
        tops = self._entries(self.root)
        parts: list[tuple[str | None, Path]] = [(SPLIT_NAMES[e.name.lower()], e) for e in tops if _is_split(e)]
        if not parts:
            return [(None, self.root)]
        classes = [entry.name for entry in tops if entry.is_dir() and not _is_split(entry)]
        if classes or "train" not in [split for split, _ in parts]:
            wrong = f"{classes[0]!r} beside them" if classes else "no 'train'"
            raise VITaskError(
                f"folder {str(self.root)!r} has split folders and {wrong}; expected train, val and test only, so move "
                "or rename what is there"
            )
        self._others += [entry.name for entry in tops if not entry.is_dir()]
        return parts

    def _class_rows(self, folder: Path, split: str | None) -> Iterator[Row]:
        seen: dict[str, str] = {}
        for entry in self._entries(folder):
            if not entry.is_dir():
                if entry.suffix.lower() in Image.registered_extensions():
                    raise VITaskError(f"image {str(entry)!r} lies in no class folder; move it into one")
                self._others.append(entry.relative_to(self.root).as_posix())
                continue
            self._check_looks(entry, seen)
            files = sorted(self._files(entry, frozenset()))
            if not files:
                raise VITaskError(
                    f"class {entry.name!r} is empty: no file in {str(entry)!r} could be an image; add images "
                    "or remove the folder"
                )
            for file in files:
                relative = file.relative_to(self.root).as_posix()
                group = None if self._pattern is None else self._pattern.find(relative)
                yield Row(repr(relative), file, (natural(entry.name),), split, group, relative)

    def _check_looks(self, entry: Path, seen: dict[str, str]) -> None:
        """Refuses two folders whose names look alike, unless they are written the same."""
        if not natural(entry.name):
            raise VITaskError(f"folder {str(entry)!r} has no name that can be seen, {entry.name!a}; rename it")
        other = seen.setdefault(look(natural(entry.name)), entry.name)
        if natural(other) != natural(entry.name):
            raise VITaskError(
                f"folder {str(entry.parent)!r}: the classes {shown(other)} and {shown(entry.name)} look the same; put "
                "their images into one folder, or rename one"
            )
        if is_missing(entry.name) and other == entry.name:
            logger.warning(
                "the folder %s is a class like the others; where it holds images whose class is not known, take it out",
                shown(entry.name),
            )
        if other != entry.name:
            logger.warning("the folders %s and %s are one class, %r", ascii(other), ascii(entry.name), natural(other))

    def _files(self, folder: Path, above: frozenset[str]) -> Iterator[Path]:
        """All files below a class folder; a link to a folder is followed, but never into a folder that it lies in."""
        real = os.path.realpath(folder)
        if real in above:
            self._rings.append(folder.relative_to(self.root).as_posix())
            return
        entries = self._entries(folder)
        beside = companions([entry for entry in entries if not entry.is_dir()])
        for entry in entries:
            if entry in beside or (entry.is_dir() and is_beside_images(entry, entries)):
                self._beside.append(entry.relative_to(self.root).as_posix())
            elif entry.is_dir():
                yield from self._files(entry, above | {real})
            elif is_text(entry):
                self._others.append(entry.relative_to(self.root).as_posix())
            else:
                yield entry

    def _say_folders(self) -> None:
        """Warns where images lie in folders of their own below their class: these may be patients."""
        count = Counter(row.path.parent for row in self.rows)
        below = [folder for folder in count if folder.parent != self.root]
        if len(below) > 2 * len(self.classes) and max(count[folder] for folder in below) > 1:
            logger.warning(
                "the images of %d classes lie in %d folders below them, such as %r: where each holds the images of one "
                "patient, lesion or slide, these may get into two splits, and the test is easier than it should be; "
                "--group-pattern '/([^/]+)/[^/]+$' keeps a folder's images together",
                *(len(self.classes), len(below), below[0].relative_to(self.root).as_posix()),
            )

    def _entries(self, folder: Path) -> list[Path]:
        """What lies in a folder, sorted; what was left there by others is counted, the first time."""
        try:
            found = sorted(folder.iterdir())
        except OSError as error:
            raise VITaskError(f"folder {str(folder)!r} cannot be read ({error.strerror}); check the path") from None
        kept = [entry for entry in found if not is_leftover(entry.name)]
        known = folder in self._listed
        self._listed.add(folder)
        for name in set() if known else {entry.name for entry in found} - {entry.name for entry in kept}:
            kind = "._*" if name.startswith("._") else ".Trash-*" if name.startswith(".Trash-") else name
            self.leftovers[kind] = self.leftovers.get(kind, 0) + 1
        return kept


def _is_split(path: Path) -> bool:
    return path.is_dir() and path.name.lower() in SPLIT_NAMES
