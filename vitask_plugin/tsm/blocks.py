"""Rows of an array on the disk whose content is known: a block of them is hashed the first time that one is read.

Opening reads nothing, and whoever reads all rows has read the file twice at most, the second time from memory.

Shapes: I = rows, N = blocks.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitask_plugin.errors import VITaskError

BLOCK_BYTES = 1 << 22


def rows_of_block(array: np.ndarray) -> int:
    """How many rows have about `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // max(1, array[:1].nbytes))


def digests(array: np.ndarray, rows: int) -> list[str]:
    """Hex SHA-256 of every `rows` rows, [N]."""
    return [_digest(array[first : first + rows]) for first in range(0, len(array), rows)]


def _digest(block: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(block).data).hexdigest()


class Blocks:
    """The rows of an `.npy` file, each checked before it is given out.

    Args:
        dtype, rank: that the array has to have.
        rows: of a block.
        known: hex SHA-256 of each block; None = not recorded, as of an early store.

    Raises:
        VITaskError: the file is absent, damaged or another array.
    """

    def __init__(self, path: Path, dtype: str, rank: int, rows: int | None, known: Sequence[str] | None) -> None:
        self.path = path
        try:
            self.array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise VITaskError(f"{self._named} are missing or damaged ({error}); {_AGAIN}") from None
        if self.array.dtype != dtype or self.array.ndim != rank or 0 in self.array.shape:
            raise VITaskError(
                f"{self._named} are {self.array.dtype} of shape {list(self.array.shape)}; expected {dtype} with {rank} "
                f"dimensions, none of them 0; {_AGAIN}"
            )
        self._rows = rows or rows_of_block(self.array)
        self._known = known
        count = -(-len(self.array) // self._rows)
        if known is not None and len(known) != count:
            raise VITaskError(f"{self._named} have {count} blocks, and the index tells of {len(known)}; {_AGAIN}")
        self._checked = np.zeros(count, bool)

    @property
    def _named(self) -> str:
        return f"features {str(self.path)!r}"

    def row(self, number: int) -> np.ndarray:
        """Row `number`, a view of the file.

        Raises:
            VITaskError: its block is not what was written, or holds NaN or infinity.
        """
        block = number // self._rows
        if not self._checked[block]:
            self._check(block)
        return self.array[number]

    def _check(self, block: int) -> None:
        rows = self.array[block * self._rows : (block + 1) * self._rows]
        where = f"{self._named}, rows {block * self._rows} to {block * self._rows + len(rows) - 1},"
        if self._known is not None and _digest(rows) != self._known[block]:
            raise VITaskError(f"{where} are not what was extracted, the file has changed; {_AGAIN}")
        if not np.isfinite(rows).all():
            raise VITaskError(f"{where} hold NaN or infinity; {_AGAIN}")
        self._checked[block] = True


_AGAIN = "run `vitask tsm extract` again"
