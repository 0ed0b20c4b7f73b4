"""A document's images as the model sees them, and whether they are what those of training were.

Every image becomes RGB by the rule of `data.images`, once, for VLM and TSM alike.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from vitask_plugin.data.comparison import Seen, check_all
from vitask_plugin.data.images import frames, opened, reason, refuse_deep, say_once, to_rgb, truncated_refused
from vitask_plugin.data.medmnist import SIZES
from vitask_plugin.data.sizes import LOOKED_AT, measured, spread
from vitask_plugin.errors import VITaskError

# What PIL raises on damaged files.
_DAMAGED = (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


def read_document(data: Any, number: int, see: Callable[[Any], Any], task: str) -> tuple[Any, list[Image.Image]]:
    """A document and its images as RGB.

    Args:
        data: the documents. number: of this one. see: the task's `doc_to_visual`. task: its name, for messages.

    Raises:
        VITaskError: naming the document and, where it is known, the file: an image is damaged or has deep pixels, or
            what is to be seen is no image.
    """
    where = f"task {task!r}, document {number}"
    files = _files(data, number)
    named = "".join(f" {file['path']!r}" for file in files.values() if file["path"])
    with truncated_refused():
        try:
            document = data[number]
            watched = _Watched(document) if files else document
            visuals = see(watched) or []
            if not all(isinstance(visual, Image.Image) for visual in visuals):
                raise VITaskError(f"{where}: vitask_llava sees images only, not video or audio")
            for name in files.keys() & watched.read if files and visuals else ():
                _refuse_deep(files[name], where)
            return document, [_seen(visual, f"{where}, image{named}") for visual in visuals]
        except VITaskError:
            raise
        except _DAMAGED as error:
            raise VITaskError(
                f"{where}: its image{named} cannot be read ({reason(error)}); replace or remove it"
            ) from error


class _Watched(dict):
    """A document that keeps which columns are `read`: a depth map that nobody looks at may be deep."""

    def __init__(self, document: Any) -> None:
        super().__init__(document)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # with a method of its own, dict(document) and **document ask __getitem__

    def values(self) -> Any:
        return self._all().values()

    def items(self) -> Any:
        return self._all().items()

    def copy(self) -> dict[str, Any]:
        return self._all()

    def _all(self) -> dict[str, Any]:
        return {name: self[name] for name in self}


def _refuse_deep(file: dict[str, Any], where: str) -> None:
    """Of a picture that `datasets` or the task has loaded or converted, its file alone tells how deep it was."""
    name = file["path"] or "in memory"
    if file["bytes"] is None and not Path(name).is_file():
        return  # in an archive
    try:
        with opened(file["bytes"] or Path(name), name) as image:
            refuse_deep(image, name)
    except VITaskError as error:
        raise VITaskError(f"{where}: {error}") from None


def _seen(visual: Image.Image, name: str) -> Image.Image:
    if frames(visual) > 1:
        say_once(f"{name}: {frames(visual)} pages or frames, of which the first is seen")
    try:
        return to_rgb(visual)
    except VITaskError as error:
        raise VITaskError(f"{name}: {error}") from None


def _image_columns(data: Any) -> list[str]:
    features = getattr(data, "features", None) or {}
    return [name for name, feature in features.items() if isinstance(feature, datasets.Image)]


@lru_cache(maxsize=32)  # for a document alone it would take longer than all else that is done here
def _undecoded(data: Any) -> Any:
    """The documents, their images as {"bytes", "path"}, either of them None."""
    for name in _image_columns(data):
        data = data.cast_column(name, datasets.Image(decode=False))
    return data


def _files(data: Any, number: int) -> dict[str, dict[str, Any]]:
    """{column: {"bytes", "path"}} of a document's images."""
    names = _image_columns(data)
    row = _undecoded(data)[number] if names else {}
    return {name: row[name] for name in names if row[name]}


def check_images(data: Any, task: str, trained: Sequence[Seen]) -> None:
    """Refuses documents whose images have another size than those of training, or were prepared in another way.

    Args:
        data: the documents; a column `pixels` says in JSON what was done to the pixels. task: name of the lmms-eval
            task. trained: what checkpoint and TSM have seen.

    Raises:
        VITaskError: naming both sides.
    """
    names = _image_columns(data)
    if not names or "vitask" not in data.column_names:
        return
    looked_at = _undecoded(data).select(spread(len(data), LOOKED_AT))
    rows = [row for row in looked_at if row["vitask"] and row[names[0]]]
    images = [(row["vitask"]["task"], row[names[0]]) for row in rows]
    found = measured((own, image["bytes"] or Path(image["path"])) for own, image in images)
    told = {row["vitask"]["task"]: json.loads(row["pixels"]) for row in rows if row.get("pixels")}
    prepared = {own: entry | ({"pixels": told[own]} if own in told else {}) for own, entry in found.items()}
    choices = {row["vitask"]["task"]: row["vitask"]["choices"] for row in rows}
    used = Seen(f"task {task!r}", prepared, choices)
    anyway = "add image_size=any to --model_args if that is meant"
    for one in trained:
        if one.images is None:
            say_once(f"{one.who} on images of which no record is left, so nothing is compared with them", one.who)
    check_all(trained, used, anyway, partial(_remedy, task))


def _remedy(task: str, size: tuple[int, int]) -> str | None:
    medmnist = task.startswith("medmnist_") and size[0] == size[1] and size[0] in SIZES
    return f"set MEDMNIST_SIZE={size[0]}" if medmnist else None
