"""`vitask card`: the model card of a checkpoint, written again, with what lmms-eval found.

CKPT/
    README.md          the card, in place of what is there
    vitask_card.json   what it says, as training wrote it, and the figures
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.judge_tsm import MODEL as TSM_MODEL
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, CONFIG_FILE, has_adapter
from vitask_plugin.record.checkpoint import RECORD_FILE, read_record
from vitask_plugin.record.host import host_of
from vitask_plugin.report.results import TaskResult, headline, split_of, split_task
from vitask_plugin.report.runs import Run, read_runs
from vitask_plugin.sharing.base import base_model
from vitask_plugin.sharing.card import CARD_FILE, save_card
from vitask_plugin.sharing.facts import DataSet, Facts, Row, license_of, modality_of, read_facts
from vitask_plugin.tsm.model import RECORD_FILE as TSM_FILE

# Arguments of lmms-eval's models that say where a checkpoint lies and how it is run, and those of no effect.
_AS_TRAINED = (
    *("pretrained", "model_base", "tsm", "ep", "trust_tsm_code"),
    *("dtype", "batch_size", "max_batch_size", "device", "max_new_tokens"),
)
_OFF = (("contrast", "0"), ("contrast", "0.0"), ("calibrated", "False"))


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
        if "pretrained" not in run.arguments:
            _check_tsm(folder, run)
        judged = run.arguments.get("pretrained")
        if judged is not None and Path(judged).resolve() != folder.resolve():
            raise VITaskError(
                f"the results of {run.name!r} are of {judged!r}, and the card is of {str(folder)!r}; give the results "
                "of this checkpoint alone"
            )
        for task, result in run.tasks.items():
            if not split_task(split_of(task)[0])[1]:
                yield _row(run, task, result)


def _check_tsm(folder: Path, run: Run) -> None:
    """Refuses figures of no checkpoint that are not those of the checkpoint's own TSM."""
    if run.model != TSM_MODEL:
        raise VITaskError(
            f"the results of {run.name!r} are of --model {run.model} without a checkpoint (pretrained=), and the card "
            f"is of {str(folder)!r}; give the results of this checkpoint, or of `vitask tsm evaluate`"
        )
    own = ((read_record(folder) or {}).get("tsm") or {}).get("hash")
    path = Path(run.arguments["tsm"]) / TSM_FILE
    judged = read_json(path, "TSM record").get("sha256") if path.is_file() else None
    if own is None or own != judged:
        known = "no TSM" if own is None else f"TSM {own[:12]}"
        found = f"TSM {judged[:12]}" if judged else "no TSM that can be looked at"
        raise VITaskError(
            f"the results of {run.name!r} are of {run.arguments['tsm']!r}, {found}, and {str(folder)!r} was trained "
            f"with {known}; give the results of the TSM of training, with its folder where it was judged"
        )


def _unlike_training(arguments: Mapping[str, str]) -> list[str]:
    """What makes it another way of using the model than the card is about: for people, without places."""
    found = [(name, Path(value).name) for name, value in arguments.items() if name not in _AS_TRAINED]
    found += [("ep", "all")] if arguments.get("ep", "").lower() == "all" else []
    return [f"{name}={value}" for name, value in found if (name, value) not in _OFF]


def _row(run: Run, task: str, result: TaskResult) -> Row:
    name, split = split_of(task)
    figures, intervals = headline(run.tasks, task)
    alone = run.model == TSM_MODEL
    more = "" if alone else "".join(f", {name}" for name in _unlike_training(run.arguments))
    model = "TSM alone" if alone else f"{'with' if run.ep else 'without'} EP{more}"
    return Row(
        set=name,
        split=split,
        model=model,
        figures=figures,
        intervals=intervals,
        n=result.images[0] if result.images else len(result.answers),
        unmapped=result.metrics.get("unmapped"),
        own=not alone and not more,
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="output of a training with --vitask True; its README.md is replaced")
    add("--results", nargs="+", default=[], metavar="DIR", help="folders of lmms-eval's results for it (--output_path)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    facts = write(args.checkpoint, args.results)
    tqdm.write(f"wrote {Path(args.checkpoint) / CARD_FILE}, with {len(facts.rows)} row(s) of figures")
