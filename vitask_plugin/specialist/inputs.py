"""Which images are meant: files, folders of files, or a table that names them."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitask_plugin.data.leftovers import is_leftover, is_text
from vitask_plugin.data.names import plain
from vitask_plugin.data.tables import Files
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.text import read_text


@dataclass(frozen=True)
class Input:
    """One image. `name`: what it was called."""

    name: str
    path: Path

    def stamp(self) -> list[int]:
        """Size in bytes and time of change in ns; other ones tell another file. Empty where there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return []
        return [status.st_size, status.st_mtime_ns]


def inputs_of(
    places: Sequence[str | Path], image_folder: str | Path | None = None, column: str = "image"
) -> list[Input]:
    """The images in the order of `places`, those of a folder by name.

    Args:
        places: image files (there or not), folders, of which all files below are taken but for notes and leftovers of
            other programs, and CSV files.
        image_folder: what a CSV's paths are relative to; None = its own folder. column: its column of images.

    Raises:
        VITaskError: a table without that column, an empty folder, or no image at all.
    """
    found = [one for place in map(Path, places) for one in _of(place, image_folder, column)]
    if not found:
        raise VITaskError("no image is given; give image files, folders, or a CSV with the column image")
    return found


def _of(place: Path, image_folder: str | Path | None, column: str) -> list[Input]:
    if place.suffix.lower() == ".csv":
        return list(_rows(place, Path(image_folder or place.parent), column))
    if not place.is_dir():
        return [Input(str(place), place)]
    files = sorted(path for path in place.rglob("*") if path.is_file() and _is_meant(path.relative_to(place)))
    if not files:
        raise VITaskError(f"folder {str(place)!r} holds no file that could be an image; check the path")
    return [Input(str(path), path) for path in files]


def _is_meant(relative: Path) -> bool:
    return not any(map(is_leftover, relative.parts)) and not is_text(relative)


def _rows(path: Path, folder: Path, column: str) -> Iterator[Input]:
    text, files = read_text(path, "table of images", "CSV file", "a table"), Files([folder])
    for delimiter in ",;\t":
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t")
        header = reader.fieldnames = [plain(name) for name in reader.fieldnames or []]
        if column in header:
            break
    else:
        raise VITaskError(
            f"{str(path)!r}: the header is {header}; expected a column {column!r}, or give --image-column"
        )
    for number, cells in enumerate(reader, start=2):
        name = (cells[column] or "").strip()
        if not name:
            raise VITaskError(f"{str(path)!r}, row {number}: no image; name its file")
        try:
            yield Input(name, files.find(name))
        except VITaskError as error:
            raise VITaskError(f"{str(path)!r}, row {number}: {error}") from None
