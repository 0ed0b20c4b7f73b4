"""A table of labelled images as rows: one's own CSV file, or the metadata that were published with a data set.

Which column holds what is given by name; all others are ignored.
"""

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitask_plugin.data.class_names import NO_FINDING
from vitask_plugin.data.names import look, plain, shown
from vitask_plugin.data.rows import SPLIT_NAMES, GroupPattern, Row, group_key, is_missing, natural
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside
from vitask_plugin.formats.text import read_text

logger = logging.getLogger(__name__)
SPLIT = "split"
_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif", ".tiff", ".bmp", ".JPG", ".PNG", ".JPEG", ".TIF", ".TIFF", ".BMP")
_BETWEEN_LABELS = re.compile(r"[;|]")
SHOWN_ROWS = 3  # without a label, in the message
# Columns whose equal cells mean that images belong together.
_GROUP_LIKE = re.compile(
    r"(patient|subject|lesion|slide|case|study|participant|person|individual|mrn|pid)"
    r"([ _-]?(id|no|nr|number|name|code))?"
)


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what.

    Attributes:
        image, label: names of columns that must be there.
        split: column of the split; None = a column `split`, if there is one.
        group: column of what images share (patient, lesion, slide); None = none.
        suffix: what a file's name has and its cell lacks (".jpg").
        pattern: finds the group in the image's name instead.
    """

    image: str = "image"
    label: str = "label"
    split: str | None = None
    group: str | None = None
    suffix: str = ""
    pattern: GroupPattern | None = None

    def __post_init__(self) -> None:
        if self.group is not None and self.pattern is not None:
            raise VITaskError("--group and --group-pattern both say what images share; give one of them")


class Table:
    """A CSV file whose rows are labelled images.

    Attributes:
        rows: its images. classes: class names in order of the alphabet.
    """

    def __init__(
        self,
        path: Path,
        image_folders: Sequence[Path],
        *,
        multi_label: bool,
        columns: Columns | None = None,
        choices: Sequence[str] = (),
    ) -> None:
        """Reads all rows.

        Args:
            image_folders: what the images' paths are relative to; each image is in one of them.
            multi_label: class names of a cell are separated by ";", or by "|" in a table without a ";", and an empty
                cell or "no finding" means that none applies.
            choices: class names that were given; only among these can "none", "NA" and the like be one, and a cell
                that is one of them is not split.

        Raises:
            VITaskError: naming file and row.
        """
        self.path, self._columns, self._multi_label = path, columns or Columns(), multi_label
        self._files = Files(image_folders)
        self._choices = {look(natural(name)) for name in choices}
        self._unlabelled: list[str] = []
        self._shared: tuple[str, list[str]] | None = None  # a column that nobody asked for, and its cells
        try:
            reader = self._reader(read_text(path, "table", "CSV file", "a CSV file"))
            read = [(reader.line_num, cells) for cells in reader]
            self._separator = self._found_separator(cells.get(self._columns.label) or "" for _, cells in read)
            self.rows = [self._row(line, cells) for line, cells in read]
        except csv.Error as error:
            raise VITaskError(f"{str(path)!r} is not a CSV file in UTF-8 ({error}); save it as one") from None
        if not self.rows:
            raise VITaskError(f"{str(path)!r} has a header and no rows; add one row per image")
        self._check_labelled()
        self._check_single()
        self._name_shared()
        first: dict[str, Row] = {}
        for row in self.rows:
            if first.setdefault(os.path.realpath(row.path), row) is not row:
                other = first[os.path.realpath(row.path)]
                raise VITaskError(f"{row.name} is the same file as {other.name}; list each image once")
        self.classes = sorted({label for row in self.rows for label in row.labels})

    def _reader(self, text: str) -> "csv.DictReader[str]":
        """Of commas, semicolons or tabs: whichever the header is written with."""
        for delimiter in ",;\t":
            lines = io.StringIO(text, newline="")
            reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
            header = [plain(name) for name in reader.fieldnames or []]
            if {self._columns.image, self._columns.label} <= set(header):
                reader.fieldnames = header
                self._check_header(header)
                return reader
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        self._refuse_header([plain(name) for name in reader.fieldnames or []])

    def _check_header(self, header: list[str]) -> None:
        columns = self._columns
        self._split = columns.split or (SPLIT if SPLIT in header else None)
        used = [columns.image, columns.label, self._split, columns.group]
        for name in filter(None, used):
            if name not in header:
                self._refuse_header(header)
            if header.count(name) > 1:
                raise VITaskError(f"{str(self.path)!r}: the header has {header.count(name)} columns {name!r}; keep one")
        like = [name for name in header if _GROUP_LIKE.fullmatch(name.casefold()) and name not in used]
        if like and columns.group is None and columns.pattern is None:
            self._shared = (like[0], [])

    def _name_shared(self) -> None:
        if self._shared is None:
            return
        column, cells = self._shared
        cells = [group_key(cell) for cell in cells if not is_missing(cell)]
        if len(set(cells)) < len(cells):
            logger.warning(
                "the %d images of %r have %d different cells in the column %r: where images that share one get into "
                "two splits, the test is easier than it should be; --group %s keeps them together",
                *(len(self.rows), str(self.path), len(set(cells)), column, column),
            )

    def _check_labelled(self) -> None:
        """Refuses rows whose label is missing: a class of that name would be learnt and scored."""
        if not self._unlabelled:
            return
        more = ", ..." if len(self._unlabelled) > SHOWN_ROWS else ""
        empty = "leave the cell empty where no class applies, and" if self._multi_label else "name their classes, or"
        raise VITaskError(
            f"{str(self.path)!r}: {len(self._unlabelled)} of {len(self.rows)} rows have no label: "
            f"{', '.join(self._unlabelled[:SHOWN_ROWS])}{more}; {empty} take out rows whose class is not known; where "
            "such a cell is the name of a class, list all classes with --labels"
        )

    def _check_single(self) -> None:
        """Refuses cells that name several classes where one was asked for: "a|b" would be a class beside a and b."""
        names = set() if self._multi_label else {label for row in self.rows for label in row.labels}
        for row in self.rows if names else ():
            parts = [natural(part) for part in _BETWEEN_LABELS.split(row.labels[0])]
            if len(parts) > 1 and not self._is_choice(row.labels[0]) and names.issuperset(parts):
                raise VITaskError(
                    f"{row.name}: label {row.labels[0]!r} names {len(parts)} classes of other rows; read the table "
                    "with --multi-label, or take out rows of several classes"
                )

    def _refuse_header(self, header: list[str]) -> None:
        columns = self._columns
        wanted = {
            "--image-column": columns.image,
            "--label-column": columns.label,
            "--split-column": columns.split,
            "--group": columns.group,
        }
        missing = [flag for flag, name in wanted.items() if name is not None and name not in header]
        expected = (
            "image,label or image,label,split"
            if (columns.image, columns.label) == ("image", "label")
            and set(missing) <= {"--image-column", "--label-column"}
            else ", ".join(repr(wanted[flag]) for flag in missing)
        )
        one_for_each = "; where each class has a column of its own, write their names into one"
        raise VITaskError(
            f"{str(self.path)!r}: the header is {header}; expected {expected} (other columns are ignored), or name the "
            f"right column with {' and '.join(missing)}{one_for_each if '--label-column' in missing else ''}"
        )

    def _row(self, line: int, cells: Mapping[str, str | None]) -> Row:
        where = f"{str(self.path)!r}, row {line}"
        if None in cells or None in cells.values():
            raise VITaskError(f"{where}: has more or fewer cells than the header; quote cells that hold a comma")
        columns = self._columns
        if self._shared is not None:
            self._shared[1].append(cells[self._shared[0]])
        image, label = cells[columns.image].strip(), cells[columns.label]
        if not image:
            raise VITaskError(f"{where}: no image; name its file")
        name = f"{where} ({image!r})"
        parts = label.split(self._separator) if self._multi_label and not self._is_choice(label) else [label]
        labels = tuple(natural(part) for part in parts if natural(part))
        if self._multi_label and len(labels) == 1 and look(labels[0]) == NO_FINDING:
            labels = ()
        if any(map(self._says_nothing, labels)) or not (labels or self._multi_label):
            self._unlabelled.append(f"row {line} ({image!r}, {label!r})")
        if len(set(labels)) != len(labels):
            raise VITaskError(f"{name}: names a class twice")
        split = plain(cells[self._split]).lower() if self._split else None
        if split is not None and split not in SPLIT_NAMES:
            raise VITaskError(f"{name}: split {cells[self._split]!r} is unknown; expected train, val or test")
        try:
            file = self._files.find(image, columns.suffix)
        except VITaskError as error:
            raise VITaskError(f"{where}: {error}") from None
        split = None if split is None else SPLIT_NAMES[split]
        return Row(name, file, labels, split, self._group(image, cells), image)

    def _says_nothing(self, label: str) -> bool:
        return is_missing(label) and look(label) not in self._choices

    def _is_choice(self, cell: str) -> bool:
        return look(natural(cell)) in self._choices

    def _found_separator(self, cells: Iterable[str]) -> str:
        """One for all cells: where it is ";", a "|" is part of a name."""
        return ";" if any(";" in cell and not self._is_choice(cell) for cell in cells) else "|"

    def _group(self, image: str, cells: Mapping[str, str | None]) -> str | None:
        if self._columns.pattern is not None:
            return self._columns.pattern.find(image)
        if self._columns.group is None:
            return None
        group = plain(cells[self._columns.group] or "")
        return None if is_missing(group) else group


class Files:
    """Image files below one or several folders, by the names that a table has for them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str, suffix: str = "") -> Path:
        """The file of a name. A name that differs from the file's in nothing that can be seen is that file's.

        Where there is none, the path where it should be, for the error of whoever reads it.

        Raises:
            VITaskError: the name leaves the folder, is in two folders, or is that of a file in another letter case.
        """
        names = [name] if not suffix or name.endswith(suffix) else [name + suffix, name]
        names += [each.replace("\\", "/") for each in names if "\\" in each]
        expected = [[inside(folder, each) for each in names] for folder in self._folders]
        found = [path for paths in expected for path in paths[:1] if path.is_file()]
        found = found or [path for paths in expected for path in paths[1:] if path.is_file()]
        found = found or list(filter(None, (self._alike(path) for paths in expected for path in paths)))
        if len(found) > 1:
            raise VITaskError(f"image {name!r} is in two folders, {str(found[0])!r} and {str(found[1])!r}; keep one")
        if not found and not suffix:
            self._suggest_suffix(name)
        return found[0] if found else expected[0][0]

    def _suggest_suffix(self, name: str) -> None:
        for suffix in _SUFFIXES:
            if any(inside(folder, name + suffix).is_file() for folder in self._folders):
                raise VITaskError(
                    f"there is no image {name!r}, but {name + suffix!r}; go on with --image-suffix {suffix}"
                )

    def _alike(self, path: Path) -> Path | None:
        """An existing file whose path looks as `path` does, None where there is none."""
        for place in (*reversed(path.parents), path):
            if place.exists():
                continue
            alike = self._listing(place.parent).get(look(place.name), [])
            same = [entry for entry in alike if plain(entry.name) == plain(place.name)]
            if len(same) == 1:
                return self._alike(same[0] / path.relative_to(place)) if place != path else same[0]
            if alike:
                raise VITaskError(
                    f"there is no image {shown(place.name)} in {str(place.parent)!r}, but {shown(alike[0].name)}; "
                    "write the name as the file's"
                )
            return None
        return path if path.is_file() else None

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listed:
            listing: dict[str, list[Path]] = {}
            for entry in folder.iterdir() if folder.is_dir() else ():
                listing.setdefault(look(entry.name), []).append(entry)
            self._listed[folder] = listing
        return self._listed[folder]
