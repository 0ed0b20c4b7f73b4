"""What is in image files: the SHA-256 of each beside its size and time, so that a restart does not read them again.

A remembered hash counts only while size and time (to the nanosecond) of the file are what they were.

Shapes: I = images.
"""

import hashlib
import os
import stat
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, inside, sha256_file

# A file may be written twice within one tick of its clock: one as young as this is not remembered. In nanoseconds.
_YOUNG = 2_000_000_000
_UNSURE = -1  # in place of a time: never trusted
_NOT_HASHED = bytes(32)

Mark = tuple[int, int]  # size in bytes, time of the last change in nanoseconds


class Contents:
    """Of image files, by their path below the image folder. Picklable.

    Args:
        images: I paths; of one that is there twice, the later row counts.
        marks: [I, 2] int64, see `Mark`.
        hashes: [I, 32] uint8, SHA-256 of the bytes; zeros where nobody asked.
    """

    def __init__(self, images: Sequence[str], marks: np.ndarray, hashes: np.ndarray) -> None:
        self._rows = {image: row for row, image in enumerate(images)}
        self._marks, self._hashes = marks, hashes
        if len(self._rows) < len(marks):
            kept = list(self._rows.values())
            self._rows = {image: row for row, image in enumerate(self._rows)}
            self._marks, self._hashes = marks[kept], hashes[kept]

    @classmethod
    def of(cls, entries: Mapping[str, tuple[Mark, bytes]]) -> "Contents":
        """From `{image: (mark, SHA-256)}`."""
        marks = np.array([mark for mark, _ in entries.values()], np.int64).reshape(-1, 2)
        hashes = np.frombuffer(b"".join(digest for _, digest in entries.values()), np.uint8).reshape(-1, 32)
        return cls(list(entries), marks, hashes)

    @classmethod
    def joined(cls, parts: Iterable["Contents"]) -> "Contents":
        """All of several."""
        parts = list(parts)
        marks = [np.zeros((0, 2), np.int64), *(part._marks for part in parts)]
        hashes = [np.zeros((0, 32), np.uint8), *(part._hashes for part in parts)]
        return cls([image for part in parts for image in part._rows], np.concatenate(marks), np.concatenate(hashes))

    @classmethod
    def open(cls, path: str | Path) -> "Contents":
        """What `save` wrote; nothing where the file is absent or damaged, since it only saves time."""
        try:
            with np.load(path) as arrays:
                names, marks, hashes = (arrays[name] for name in ("images", "marks", "hashes"))
            images = names.tobytes().decode().split("\0") if len(marks) else []
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return cls.of({})
        fits = marks.shape == (len(images), 2) and hashes.shape == (len(images), 32)
        return cls(images, marks, hashes) if fits else cls.of({})

    def save(self, path: str | Path) -> None:
        """Writes a `.npz` file, whole or not at all."""
        names = np.frombuffer("\0".join(self._rows).encode(), np.uint8)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=names, marks=self._marks, hashes=self._hashes)

    def __contains__(self, image: str) -> bool:
        return image in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def sha256(self, image: str) -> str:
        """Hex SHA-256 of an image file that was hashed."""
        return self._hashes[self._rows[image]].tobytes().hex()

    def known(self, image: str, mark: Mark) -> bytes | None:
        """The SHA-256 of an image file, None if it is not known, or not of a file of this size and time."""
        row = self._rows.get(image)
        if row is None or tuple(self._marks[row].tolist()) != mark:
            return None
        digest = self._hashes[row].tobytes()
        return None if digest == _NOT_HASHED else digest

    def digest(self, images: Iterable[str]) -> str:
        """Hex SHA-256 of what is in these images: their content where it was hashed, else their size."""
        total = hashlib.sha256()
        for image in images:
            row = self._rows[image]
            found = self._hashes[row].tobytes()
            total.update(image.encode() + b"\0")
            total.update(b"size %d" % self._marks[row, 0] if found == _NOT_HASHED else found)
        return total.hexdigest()


def survey(
    folder: str | Path, images: Iterable[str], hashed: Iterable[str] = (), known: Sequence[Contents] = ()
) -> Contents:
    """Looks at image files: the size of each, and the hash of those in `hashed`, read where none of `known` has it.

    Raises:
        VITaskError: naming an image that is not there or leaves the folder.
    """
    hashed = frozenset(hashed)
    entries = {}
    for image in images:
        path = inside(folder, image)
        mark = mark_of(path)
        digest = _NOT_HASHED
        if image in hashed:
            found = (contents.known(image, mark) for contents in known)
            digest = next((one for one in found if one is not None), None) or _read(path)
        entries[image] = (trusted(mark), digest)
    return Contents.of(entries)


def mark_of(path: Path) -> Mark:
    """Size and time of an image file.

    Raises:
        VITaskError: if it is not there.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise VITaskError(f"image {str(path)!r} cannot be read ({error.strerror}); check the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise VITaskError(f"image {str(path)!r} is no file; check the path")
    return found.st_size, found.st_mtime_ns


def trusted(mark: Mark) -> Mark:
    """The mark to remember beside a hash that is being taken now."""
    return (mark[0], _UNSURE) if time.time_ns() - mark[1] < _YOUNG else mark


def _read(path: Path) -> bytes:
    try:
        return bytes.fromhex(sha256_file(path))
    except OSError as error:
        raise VITaskError(f"image {str(path)!r} cannot be read ({error.strerror}); check it") from None
