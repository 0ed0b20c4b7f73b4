"""A JSON list item by item: a million samples are never all in memory as they stand in the file."""

import gc
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, read_json, read_text

_OPEN = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_END = re.compile(r"[ \t\n\r]*\][ \t\n\r]*")


def items(path: str | Path) -> Iterator[Any]:
    """The items of a JSON list one by one, so that what they have in common can be dropped as they come.

    Raises:
        VITaskError: if the file is absent or not a JSON list.
    """
    text = read_text(path, "data file", "JSON file", "readable JSON")
    decode, count, place = json.JSONDecoder().raw_decode, 0, _OPEN.match(text)
    while place is not None:
        try:
            item, end = decode(text, place.end())
        except (ValueError, RecursionError):
            break
        yield item
        count += 1
        place = _NEXT.match(text, end)
        if place is None and _END.fullmatch(text, end):
            return
    lines = text.split("\n", 2)[:2]
    if count == 0 and len(lines) > 1 and all(map(_is_object, lines)):
        raise VITaskError(
            f"data file {str(path)!r} has one sample in each line (JSON Lines); write all of them as one list, [...]"
        )
    whole = read_json(path, "data file")  # says what is wrong, if something is
    if not isinstance(whole, list):
        raise VITaskError(f"data file {str(path)!r} is not LLaVA's JSON; expected a non-empty list of samples")
    yield from whole[count:]


def write_items(path: str | Path, items: Iterable[Any]) -> None:
    """The items as one JSON list in UTF-8, each in a line of its own; whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, item in enumerate(items):
            file.write((",\n" if number else "[\n") + json.dumps(item, ensure_ascii=False))
        file.write("\n]\n")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def without_collector() -> Iterator[None]:
    """Parsing makes millions of objects and no circle; looking for some all the while takes most of its time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
