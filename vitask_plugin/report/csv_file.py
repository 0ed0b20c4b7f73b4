"""Every metric of a report's runs, and the paper's, as one tidy CSV: a row per run, task and metric."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitask_plugin.files import atomic_path
from vitask_plugin.report import paper
from vitask_plugin.report.results import split_of
from vitask_plugin.report.runs import Run
from vitask_plugin.report.sections import Rankings

COLUMNS = ("source", "run", "task", "metric", "value", "low", "high", "n", "split")
MARK = ",".join(COLUMNS[:-1])  # an earlier version's report is one too

Row = tuple[str, str, str, str, float, float | str, float | str, int | str]


def write_csv(path: str | Path, runs: Sequence[Run], found: Rankings) -> None:
    """`source` is "measured" or "paper"; low and high are the ends of a 95% interval, empty where there is none.

    The paper's accuracy stands as `subset_accuracy` (for single labels that is accuracy). Its numbers that are not of
    table 1 say so in the run's name: the same model has others there. `split` is the one that was judged.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for source, run, task, *rest in (*_measured(runs), *_rankings(found), *_published()):
            name, split = split_of(task)
            writer.writerow((source, run, name, *rest, split))


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
    known = paper.published()
    main, ablation, incomplete, external = (known[key] for key in ("main", "ablation", "incomplete", "external"))
    means = f"mean of {len(main['tasks'])} sets"
    for task, pairs in (main["tasks"] | {means: main["mean"]}).items():
        for model, pair in zip(main["models"], pairs, strict=True):
            yield from _pair(model, task, pair)
    for row in ablation["rows"]:
        name = f"{paper.ablation_name(row)} (table 2)"
        for task, value in zip(ablation["tasks"], row["macro_f1"], strict=True):
            yield ("paper", name, task, "macro_f1", value, "", "", "")
    for key, task in (("complete", incomplete["task"]), ("incomplete", f"{incomplete['task']}_incomplete")):
        for model, value in zip(incomplete["models"], incomplete[key], strict=True):
            yield ("paper", f"{model} (figure 4)", task, "macro_f1", value, "", "", "")
    for model, pairs in external["models"].items():
        for task, pair in zip(external["sets"], pairs, strict=True):
            yield from _pair(f"{model} (external)", task, pair)


def _pair(model: str, task: str, pair: Sequence[float]) -> Iterator[Row]:
    for metric, value in zip(paper.METRICS, pair, strict=True):
        yield ("paper", model, task, metric, value, "", "", "")
