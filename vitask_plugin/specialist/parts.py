"""Predictions as they are made: a line each, kept until all are there, so that a run that was ended goes on.

Each process writes a file of its own. The folder is named after what the figures depend on (checkpoint, TSM,
settings), and a row after its image's file, so that rows of another run or image are never taken for these.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from vitask_plugin.files import digest_of, make_parent
from vitask_plugin.specialist.inputs import Input
from vitask_plugin.specialist.prediction import Prediction

_DIGITS = 16  # of the fingerprint, in the folder's name


class Parts:
    """Of one output file and one set of settings.

    Args:
        output: the file that is written at the end. settings: JSON; what the figures depend on.
    """

    def __init__(self, output: Path, settings: Any) -> None:
        self._output = output
        self.folder = output.with_name(f".{output.name}.{digest_of(settings)[:_DIGITS]}")

    def known(self) -> dict[str, Prediction]:
        """By `key`: what earlier runs have made. Images that could not be read then are tried again."""
        return {key: one for key, one in self._lines() if one.error is None}

    def all(self) -> dict[str, Prediction]:
        """By `key`, those that could not be read among them."""
        return {**dict(self._lines()), **self.known()}

    def _lines(self) -> Iterator[tuple[str, Prediction]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else it was being written when the run was ended
                    key, fields = json.loads(line)
                    yield key, Prediction(**fields)

    def writer(self, number: int) -> "Writer":
        """Of the process `number`."""
        make_parent(self.folder / "-")
        handle, _ = tempfile.mkstemp(".jsonl", f"{number}-", self.folder)
        return Writer(os.fdopen(handle, "w", encoding="utf-8"))

    def remove(self) -> None:
        """These rows, and those of other settings for the same output."""
        for folder in self._output.parent.glob(f".{self._output.name}.{'?' * _DIGITS}"):
            shutil.rmtree(folder, ignore_errors=True)


def key(image: Input) -> str:
    """Which file a row is of."""
    return digest_of([image.name, str(image.path.absolute()), image.stamp()])


class Writer:
    """A file that rows are written to, each at once."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, image: Input, prediction: Prediction) -> None:
        self._file.write(json.dumps([key(image), asdict(prediction)]) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def stamps(places: Sequence[str | Path | None], but: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of each file in the folders, or of a file itself; hidden ones, and `but`, left
    out.
    """
    found = []
    for place in (Path(place).absolute() for place in places if place):
        files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
        for path in files:
            if path.is_file() and not path.name.startswith(".") and path != but.absolute():
                status = path.stat()
                found.append((str(path), status.st_size, status.st_mtime_ns))
    return found
