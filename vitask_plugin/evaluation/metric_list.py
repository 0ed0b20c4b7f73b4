"""The metrics of our tasks, each declared once: what it is called, computed over, written as, and of which tasks."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.inference import metrics

STRICT = "_strict"  # behind the name of a metric: of the strict reading of answers
INTERVAL = "_ci95"  # its 95% interval


class Metric(NamedTuple):
    """One metric.

    Attributes:
        title: for people.
        over: from all values that a task's documents give to the metric. What has an interval is in `intervals`.
        of: what those values are made of: "outcome" of `metrics`, "probabilities", or "" for a count.
        strict: whether there is another one of the strict reading of answers, `..._strict`.
        kind: `medmnist`'s word for the only tasks that have it; "" = all.
        shown: the only tasks that a report shows it for; "" = all.
        decimals: that it is written with.
    """

    title: str
    over: Callable[[Sequence[Any]], float]
    of: str = "outcome"
    strict: bool = True
    kind: str = ""
    shown: str = ""
    decimals: int = 3


# In the order in which they are shown. A document gives accuracies a number, so that the harness makes standard errors.
METRICS = {
    "accuracy": Metric("accuracy", fmean),
    "subset_accuracy": Metric("subset accuracy", fmean, shown=MULTI_LABEL),  # else it is accuracy
    "balanced_accuracy": Metric("balanced accuracy", metrics.balanced_accuracy),
    "macro_f1": Metric("macro-F1", metrics.macro_f1),
    "quadratic_kappa": Metric("quadratic kappa", metrics.quadratic_kappa, kind="ordinal-regression"),
    "auc": Metric("AUC", metrics.auc, of="probabilities", strict=False),
    "ece": Metric("ECE", metrics.ece, of="probabilities", strict=False),
    "unmapped": Metric("answers without a label", sum, of="", decimals=0),
    "n": Metric("n", len, of="", strict=False, decimals=0),
}
# Of a report's tables, and of what is compared where a table has little room.
TITLES = {
    f"{name}{ending}": f"{metric.title}{', strict reading' if ending else ''}"
    for name, metric in METRICS.items()
    for ending in ("", STRICT)[: 1 + metric.strict]
}
MAIN = ("accuracy", "macro_f1", "auc")


def of_outcomes(kind: str) -> list[str]:
    """The metrics of answers that a task has. `kind`: `medmnist`'s word for the task."""
    return [name for name, metric in METRICS.items() if metric.of == "outcome" and metric.kind in ("", kind)]


def of_probabilities() -> list[str]:
    return [name for name, metric in METRICS.items() if metric.of == "probabilities"]


def is_shown(name: str, *, multi_label: bool) -> bool:
    """Whether a report's table has room for a metric of `TITLES`."""
    return multi_label or METRICS[name.removesuffix(STRICT)].shown != MULTI_LABEL


def written(name: str, value: float) -> str:
    """A metric's value for people; of one that is not ours with three decimals."""
    metric = METRICS.get(name.removesuffix(STRICT))
    return f"{value:.{3 if metric is None else metric.decimals}f}"
