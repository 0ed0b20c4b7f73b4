"""How a value from a file is shown in a sentence: cut off where it is long, its place as a JSON pointer."""

import reprlib
from collections.abc import Sequence
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 80, 80, 40
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 6
_REPR.maxdict, _REPR.maxlevel = 4, 3


def short(value: Any) -> str:
    """`repr`, of a long value its ends. A number of thousands of digits, which Python does not convert, is named."""
    try:
        return _REPR.repr(value)
    except ValueError:
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def pointer(place: Sequence[str | int]) -> str:
    """The JSON pointer (RFC 6901) of a place; "the whole" of the root, which has an empty one."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in place]
    return "".join(f"/{part if part.isprintable() else repr(part)[1:-1]}" for part in parts)[:200] or "the whole"
