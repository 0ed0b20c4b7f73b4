"""`vitask tsm evaluate`: a TSM by itself on labelled images, for people and in lmms-eval's own files.

The files are those of `lmms-eval --output_path RESULTS --log_samples`: of each data set the tasks `X` (the likeliest
class as the answer) and `X_score` (probabilities), so `vitask report` gives the TSM a row beside VLMs, image by image.
"""

import argparse
import datetime
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.files import atomic_path, check_creatable, write_json
from vitask_plugin.options import COUNT, COUNT_OR_NONE
from vitask_plugin.tsm.trust import add_flag

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vitask_plugin.evaluation.tsm import JudgedTask

MODEL = "vitask_tsm"
SHOWN = ("accuracy", "subset_accuracy", "macro_f1", "quadratic_kappa", "auc")
LARGEST_MATRIX = 20  # classes of a confusion matrix that a terminal can show

Lines = list[dict[str, Any]]  # what is logged of each sample, the values of its metrics among them


def lines_of(judged: "JudgedTask") -> tuple[Lines, Lines]:
    """The samples of the task that answers in words, and of the one that scores labels."""
    from vitask_plugin.data.instructions import response
    from vitask_plugin.eval_tasks import utils

    answered, scored = [], []
    for document, scores in zip(judged.documents, judged.log_likelihoods.tolist(), strict=True):
        pairs = [(-score, False) for score in scores]
        values = utils.score_results(document, pairs)
        prediction = values["n"]["prediction"]
        answer, label = response(judged.choices, prediction), response(judged.choices, document["vitask"]["label"])
        # Which document it is: lmms-eval's own hash is of an image's place in memory too.
        digest = utils.document_hash(document)
        about = {"doc_id": document["index"], "doc_hash": digest, "target": label, "input": ""}
        # The prediction is known, so no reading of words can go wrong.
        answered.append({**about, "filtered_resps": answer, **utils.reading_results(document, prediction, prediction)})
        scored.append({**about, "filtered_resps": [str(pair) for pair in pairs], **values})
    return answered, scored


def metrics_of(lines: Lines) -> dict[str, Any]:
    """{metric: its value over all samples}, as lmms-eval aggregates them; None where one is not defined."""
    from vitask_plugin.eval_tasks import utils

    names = [name for name in lines[0] if name not in ("doc_id", "doc_hash", "target", "input", "filtered_resps")]
    return {name: _defined(utils.aggregation(name)([line[name] for line in lines])) for name in names}


