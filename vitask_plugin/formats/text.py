"""The text of a file in UTF-8, whatever lies at its path: nothing is waited for, and every misfit is one sentence."""

import codecs
import os
import stat
from pathlib import Path

from vitask_plugin.errors import VITaskError

LARGEST = 1 << 36  # bytes of a data file; what is declared to be a record is smaller, see `schema`
# The first two bytes of UTF-32's mark are UTF-16's.
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_text(path: str | Path, what: str, file: str, kind: str, largest: int = LARGEST) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Args:
        what: names the file in an error. file: "JSON file". kind: what its text should be, "readable JSON".
        largest: bytes that such a file may have.

    Raises:
        VITaskError: if the file is missing, a folder, a pipe, a device, unreadable or too large, or is in another
            encoding, which is named if its byte-order mark tells it.
    """
    data = _read_bytes(path, what, file, largest)
    for mark, encoding in _OTHER_ENCODINGS:
        if data.startswith(mark):
            raise VITaskError(f"{what} {str(path)!r} is in {encoding}, by its byte-order mark; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VITaskError(f"{what} {str(path)!r} is not {kind} in UTF-8 ({error}); save it as one") from None


def _read_bytes(path: str | Path, what: str, file: str, largest: int) -> bytes:
    named = f"{what} {str(path)!r}"
    try:
        # A pipe that nobody writes into would be waited for, on opening it and on reading from it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            status = os.fstat(opened.fileno())
            other = next((name for is_one, name in _KINDS if is_one(status.st_mode)), None)
            if other is not None:
                raise VITaskError(f"{named} is {other}; write its content into a {file} and give that")
            if status.st_size > largest:
                raise VITaskError(
                    f"{named} has {status.st_size:,} bytes, and such a file has {largest:,} at most; check the path"
                )
            return opened.read()
    except VITaskError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise VITaskError(f"{named} does not exist; check the path") from None
    except IsADirectoryError:
        raise VITaskError(f"{named} is a folder; give the {file} in it") from None
    except MemoryError:
        raise VITaskError(f"{named} is larger than the memory; split it, or use a larger machine") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VITaskError(f"{named} cannot be read ({reason}); check the path") from None
