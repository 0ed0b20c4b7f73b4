"""Reading what lmms-eval writes, and the report page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation import metrics
from vitask_plugin.evaluation.metrics import Outcome
from vitask_plugin.evaluation.report import Confusion, Sample, loss_curves, read_results, write_report


def write_results(folder: Path, date: str, accuracy: float) -> None:
    """The parts of lmms-eval's two kinds of files that are read."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "alias": "t",
        "accuracy,none": accuracy,
        "accuracy_stderr,none": 0.1,
        "auc,none": float("nan"),
        "macro_f1_stderr,none": "N/A",
    }
    (folder / f"{date}_results.json").write_text(json.dumps({"results": {"t": figures, "unlogged": figures}}))
    samples = [
        {"doc_id": 1, "filtered_resps": "a grain", "macro_f1": [1, None]},
        {"doc_id": 0, "filtered_resps": ["(1.0, False)"], "macro_f1": [0, 1], "auc": [0, [0.25, 0.75], "multi-class"]},
    ]
    (folder / f"{date}_samples_t.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def test_the_latest_results_are_read(tmp_path: Path) -> None:
    write_results(tmp_path / "b__model", "20260101_000000", 0.25)
    write_results(tmp_path / "a__model", "20260201_000000", 0.75)
    results = read_results(tmp_path)
    assert set(results) == {"t", "unlogged"}
    assert results["t"].metrics == {"accuracy": 0.75, "auc": None}
    assert results["t"].outcomes == [Outcome(0, 1), Outcome(1, None)]
    assert results["t"].answers[0].probabilities == (0.25, 0.75)
    assert results["t"].answers[1].text == "a grain"
    assert results["unlogged"].answers == {}


def test_a_failed_evaluation_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(VITaskError, match="the evaluation failed"):
        read_results(tmp_path)


def test_curves_by_term_from_a_log() -> None:
    log = [
        {"step": 1, "loss": 3.0, "loss_rda": 0.5, "learning_rate": 1e-3},
        {"step": 2, "loss": 2.0, "loss_rda": 0.25},
        {"step": 2, "train_runtime": 1.0},
    ]
    assert loss_curves(log) == {"total": [(1, 3.0), (2, 2.0)], "RDA": [(1, 0.5), (2, 0.25)]}


class Page(HTMLParser):
    """What a page refers to, which tags are left open, and its table cells."""

    VOID = frozenset(["meta", "img", "path", "use", "rect", "link"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    choices = ["no grain", "a & b"]
    rows = [
        {"model": "tsm", "ep": False, "accuracy": 0.91234, "auc": None, "n": 3},
        {"model": "<script>x</script>", "ep": True, "accuracy": 1.0, "auc": 0.5, "n": 3},
    ]
    outcomes = [Outcome(0, 0), Outcome(0, 1), Outcome(1, None)]
    sample = Sample(Image.new("L", (28, 28), 90), "a & b", {"vanilla": "<b>bold</b>", "VITask": "a & b."})
    path = tmp_path / "report.html"
    arguments = {
        "title": "Two < three",
        "rows": rows,
        "curves": {"stage 1": {"total": [(1, 3.0), (2, 2.0)], "EP": [(1, 1.0), (2, 0.5)]}, "none": {}},
        "confusions": {"VITask": Confusion(metrics.confusion(outcomes, 2), choices)},
        "samples": [sample],
        "notes": ["Seed 0."],
    }
    write_report(path, **arguments)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert page.cells == [
        "tsm",
        "no",
        "0.912",
        "n/a",
        "3",
        "<script>x</script>",
        "yes",
        "1.000",
        "0.500",
        "3",
        *list("110001"),
    ]
    assert page.tags.count("svg") == 1
    assert "script" not in page.tags and "b" in page.tags  # the label is bold, the answer is not
    assert page.references and all(re.match(r"#|data:image/png;base64,", value) for value in page.references)
    assert "url(http" not in text and "@import" not in text
    write_report(tmp_path / "again.html", **arguments)
    assert (tmp_path / "again.html").read_text() == text


def test_a_page_of_nothing_but_a_table(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="t", rows=[{"a": 1}], curves={}, confusions={}, samples=[])
    page = Page((tmp_path / "r.html").read_text())
    assert page.cells == ["1"]
    assert "svg" not in page.tags