def _defined(value: Any) -> Any:
    if isinstance(value, list):
        return [_defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(
    output: str | Path, tsm: str | Path, tasks: dict[str, tuple[Lines, dict[str, Any], int]], limit: int | None = None
) -> Path:
    """Writes a results file and the samples of each task into a folder of this TSM in `output`.

    Args:
        tasks: {lmms-eval task: its samples, its metrics, how many samples there are without the limit}.
        limit: of the samples of each, as given; None = all.

    Returns:
        The results file.
    """
    from vitask_plugin.report.results import RESULTS_ENDING, TASK_VERSION

    tsm = Path(tsm).resolve()
    # As lmms-eval names a model's folder: the last two parts of its path.
    folder = Path(output) / re.sub(r'["<>:/|\\?*\[\]]+', "__", "/".join(tsm.parts[-2:]).lstrip("/"))
    date = _free_date(folder)
    record: dict[str, Any] = {"results": {}, "group_subtasks": {}, "configs": {}, "versions": {}, "n-samples": {}}
    for task, (lines, metrics, available) in tasks.items():
        split = lines[0]["n"]["split"]
        record["results"][task] = {"alias": task} | {f"{name},none": value for name, value in metrics.items()}
        record["group_subtasks"][task] = []
        record["configs"][task] = {"task": task, "test_split": split, "metadata": {"version": TASK_VERSION}}
        record["versions"][task] = TASK_VERSION
        record["n-samples"][task] = {"original": available, "effective": len(lines)}
        with atomic_path(folder / f"{date}_samples_{task}.jsonl") as path:
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    # The TSM is the model here, not an exemplar in a prompt.
    record["config"] = {"model": MODEL, "model_args": {"tsm": str(tsm), "ep": "False"}, "limit": limit}
    record |= {"model_name": str(tsm), "model_name_sanitized": folder.name, "date": date}
    path = folder / f"{date}{RESULTS_ENDING}"
    write_json(path, record)
    return path


def _free_date(folder: Path) -> str:
    """The time, as lmms-eval puts it before its files' names; a second later where files of this second are there."""
    moment = datetime.datetime.now()
    while any(folder.glob(f"{moment:%Y%m%d_%H%M%S}_*")):
        moment += datetime.timedelta(seconds=1)
    return f"{moment:%Y%m%d_%H%M%S}"


def evaluate(
    output: str | Path,
    tsm: str | Path,
    judged: Sequence["JudgedTask"],
    console: "Console",
    limit: int | None = None,
) -> list[Path]:
    """Prints the metrics of judged data sets and writes lmms-eval's files; returns the results files.

    A results file holds a task once, and one's own sets are all `vitask_folder`: a second one gets its own file.
    """
    files: list[dict[str, tuple[Lines, dict[str, Any], int]]] = []
    rows = []
    for one in judged:
        answered, scored = lines_of(one)
        metrics = metrics_of(answered), metrics_of(scored)
        tasks = {
            one.name: (answered, metrics[0], one.available),
            f"{one.name}_score": (scored, metrics[1], one.available),
        }
        place = next((file for file in files if one.name not in file), None)
        if place is None:
            files.append(tasks)
        else:
            place |= tasks
        rows.append((one, metrics[1] | {"n": len(scored)}))
        _show_classes(one, scored, console)
    console.print(_overview(tsm, rows))
    return [write_results(output, tsm, tasks, limit) for tasks in files]


def _overview(tsm: str | Path, rows: Sequence[tuple["JudgedTask", dict[str, Any]]]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    from vitask_plugin.evaluation.metric_list import TITLES

    several = any(isinstance(one.documents[0]["vitask"]["label"], list) for one, _ in rows)
    shown = [
        name
        for name in SHOWN
        if any(name in metrics for _, metrics in rows) and (several or not name.startswith("subset"))
    ]
    splits = " and ".join(sorted({one.documents[0]["split"] for one, _ in rows}))
    table = Table(title=f"TSM {str(tsm)!r} alone on {splits}, with 95% intervals", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("data set", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(TITLES[name], justify="center", min_width=9)
    for one, metrics in rows:
        cells = [_cell(metrics.get(name), metrics.get(f"{name}_ci95")) for name in shown]
        table.add_row(one.title, str(metrics["n"]), *cells)
    return table


def _cell(value: float | None, ends: list[float | None] | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.3f}" if not ends or None in ends else f"{value:.3f}\n{ends[0]:.2f}\u2013{ends[1]:.2f}"


def _show_classes(one: "JudgedTask", scored: Lines, console: "Console") -> None:
    """Each class by itself; of single labels also which is taken for which."""
    from rich.box import SIMPLE
    from rich.table import Table

    from vitask_plugin.inference.metrics import class_metrics, confusion

    outcomes = [line["balanced_accuracy"] for line in scored]
    table = Table(title=f"{one.title}: its classes", box=SIMPLE)
    table.add_column("class")
    for name in ("images", "precision", "recall", "F1", "AUC"):
        table.add_column(name, justify="right")
    for name, row in zip(one.choices, class_metrics(outcomes, [line["auc"] for line in scored]), strict=True):
        table.add_row(name, str(row.images), *("n/a" if value is None else f"{value:.3f}" for value in row[1:]))
    console.print(table)
    if isinstance(outcomes[0].target, list) or len(one.choices) > LARGEST_MATRIX:
        return
    matrix = Table(title=f"{one.title}: label (row) and answer (column)", box=SIMPLE)
    matrix.add_column("")
    for number in range(1, len(one.choices) + 1):
        matrix.add_column(str(number), justify="right")
    for number, counts in enumerate(confusion(outcomes, len(one.choices)), start=1):
        matrix.add_row(f"{number} {one.choices[number - 1]}", *map(str, counts[:-1]))
    console.print(matrix)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tsm", required=True, metavar="DIR", help="folder of the TSM")
    add(
        "--data", required=True, metavar="JSON", help="LLaVA JSON file of the val or test split, of one task or several"
    )
    add("--image-folder", required=True, metavar="DIR", help="folder the image paths are relative to")
    add("--out", required=True, metavar="DIR", help="folder for lmms-eval's files, which `vitask report` reads")
    add("--split", metavar="NAME", help="test or val (default: as the JSON file is called)")
    add("--batch-size", type=int, action=COUNT, default=64, metavar="N", help="images per forward (default 64)")
    add("--workers", type=int, action=COUNT_OR_NONE, default=0, metavar="N", help="processes that read images")
    add("--limit", type=int, action=COUNT, metavar="N", help="only the first N images of each data set, to try out")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add_flag(parser)
    add("--any-image-size", action="store_true", help="go on if the images are unlike those of the TSM's training")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vitask_plugin.evaluation.tsm import judge

    check_creatable(args.out)
    judged = judge(
        args.tsm,
        args.data,
        args.image_folder,
        args.split,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        trust_code=args.trust_tsm_code,
        any_size=args.any_image_size,
        limit=args.limit,
    )
    console = Console()
    for path in evaluate(args.out, args.tsm, judged, console, args.limit):
        console.print(str(path), highlight=False, soft_wrap=True)
