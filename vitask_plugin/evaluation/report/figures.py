"""Every figure of a report as one tidy CSV: a row per run, task and metric."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitask_plugin.evaluation.report import paper
from vitask_plugin.evaluation.report.runs import Run
from vitask_plugin.evaluation.report.sections import Rankings
from vitask_plugin.files import atomic_path

COLUMNS = ("source", "run", "task", "metric", "value", "low", "high", "n")
MARK = ",".join(COLUMNS)

Row = tuple[str, str, str, str, float, float | str, float | str, int | str]


def write_csv(path: str | Path, runs: Sequence[Run], found: Rankings) -> None:
    """`source` is "measured" or "paper"; low and high are the ends of a 95% interval, empty where there is none.

    The paper's accuracy stands as `subset_accuracy` (for single labels that is accuracy).
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([*_measured(runs), *_rankings(found), *_published()])


def _measured(runs: Sequence[Run]) -> Iterator[Row]:
    for run in runs:
        for task, result in (run.tasks | run.groups).items():
            for metric, value in result.metrics.items():
                if value is not None:
                    ends = result.intervals.get(metric, ("", ""))
                    yield ("measured", run.name, task, metric, value, *ends, result.images[0] if result.images else "")


def _rankings(found: Rankings) -> Iterator[Row]:
    for (name, run), ranking in found.items():
        for metric, value in (("ranking_overlap", ranking.overlap), ("ranked_right", ranking.ranked)):
            yield ("measured", run, f"{name}_score", metric, value, "", "", ranking.images)


def _published() -> Iterator[Row]:
    main = paper.figures()["main"]
    for task, pairs in main["tasks"].items():
        for model, pair in zip(main["models"], pairs, strict=True):
            for metric, value in zip(("subset_accuracy", "macro_f1"), pair, strict=True):
                yield ("paper", model, task, metric, value, "", "", "")
