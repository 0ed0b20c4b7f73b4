"""A page as sections of tables, charts, matrices and pictures; written as one HTML file or as Markdown."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup
from PIL import Image

from vitask_plugin.files import atomic_path

MISSING = "\u2013"  # an en dash
# What every page holds near its beginning: the file may be replaced by a later one.
HTML_MARK = '<meta name="generator" content="vitask report">'
MARKDOWN_MARK = "<!-- vitask report -->"
_PICTURE_SIDE = 112  # pixels; larger pictures are scaled down


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place: `detail` stands below in small type, `paper` marks the paper's own."""

    text: str
    detail: str = ""
    paper: bool = False


@dataclass(frozen=True)
class Table:
    """`columns` and `rows` of cells (a plain text is a cell). The first `words` columns hold words, others numbers."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    words: int = 1


@dataclass(frozen=True)
class Chart:
    """An inline SVG (see `charts`)."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Confusion:
    """Counts [K][K + 1] of `metrics.confusion`, and the K class names."""

    kind: ClassVar[str] = "confusion"
    counts: Sequence[Sequence[int]]
    choices: Sequence[str]
    title: str = ""

    @property
    def columns(self) -> list[str]:
        return [*self.choices, "no label"]

    @property
    def rows(self) -> Iterator[tuple[str, list[tuple[int, float]]]]:
        """Per class its name and its (count, share of the class) cells."""
        for name, counts in zip(self.choices, self.counts, strict=True):
            total = max(sum(counts), 1)
            yield name, [(count, round(count / total, 3)) for count in counts]


@dataclass(frozen=True)
class Sample:
    """One image, its label, and {model: what it answered}; `name` says which image it is."""

    kind: ClassVar[str] = "sample"
    image: Image.Image
    label: str
    answers: Mapping[str, str]
    name: str = ""

    @property
    def url(self) -> str:
        buffer = io.BytesIO()
        picture = self.image.convert("RGB")
        picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        picture.save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Grid:
    """Small blocks side by side, as many as fit; none is narrower than `width` (in rem)."""

    kind: ClassVar[str] = "grid"
    items: Sequence[Table | Chart | Confusion | Sample]
    width: int = 22


@dataclass(frozen=True)
class Section:
    """Sentences, then blocks. `folded`: a reader opens it; its title is all that is seen before."""

    kind: ClassVar[str] = "section"
    title: str
    blocks: Sequence["Block"]
    notes: Sequence[str | Markup] = ()
    folded: bool = False


Block = Table | Chart | Confusion | Grid | Section


@dataclass(frozen=True)
class Page:
    """A title, sentences, sections."""

    title: str
    sections: Sequence[Section]
    notes: Sequence[str | Markup] = ()


def write_html(path: str | Path, page: Page) -> None:
    """One file that needs nothing else: no network, no script; readable on a phone, light or dark."""
    text = _template().render(page=page, generator=Markup(HTML_MARK))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = as_cell
    source = resources.files("vitask_plugin.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source)


def as_cell(value: str | Cell) -> Cell:
    """A plain text as a cell."""
    return value if isinstance(value, Cell) else Cell(value)


def cells(section: Section) -> Iterator[Cell]:
    """Every cell of the section's tables, also of those inside its grids and sections."""
    for block in section.blocks:
        if isinstance(block, Section):
            yield from cells(block)
        for item in block.items if isinstance(block, Grid) else [block]:
            if isinstance(item, Table):
                yield from (as_cell(cell) for row in (item.columns, *item.rows) for cell in row)


def write_markdown(path: str | Path, page: Page) -> None:
    """The page's sentences and tables, as GitHub renders them; charts, matrices and pictures are left out."""
    lines = [MARKDOWN_MARK, f"# {_plain(page.title)}", *_paragraphs(page.notes)]
    for section in page.sections:
        lines += _section(section, 2)
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _section(section: Section, level: int) -> list[str]:
    body: list[str] = []
    for block in section.blocks:
        if isinstance(block, Section):
            body += _section(block, level + 1)
        for item in block.items if isinstance(block, Grid) else [block]:
            if isinstance(item, Table):
                body += _table(item)
    # A section of charts alone has nothing to say here.
    return [f"{'#' * level} {_plain(section.title)}", *_paragraphs(section.notes), *body] if body else []


def _table(table: Table) -> list[str]:
    rows = [[_flat(as_cell(cell)) for cell in row] for row in (table.columns, *table.rows)]
    rule = ["---" if place < table.words else "---:" for place in range(len(table.columns))]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
    return [f"**{_plain(table.title)}**", text] if table.title else [text]


def _flat(cell: Cell) -> str:
    text = _plain(cell.text) + (f" ({_plain(cell.detail)})" if cell.detail else "")
    return f"*{text}*" if cell.paper and text.strip() else text


def _paragraphs(notes: Sequence[str | Markup]) -> list[str]:
    return [_plain(note.striptags() if isinstance(note, Markup) else note) for note in notes]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    for mark in "\\`*_[]<|":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
