"""Every metric of a report's runs, and the paper's, as one tidy CSV: a row per run, task and metric."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitask_plugin.files import atomic_path
from vitask_plugin.report import paper
from vitask_plugin.report.compared import Difference
from vitask_plugin.report.results import split_of
from vitask_plugin.report.runs import Run
from vitask_plugin.report.sections import Rankings
from vitask_plugin.report.seeds import Configuration

_FIRST = ("source", "run", "task", "metric", "value", "low", "high", "n")
_LAST = ("seeds", "deviation", "p", "p_holm", "from")
COLUMNS = (*_FIRST, "split", *_LAST)
MARK = ",".join(_FIRST)  # an earlier version's report is one too

Row = tuple[str | float, ...]  # `_FIRST`, and of `_LAST` as many as there are


def write_csv(
    path: str | Path,
    runs: Sequence[Run],
    found: Rankings,
    configurations: Sequence[Configuration],
    differences: Sequence[Difference],
) -> None:
    """`source` is "measured" (of one run), "mean over seeds", "difference" (of two runs, "B minus A") or "paper"; low
    and high are the ends of a 95% interval, empty where there is none.

    `seeds` are those of the run or runs, `deviation` is the standard deviation over them, `p_holm` the p-value
    corrected for the number of data sets, and `from` says what interval and p-value of a difference are made of.

    The paper's accuracy stands as `subset_accuracy` (for single labels that is accuracy). Its numbers that are not of
    table 1 say so in the run's name: the same model has others there. `split` is the one that was judged.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        rows = (*_measured(runs), *_means(configurations), *_compared(differences), *_rankings(found), *_published())
        for row in rows:
            source, run, task, *rest = row[: len(_FIRST)]
            last = row[len(_FIRST) :]
            name, split = split_of(task)
            writer.writerow((source, run, name, *rest, split, *last, *[""] * (len(_LAST) - len(last))))


def _measured(runs: Sequence[Run]) -> Iterator[Row]:
    for run in runs:
        for task, result in (run.tasks | run.groups).items():
            for metric, value in result.metrics.items():
                if value is not None:
                    ends = result.intervals.get(metric, ("", ""))
                    seed = "" if run.seed is None else run.seed
                    images = result.images[0] if result.images else ""
                    yield ("measured", run.name, task, metric, value, *ends, images, seed)


def _means(configurations: Sequence[Configuration]) -> Iterator[Row]:
    for one in configurations:
        seeds = " ".join(map(str, one.seeds))
        for task, result in (one.row.tasks | one.row.groups).items() if len(one.runs) > 1 else ():
            for metric, value in result.metrics.items():
                deviation = result.deviation(metric)
                if value is not None and deviation is not None:
                    images = result.images[0] if result.images else ""
                    yield ("mean over seeds", one.name, task, metric, value, "", "", images, seeds, deviation)


def _compared(differences: Sequence[Difference]) -> Iterator[Row]:
    for one in differences:
        ends = one.interval or ("", "")
        last = (" ".join(map(str, one.seeds)), "", *("" if p is None else p for p in (one.p, one.corrected)), one.how)
        images = "" if one.images is None else one.images
        name = f"{one.second} minus {one.first}"
        yield ("difference", name, one.task, one.metric, one.value, *ends, images, *last)


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
