"""JSON as RFC 8259 has it: a key that is there twice, NaN and a number beyond all bounds are refused by their place."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.shown import pointer, short
from vitask_plugin.formats.text import LARGEST, read_text

Pairs = list[tuple[str, Any]]


class _Fault:
    """In place of a value that JSON does not have, until its place is known."""

    def __init__(self, what: str) -> None:
        self.what = what


class Decoder(json.JSONDecoder):
    """Reads what is right as fast as `json` does; `check` says where the rest is.

    Attributes:
        faulty: whether a value that was read since the last `check` is none.
    """

    def __init__(self, *, finite: bool = True) -> None:
        """finite: NaN and infinity, which Python writes and JSON does not have, are refused."""
        self.faulty = False

        def collected(pairs: Pairs) -> Any:  # called for every object of a file: no method, nothing to look up
            found = dict(pairs)
            return found if len(found) == len(pairs) else self._twice([key for key, _ in pairs])

        more: dict[str, Any] = {"parse_constant": self._constant, "parse_float": self._float} if finite else {}
        super().__init__(object_pairs_hook=collected, **more)

    def _twice(self, keys: list[str]) -> Any:
        twice = next(key for key in keys if keys.count(key) > 1)
        return self._fault(f"has the key {short(twice)} twice; leave one of them out")

    def _constant(self, text: str) -> Any:
        return self._fault(f"is {text}, which JSON does not have; write a number, or null for none")

    def _float(self, text: str) -> Any:
        value = float(text)
        return value if math.isfinite(value) else self._fault(f"is {short(text)}, too large for a number; correct it")

    def _fault(self, what: str) -> _Fault:
        self.faulty = True
        return _Fault(what)

    def check(self, value: Any, where: str) -> None:
        """Refuses the value that was read last, if a part of it is none.

        Raises:
            VITaskError: `where`, the JSON pointer, and what is there.
        """
        if self.faulty:
            self.faulty = False
            place, fault = next(_faults(value, ()))
            raise VITaskError(f"{where}{pointer(place)} {fault.what}")


def _faults(value: Any, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], _Fault]]:
    if isinstance(value, _Fault):
        yield place, value
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _faults(part, (*place, key))


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        where: opens the sentence. finite: see `Decoder`.

    Raises:
        VITaskError: it is no JSON.
    """
    decoder = Decoder(finite=finite)
    value = guarded(lambda: decoder.decode(text), text, where)
    decoder.check(value, f"{where}: ")
    return value


def guarded(decode: Callable[[], Any], text: str, where: str) -> Any:
    """What `decode` makes of `text`; its own errors become one sentence."""
    try:
        return decode()
    except RecursionError:
        raise VITaskError(f"{where} is not readable JSON (it is nested too deep); write it again") from None
    except json.JSONDecodeError as error:
        raise VITaskError(f"{where} is not readable JSON ({error}); write it again") from None
    except ValueError:  # Python converts no whole number of more than some thousand digits
        long = max(re.finditer(r"\d+", text), key=lambda found: len(found[0]))
        line = text.count("\n", 0, long.start()) + 1
        raise VITaskError(
            f"{where} is not readable JSON (line {line} has a number of {len(long[0])} digits); write it again"
        ) from None


def read_json(path: str | Path, what: str, *, finite: bool = False, largest: int = LARGEST) -> Any:
    """The parsed JSON file `path`, with or without a byte-order mark; `what` names it in the error.

    Args:
        finite: see `Decoder`; Python programs write NaN into logs and results, so they may by default.
        largest: bytes that it may have.

    Raises:
        VITaskError: if the file is none that can be read, or is not JSON in UTF-8.
    """
    text = read_text(path, what, "JSON file", "readable JSON", largest)
    return parse_json(text, f"{what} {str(path)!r}", finite=finite)
