"""The work folder of `study.py`: commands of the project in this process, and things that several runs need once."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from vitask_plugin import cli
from vitask_plugin.errors import VITaskError


def command(*words: object) -> None:
    """A command of `vitask`.

    Raises:
        VITaskError: it failed; it has said why.
    """
    status = cli.main([str(word) for word in words])
    if status:
        raise VITaskError(f"`vitask {' '.join(map(str, words))}` ended with status {status}")


@contextlib.contextmanager
def made_once(path: Path) -> Iterator[bool]:
    """Whether `path` has to be made, for as long as no other process may make it; who does, makes it whole at once."""
    if path.exists():
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield not path.exists()
    finally:
        os.close(handle)
