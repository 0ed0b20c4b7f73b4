"""One's own images in a report: their table first, and beside the paper's external sets those with its labels."""

from collections.abc import Sequence

from vitask_plugin.data.instructions import label_sets
from vitask_plugin.data.names import same_names
from vitask_plugin.report import paper
from vitask_plugin.report.page import Cell, Section, Table
from vitask_plugin.report.runs import Run
from vitask_plugin.report.tables import IN_WORDS, by_split, data_sets, is_own, metric_cell, title

_TUNED_ON = "medmnist_retina"  # what the paper's models of its external sets were tuned on


def section(runs: Sequence[Run]) -> Section | None:
    """Accuracy and macro-F1 of each own set, under its own name; None without any."""
    sets = [name for name in _own(runs) if not _is_like_the_papers(runs, name)]
    return Section("Own data", by_split(runs, sets), [IN_WORDS]) if sets else None


def external(runs: Sequence[Run]) -> Section | None:
    """Own sets with the labels of RetinaMNIST, beside the paper's figures of such sets; None if there are none."""
    sets = [name for name in _own(runs) if _is_like_the_papers(runs, name)]
    if not sets:
        return None
    published = paper.published()["external"]
    columns = ["run", *map(title, sets), *map(paper.heading, published["sets"])]
    rows: list[list[str | Cell]] = [
        [run.name, *(metric_cell(run.tasks.get(name), *paper.METRICS) for name in sets), *[""] * len(published["sets"])]
        for run in runs
        if any(name in run.tasks for name in sets)
    ]
    for model, pairs in published["models"].items():
        rows.append([paper.heading(model), *[""] * len(sets), *(paper.cell(*pair) for pair in pairs)])
    notes = [
        "Accuracy / macro-F1 of the answers in words, on sets with the labels of retina. The paper's models were tuned "
        "on retina."
    ]
    return Section("External data sets", [Table(columns, rows)], notes)


def _own(runs: Sequence[Run]) -> list[str]:
    return [name for name in data_sets(runs) if is_own(name) and any(name in run.tasks for run in runs)]


def _is_like_the_papers(runs: Sequence[Run], name: str) -> bool:
    results = [run.tasks[name] for run in runs if name in run.tasks]
    singles = [single for result in results for single in (result.over_seeds or (result,))]
    return any(one.data and same_names(one.data.choices, label_sets()[_TUNED_ON].choices) for one in singles)
