"""The means over data sets that were judged together: lmms-eval's groups of our tasks."""

from collections.abc import Sequence

from vitask_plugin.evaluation.metric_list import TITLES
from vitask_plugin.report.page import Section, Table
from vitask_plugin.report.results import TEST, is_ours, split_of
from vitask_plugin.report.runs import Run
from vitask_plugin.report.tables import metric_cell

_SHOWN = ("accuracy", "subset_accuracy", "macro_f1", "auc", "ece")


def section(runs: Sequence[Run]) -> Section | None:
    """The mean over the sets that were judged together, as lmms-eval's groups give it; None without a group of ours."""
    found = {
        (name, run.name): result
        for run in runs
        for name, result in run.groups.items()
        if is_ours(f"{name}_") and result.metrics.get("accuracy") is not None
    }
    if not found:
        return None
    rows = [
        [_called(name), run, *(metric_cell(result, metric) for metric in _SHOWN)]
        for (name, run), result in sorted(found.items(), key=lambda entry: entry[0][0])
    ]
    notes = [
        "The plain mean over the data sets of a group, large and small alike, and its 95% interval. A name that ends "
        "in _score is of the likelihood of labels, and one in _incomplete of questions without the label set."
    ]
    return Section("Mean over data sets", [Table(["group", "run", *map(TITLES.get, _SHOWN)], rows, words=2)], notes)


def _called(group: str) -> str:
    """As lmms-eval calls it, and its split if that is another than test."""
    name, split = split_of(group)
    return name + f" ({split})" * (split != TEST)
