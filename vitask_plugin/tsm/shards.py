"""Features on their way to the disk: finished parts are files, kept until all are there, so that a killed extraction
goes on with what it has, and several processes share one.

A part is a run of batches, the same whoever computes it. Beside the output lies a hidden folder of the plan: one file
of rows and one of image contents per part, and the arrays that the rows are moved into. A part's rows count while its
images are what they were.

Shapes: I = images, E = tokens per image, F = width of a token, K_all = columns of the TSM's head.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitask_plugin.data.contents import Contents, survey
from vitask_plugin.files import atomic_path, digest_of, replace_directory, write_json
from vitask_plugin.tsm.blocks import digests, rows_of_block
from vitask_plugin.tsm.index_format import FORMAT

INDEX_FILE = "index.json"
FEATURES_FILE = "features.npy"
LOGITS_FILE = "logits.npy"
CONTENTS_FILE = "contents.npz"
PARTS = "parts"
OUTPUT_FILES = (INDEX_FILE, FEATURES_FILE, LOGITS_FILE, CONTENTS_FILE, PARTS)
BATCHES = 4  # of a part: what a killed extraction loses at most, for each process


@dataclass(frozen=True)
class Plan:
    """What is extracted, into which arrays, in which parts.

    Attributes:
        output: folder to write.
        images: I paths, in the order of the rows.
        tsm: hash of the TSM. tokens: `cls` or `all`. dtype: of the features, float32 or float16.
        shape: (E, F, K_all).
        batch_size: images per forward; another one is another plan, since it may change a last bit.
    """

    output: Path
    images: Sequence[str]
    tsm: str
    tokens: str
    dtype: str
    shape: tuple[int, int, int]
    batch_size: int

    @property
    def directory(self) -> Path:
        """The hidden folder beside the output."""
        key = digest_of([list(self.images), self.tsm, self.tokens, self.dtype, self.batch_size])
        return self.output.parent / f".{self.output.name}.{key[:16]}.unfinished"

    @property
    def count(self) -> int:
        """How many parts there are."""
        return -(-len(self.images) // (self.batch_size * BATCHES))

    @property
    def bytes(self) -> int:
        """Of the finished arrays."""
        tokens, width, classes = self.shape
        return len(self.images) * (tokens * width * np.dtype(self.dtype).itemsize + 4 * classes)

    def rows(self, number: int) -> range:
        """The rows of a part."""
        size = self.batch_size * BATCHES
        return range(number * size, min((number + 1) * size, len(self.images)))


class Parts:
    """The files of a plan. Several processes may write parts at once; one of them finishes."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.directory = plan, plan.directory
        self._arrays = {
            FEATURES_FILE: (plan.dtype, (len(plan.images), *plan.shape[:2])),
            LOGITS_FILE: ("float32", (len(plan.images), plan.shape[2])),
        }

    def _file(self, number: int, what: str) -> Path:
        return self.directory / PARTS / f"{number:06d}-{what}.npz"

    def is_there(self, number: int) -> bool:
        """Whether the rows of a part are in its own file or in the arrays already."""
        merged = all((self.directory / name).is_file() for name in self._arrays)
        return self._file(number, "contents").is_file() and (merged or self._file(number, "rows").is_file())

    def is_current(self, number: int, folder: str | Path) -> bool:
        """Whether a part is there, and its images are what they were."""
        if not self.is_there(number):
            return False
        images = [self.plan.images[row] for row in self.plan.rows(number)]
        before = Contents.open(self._file(number, "contents"))
        if not all(image in before for image in images):
            return False
        now = survey(folder, images, images, [before])
        return all(now.sha256(image) == before.sha256(image) for image in images)

    def keep(self, number: int, features: np.ndarray, logits: np.ndarray, contents: Contents) -> None:
        """Writes a finished part: features [rows, E, F], logits [rows, K_all]."""
        (self.directory / PARTS).mkdir(parents=True, exist_ok=True)
        self._file(number, "contents").unlink(missing_ok=True)
        with atomic_path(self._file(number, "rows")) as temporary, temporary.open("wb") as file:
            np.savez(file, features=features, logits=logits)
        contents.save(self._file(number, "contents"))

    def used(self) -> int:
        """Bytes that the parts take on the disk."""
        return sum(path.stat().st_blocks * 512 for path in self.directory.rglob("*") if path.is_file())

    def finish(self) -> None:
        """Moves all parts into the arrays, and makes the folder the output."""
        self._merge()
        contents = Contents.joined(Contents.open(self._file(number, "contents")) for number in range(self.plan.count))
        contents.save(self.directory / CONTENTS_FILE)
        images = {image: [row, contents.sha256(image)] for row, image in enumerate(self.plan.images)}
        index: dict[str, Any] = {
            "format": FORMAT,
            "tsm": self.plan.tsm,
            "tokens": self.plan.tokens,
            "dtype": self.plan.dtype,
        }
        for name, file in (("features", FEATURES_FILE), ("logits", LOGITS_FILE)):
            array = np.load(self.directory / file, mmap_mode="r")
            rows = rows_of_block(array)
            index[name] = {"rows": rows, "sha256": digests(array, rows)}
        write_json(self.directory / INDEX_FILE, index | {"images": images})
        replace_directory(self.directory, self.plan.output)
        shutil.rmtree(self.plan.output / PARTS)
        for stale in self.plan.output.parent.glob(f".{self.plan.output.name}.*.unfinished"):
            shutil.rmtree(stale, ignore_errors=True)

    def _merge(self) -> None:
        for name, (dtype, shape) in self._arrays.items():
            if not (self.directory / name).is_file():
                _make_array(self.directory / name, dtype, shape)
        for number in range(self.plan.count):
            part = self._file(number, "rows")
            if not part.is_file():
                continue  # moved before a kill
            with np.load(part) as arrays:
                for name, key in ((FEATURES_FILE, "features"), (LOGITS_FILE, "logits")):
                    _write_rows(self.directory / name, self.plan.rows(number).start, arrays[key])
            part.unlink()

    def drop_if_empty(self) -> None:
        """Removes the folder if no part was finished."""
        if not any(self.is_there(number) for number in range(self.plan.count)):
            with contextlib.suppress(OSError):
                (self.directory / PARTS).rmdir()
            with contextlib.suppress(OSError):
                self.directory.rmdir()


# A map of the file would end the process with SIGBUS where the disk is full; writing raises an error that has a name.


def _make_array(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """An `.npy` file of zeros that takes no room yet."""
    header: dict[str, Any] = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)


def _write_rows(path: Path, first: int, rows: np.ndarray) -> None:
    """Rows of an `.npy` file from row `first` on, on the disk when it returns."""
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(file.tell() + first * rows[0].nbytes)
        file.write(np.ascontiguousarray(rows).data)
        file.flush()
        os.fsync(file.fileno())
