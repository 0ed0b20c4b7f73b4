"""`vitask report`: lmms-eval's output folders as one page, and as Markdown and CSV."""

import argparse
import datetime
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup
from tqdm import tqdm

from vitask_plugin import __version__
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_creatable
from vitask_plugin.options import check_number
from vitask_plugin.report import (
    compared,
    csv_file,
    means,
    own,
    page,
    paper,
    sections,
    seeds,
    tables,
    training_folders,
)
from vitask_plugin.report.results import RESULTS_ENDING
from vitask_plugin.report.runs import Run, read_runs
from vitask_plugin.report.training_folders import read_logs

_MARK_BYTES = 1000


def build_page(
    runs: list[Run],
    found: sections.Rankings,
    images: int,
    configurations: Sequence[seeds.Configuration],
    differences: Sequence[compared.Difference],
    logs: Sequence[training_folders.TrainingLog],
) -> page.Page:
    """The whole report of some runs.

    Args:
        images: at most so many wrongly answered images per data set.
    """
    rows = [configuration.row for configuration in configurations]
    parts = [
        tables.overview(runs) if runs else None,
        seeds.section(configurations),
        own.section(rows),
        own.external(rows),
        tables.main(rows),
        means.section(runs),
        compared.section(differences),
        tables.ablation(rows),
        sections.incomplete(rows),
        sections.ranking_section(found),
        *sections.data_set_sections(runs, found, images),
        tables.other_tasks(runs),
        training_folders.section(logs),
    ]
    notes: list[str | Markup] = [
        f"Made by vitask {__version__} on {datetime.date.today().isoformat()} from what lmms-eval wrote. "
        "Not for clinical use.",
    ]
    if caution := tables.choosing(rows):
        notes.append(caution)
    if any(cell.paper for part in parts if part for cell in page.cells(part)):
        notes.append(paper.note())
    if not all(result.data for run in runs for task, result in run.tasks.items() if tables.is_ours(task)):
        notes.append(
            "Some runs kept no samples: their confusion matrices, calibration, ranking and errors are missing. "
            "lmms-eval keeps them with --log_samples."
        )
    return page.Page("VITask report", [part for part in parts if part], notes)


def report(directories: list[str], out: str | Path, *, markdown: bool, csv: bool, images: int) -> list[Path]:
    """Writes the report and returns its files.

    Raises:
        VITaskError: results that cannot be read or compared (see `runs.read_runs`), or a file in the way that is no
            report; nothing is written then.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise VITaskError(f"--out {str(out)!r} is no name of a page; it ends in .html")
    check_number("--errors", images, 0)
    wanted = {out: page.HTML_MARK}
    if markdown:
        wanted[out.with_suffix(".md")] = page.MARKDOWN_MARK
    if csv:
        wanted[out.with_suffix(".csv")] = csv_file.MARK
    for path, mark in wanted.items():
        _check_ours(path, mark)
    logs = read_logs(filter(os.path.isdir, directories))
    trained_in = {log.folder for log in logs}
    # A folder of a training alone is no results folder; any other has to be one.
    judged = [one for one in directories if _holds_results(one) or not _is_among(one, trained_in)]
    runs = read_runs(judged) if judged else []
    found = sections.rankings(runs)
    configurations = seeds.configurations(runs)
    differences = compared.compare(configurations)
    content = build_page(runs, found, images, configurations, differences, logs)
    page.write_html(out, content)
    if markdown:
        page.write_markdown(out.with_suffix(".md"), content)
    if csv:
        csv_file.write_csv(out.with_suffix(".csv"), runs, found, configurations, differences)
    return list(wanted)


def _holds_results(directory: str | Path) -> bool:
    return next(Path(directory).rglob(f"*{RESULTS_ENDING}"), None) is not None


def _is_among(directory: str | Path, folders: Iterable[Path]) -> bool:
    return any(folder.is_relative_to(Path(directory).resolve()) for folder in folders)


def _check_ours(path: Path, mark: str) -> None:
    """Refuses to replace what an earlier report did not write, and a place where nothing can be written."""
    check_creatable(path)
    if path.is_file():
        with open(path, "rb") as file:
            if mark.encode() in file.read(_MARK_BYTES):
                return
    if path.exists():
        raise VITaskError(f"{str(path)!r} exists and is no earlier report; choose another name with --out")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "directories",
        nargs="+",
        metavar="DIR",
        help="--output_path of lmms-eval; a run is named after its folder. Or "
        "--output_dir of a training, for its curves",
    )
    add("--out", default="report.html", metavar="FILE.html", help="page to write (default report.html)")
    add("--markdown", action="store_true", help="also write the tables as FILE.md")
    add("--csv", action="store_true", help="also write every metric and the paper's figures as FILE.csv")
    add(
        "--errors",
        type=int,
        default=12,
        metavar="N",
        help="at most N wrongly answered images per data set, 0 = none (default 12); they are read from "
        "$MEDMNIST_ROOT, those of one's own folders from $VITASK_FOLDER (A:B)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    for path in report(args.directories, args.out, markdown=args.markdown, csv=args.csv, images=args.errors):
        tqdm.write(str(path))
