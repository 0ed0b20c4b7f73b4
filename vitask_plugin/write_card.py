"""`vitask card`: the model card of a checkpoint, written again, with what lmms-eval found.

CKPT/
    README.md          the card, in place of what is there
    vitask_card.json   what it says, as training wrote it, and the figures
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, read_json
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, CONFIG_FILE, has_adapter
from vitask_plugin.record.checkpoint import RECORD_FILE, read_record
from vitask_plugin.record.host import host_of
from vitask_plugin.report.results import TaskResult, split_of, split_task
from vitask_plugin.report.runs import Run, read_runs
from vitask_plugin.sharing.base import base_model
from vitask_plugin.sharing.card import CARD_FILE, METRICS, save_card
from vitask_plugin.sharing.facts import DataSet, Facts, Row, license_of, modality_of, read_facts


def write(checkpoint: str | Path, results: Sequence[str | Path] = ()) -> Facts:
    """Writes the card.

    Args:
        checkpoint: output of a training with --vitask.
        results: folders of lmms-eval's results for it; without any, the figures of the last time stay.

    Raises:
        VITaskError: no such checkpoint, or results that are damaged or of another one.
    """
    folder = Path(checkpoint)
    check_folder(folder, "checkpoint")
    facts = read_facts(folder) or _of_record(folder)
    if results:
        facts = facts.judged(_rows(folder, results))
    save_card(facts, folder)
    return facts


def _of_record(folder: Path) -> Facts:
    """What `vitask.json` tells of a checkpoint whose training wrote no card: nothing of how many images it had."""
    record = read_record(folder)
    if record is None:
        raise VITaskError(f"{str(folder)!r} has no {RECORD_FILE}, so it is no output of a VITask training; give one")
    given = record["arguments"]
    base = base_model(_base(folder))
    run = record.get("run") or {}
    lines = [f"stage {given['vitask_stage']}; exemplar: {record['ep']}"]
    lines += [f"seed: {run['seed']}"] if "seed" in run else []
    library = "llava" if host_of(folder) == "llava" else "peft" if has_adapter(folder) else "transformers"
    data = tuple(DataSet(task, modality_of(task), license_of(task)) for task in record.get("tasks", {}))
    return Facts(f"{base.name}, tuned by VITask", library, base, data, tuple(lines), record.get("versions", {}))


def _base(folder: Path) -> str:
    for name, key in ((ADAPTER_CONFIG_FILE, "base_model_name_or_path"), (CONFIG_FILE, "_name_or_path")):
        found = read_json(folder / name, "model configuration") if (folder / name).is_file() else {}
        if found.get(key):
            return str(found[key])
    return folder.resolve().name


def _rows(folder: Path, results: Sequence[str | Path]) -> Iterator[Row]:
    for run in read_runs(results):
        judged = run.arguments.get("pretrained")
        if judged is not None and Path(judged).resolve() != folder.resolve():
            raise VITaskError(
                f"the results of {run.name!r} are of {judged!r}, and the card is of {str(folder)!r}; give the results "
                "of this checkpoint alone"
            )
        for task, result in run.tasks.items():
            if not split_task(split_of(task)[0])[1]:
                yield _row(run, task, result)


def _row(run: Run, task: str, result: TaskResult) -> Row:
    name, split = split_of(task)
    both = {**_of_scores(run, task), "accuracy": result, "macro_f1": result}
    model = "TSM alone" if "pretrained" not in run.arguments else "with EP" if run.ep else "without EP"
    return Row(
        set=name,
        split=split,
        model=model,
        figures={metric: both[metric].metrics.get(metric) for metric in METRICS if metric in both},
        intervals={
            metric: list(both[metric].intervals[metric])
            for metric in METRICS
            if metric in both and metric in both[metric].intervals
        },
        n=result.images[0] if result.images else len(result.answers),
        unmapped=result.metrics.get("unmapped"),
        own="pretrained" in run.arguments,
    )


def _of_scores(run: Run, task: str) -> dict[str, TaskResult]:
    """The AUC comes from the labels' likelihoods."""
    base, _, split = task.partition("@")
    scored = run.tasks.get(f"{base}@{split}_score" if split else f"{base}_score")
    return {} if scored is None else {"auc": scored}


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="output of a training with --vitask True; its README.md is replaced")
    add("--results", nargs="+", default=[], metavar="DIR", help="folders of lmms-eval's results for it (--output_path)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    facts = write(args.checkpoint, args.results)
    tqdm.write(f"wrote {Path(args.checkpoint) / CARD_FILE}, with {len(facts.rows)} row(s) of figures")
