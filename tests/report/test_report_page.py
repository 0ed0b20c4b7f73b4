"""The page: whole, self-contained, escaped; and what of it is Markdown."""

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from PIL import Image

from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome
from vitask_plugin.report import Confusion, Sample, charts, loss_curves, write_report
from vitask_plugin.report.page import Cell, Chart, Grid, Page, Section, Table, write_html, write_markdown


class Reader(HTMLParser):
    """What a page refers to, which tags are left open, its table cells and its headings."""

    VOID = frozenset(["meta", "img", "path", "use", "rect", "link"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.identifiers: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.identifiers += [value or "" for name, value in attributes if name == "id"]
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def check_self_contained(text: str) -> Reader:
    """Nothing is loaded from elsewhere: no script, no style sheet, no font; pictures are in the page."""
    page = Reader(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(http" not in text and "@import" not in text
    linked = [value for value in page.references if not value.startswith("https://arxiv.org/abs/")]
    assert all(re.match(r"#|data:image/png;base64,", value) for value in linked)
    assert all(value[1:] in page.identifiers for value in linked if value.startswith("#"))
    return page


def test_a_training_run_on_one_page(tmp_path: Path) -> None:
    choices = ["no grain", "a & b"]
    rows = [
        {"model": "tsm", "ep": False, "accuracy": 0.91234, "auc": None, "n": 3},
        {"model": "<script>x</script>", "ep": True, "accuracy": 1.0, "auc": 0.5, "n": 3},
    ]
    outcomes = [Outcome(0, 0), Outcome(0, 1), Outcome(1, None)]
    path = tmp_path / "report.html"
    arguments: dict[str, Any] = {
        "title": "Two < three",
        "rows": rows,
        "curves": {"stage 1": {"total": [(1, 3.0), (2, 2.0)], "EP": [(1, 1.0), (2, 0.5)]}, "none": {}},
        "confusions": [Confusion(metrics.confusion(outcomes, 2), choices, "VITask")],
        "samples": [Sample(Image.new("L", (28, 28), 90), "a & b", {"vanilla": "<b>bold</b>", "VITask": "a & b."})],
        "notes": ["Seed 0."],
    }
    write_report(path, **arguments)
    text = path.read_text()
    page = check_self_contained(text)
    figures = ["tsm", "no", "0.912", "n/a", "3", "<script>x</script>", "yes", "1.000", "0.500", "3"]
    assert page.cells == [*figures, *list("110001")]
    assert page.tags.count("svg") == 1
    assert page.tags.count("b") == 1  # the label is bold, the answer is not
    assert sum(value.startswith("data:") for value in page.references) == 1
    write_report(tmp_path / "again.html", **arguments)
    assert (tmp_path / "again.html").read_text() == text


def test_a_page_of_nothing_but_a_table(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="t", rows=[{"a": 1}], curves={}, confusions=[], samples=[])
    page = check_self_contained((tmp_path / "r.html").read_text())
    assert page.cells == ["1"]
    assert "svg" not in page.tags


def test_curves_by_term_from_a_log() -> None:
    log = [
        {"step": 1, "loss": 3.0, "loss_rda": 0.5, "learning_rate": 1e-3},
        {"step": 2, "loss": 2.0, "loss_rda": 0.25},
        {"step": 2, "train_runtime": 1.0},
    ]
    assert loss_curves(log) == {"total": [(1, 3.0), (2, 2.0)], "RDA": [(1, 0.5), (2, 0.25)]}


def a_page() -> Page:
    rows = [["a|b", "x", Cell("0.5", "0.4-0.6", paper=True)]]
    table = Table(["data", "run", Cell("VITask", "paper", paper=True)], rows, words=2)
    figure = Chart("f", charts.loss_curves({"total": [(1, 1.0)]}), "caption")
    folded = Section("inner", [Table(["c"], [["1"]], "titled")], ["<i>"], folded=True)
    sections = [Section(f"s{number}", [table, Grid([figure]), folded]) for number in range(5)]
    return Page("A <page>", sections, [Markup('see <a href="https://arxiv.org/abs/1">this</a>')])


def test_sections_fold_and_are_linked(tmp_path: Path) -> None:
    write_html(tmp_path / "p.html", a_page())
    page = check_self_contained((tmp_path / "p.html").read_text())
    assert page.tags.count("details") == 5 and page.tags.count("nav") == 1
    links = [value for value in page.references if value.startswith("#section")]
    assert links == [f"#section-{number}" for number in range(1, 6)]
    assert page.cells[:2] == ["a|b", "x"]


def test_markdown_holds_tables_and_sentences(tmp_path: Path) -> None:
    page = a_page()
    only = Section("figures alone", [Grid([])])
    write_markdown(tmp_path / "p.md", Page(page.title, [page.sections[0], only], page.notes))
    assert (tmp_path / "p.md").read_text().splitlines() == [
        "<!-- vitask report -->",
        "",
        "# A \\<page>",
        "",
        "see this",
        "",
        "## s0",
        "",
        "| data | run | *VITask (paper)* |",
        "| --- | --- | ---: |",
        "| a\\|b | x | *0.5 (0.4-0.6)* |",
        "",
        "### inner",
        "",
        "\\<i>",
        "",
        "**titled**",
        "",
        "| c |",
        "| --- |",
        "| 1 |",
    ]


@pytest.mark.parametrize("colour", ["#010203", "#010204", "#010205"])
def test_figures_take_the_colours_of_the_page(colour: str) -> None:
    svg = charts.reliability([0.2, 0.8], [0.3, 0.9], [3, 5]) + charts.densities([0, 1, 2], [0, 1, 0], [1, 0, 0], (0, 2))
    assert colour not in svg
    assert {"currentColor", "var(--one)", "var(--two)"} <= set(re.findall(r"currentColor|var\(--\w+\)", svg))


def test_a_long_answer_is_cut_and_there_in_whole(tmp_path: Path) -> None:
    babble, short = "edge <i> of " * 40, "fits in " * 13
    grid = Grid([Sample(Image.new("L", (28, 28)), "a", {"untuned": babble, "tuned": short})])
    write_html(tmp_path / "page.html", Page("Report", [Section("Errors", [grid])]))
    text = (tmp_path / "page.html").read_text()
    check_self_contained(text)
    (summary,) = re.findall(r"<summary>(.*?)</summary>", text)
    assert len(html.unescape(summary)) <= 91 and summary.endswith("…")
    assert text.count(html.escape(babble)) == 1 and f"<dd>{short}" in text


def test_large_pictures_are_scaled_down() -> None:
    sides = {}
    for side in (28, 112, 224):
        url = Sample(Image.new("L", (side, side)), "a", {}).url
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            sides[side] = picture.size
    assert sides == {28: (28, 28), 112: (112, 112), 224: (112, 112)}
