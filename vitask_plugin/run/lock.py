"""One run at a time in a folder, and SIGTERM as Ctrl-C."""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError

LOCK_FILE = ".lock"
WAIT_SECONDS = 60  # for a command of a killed run to end


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """The lock of a run's folder, as a file descriptor.

    Raises:
        VITaskError: another run has it, or what a killed one started does not end.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, out)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _take(handle: int, out: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            owner = os.pread(handle, 20, 0).decode() or "?"
            if owner.isdecimal() and not _runs(int(owner)) and time.monotonic() < deadline:
                time.sleep(0.2)  # its command is about to end too
                continue
            raise VITaskError(
                f"another `vitask run` (process {owner}) works in {str(out)!r}; wait for it, or choose another --out"
            ) from None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
