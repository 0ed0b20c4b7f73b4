"""A JSON list item by item: a million samples are never all in memory as they stand in the file."""

import contextlib
import gc
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path
from vitask_plugin.formats.json_text import Decoder, guarded
from vitask_plugin.formats.text import read_text

_OPEN = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_END = re.compile(r"[ \t\n\r]*\][ \t\n\r]*")


def items(path: str | Path) -> Iterator[Any]:
    """The items of a JSON list one by one, so that what they have in common can be dropped as they come.

    Raises:
        VITaskError: if the file is absent, not a JSON list, or an item is none (see `json_text.Decoder`).
    """
    text = read_text(path, "data file", "JSON file", "readable JSON")
    where, decoder = f"data file {str(path)!r}", Decoder()
    decode, count, place = decoder.scan_once, 0, _OPEN.match(text)
    while place is not None:
        try:
            item, end = decode(text, place.end())
        except (ValueError, StopIteration, RecursionError):
            break
        if decoder.faulty:
            decoder.check(item, f"{where}, sample {count}: ")
        yield item
        count += 1
        place = _NEXT.match(text, end)
        if place is None and _END.fullmatch(text, end):
            return
    _refuse(text, where, count)


def _refuse(text: str, where: str, count: int) -> None:
    """Says what is wrong with a text that is no JSON list after `count` items."""
    lines = text.split("\n", 2)[:2]
    if count == 0 and len(lines) > 1 and all(map(_is_object, lines)):
        raise VITaskError(f"{where} has one sample in each line (JSON Lines); write all of them as one list, [...]")
    whole = guarded(lambda: json.loads(text), text, where)
    if whole != []:
        raise VITaskError(f"{where} is not LLaVA's JSON; expected a non-empty list of samples")


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


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Parsing makes millions of objects and no circle; looking for some all the while takes most of its time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
