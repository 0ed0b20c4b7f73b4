"""Results folders as runs: a run is one model with its arguments, judged on some tasks, under a name of its own."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.record.checkpoint import read_record
from vitask_plugin.report.origins import Origin, read_origin
from vitask_plugin.report.results import (
    TaskResult,
    is_ours,
    read_file,
    results_files,
    split_of,
    split_task,
)

# Arguments of `vitask_llava` that say where a specialist lies; all others say how it was judged.
PATHS = ("pretrained", "model_base", "tsm", "connector")


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of its own training.

    Attributes:
        rda, crt: whether the term was in the loss.
        text: all of it, for people.
        detached: False for the paper's control RDA*, where RDA's gradient reaches the exemplar branch too.
        kind: of exemplar (`--vitask_ep`); "" without a record.
    """

    rda: bool
    crt: bool
    text: str
    detached: bool = True
    kind: str = ""


@dataclass(frozen=True)
class Run:
    """One model, judged.

    Attributes:
        name: unique among the runs of a report.
        model: lmms-eval's name of it (`--model`). arguments: its `--model_args`.
        tasks: {task: its latest result}. groups: the same of groups of tasks.
        training: None if the checkpoint is not on this machine.
        origins: {data set, whatever the split: what its checkpoint, or TSM, says of its training}, where it says it.
    """

    name: str
    model: str
    arguments: Mapping[str, str]
    tasks: Mapping[str, TaskResult]
    groups: Mapping[str, TaskResult]
    training: Training | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """That of all its trainings; None where it is not known."""
        seeds = {origin.seed for origin in self.origins.values()}
        return seeds.pop() if len(seeds) == 1 else None

    @property
    def ep(self) -> bool:
        """Whether exemplars were in the prompt, as `vitask_llava` decides it."""
        given = self.arguments.get("ep")
        return given.lower() in ("true", "all") if given is not None else "tsm" in self.arguments


def read_runs(directories: Iterable[str | Path]) -> list[Run]:
    """The runs below the folders, in the order of the folders.

    Evaluations of one model with the same arguments into the same folder are one run; of each task the latest counts.
    Models of one output folder that were judged on different data sets, a specialist each, are one run too, if their
    checkpoints are on this machine and say that they were trained alike, and if they were judged with equal arguments.

    Raises:
        VITaskError: a folder without results, files that cannot be read, no task of ours, or runs that were judged on
            different data.
    """
    found: dict[tuple[Path, str, str], dict[str, Any]] = {}
    for directory in directories:
        for path in map(Path.resolve, results_files(directory)):
            record, tasks = read_file(path)
            config = record.get("config") or {}
            arguments = config.get("model_args") or ""
            # A model without a name, such as lmms-eval's dummy, has no folder of its own.
            output = path.parent.parent if record.get("model_name_sanitized") else path.parent
            run = found.setdefault(
                (path.parent, str(config.get("model")), str(arguments)),
                {"output": output, "arguments": _arguments(arguments), "tasks": {}, "groups": {}},
            )
            checkpoint = run["arguments"].get("pretrained")
            run["training"] = read_training(Path(checkpoint)) if checkpoint else None
            if origin := _origin(run["arguments"]):
                run.setdefault("origins", {}).update({_data_set(task): origin for task in tasks if is_ours(task)})
            for task, result in tasks.items():
                run["groups" if result.group else "tasks"][task] = result
    if not any(is_ours(task) for run in found.values() for task in run["tasks"]):
        path = next(iter(found))[0]
        raise VITaskError(f"{str(path)!r} holds results of lmms-eval, but of none of our tasks (medmnist_*, vitask_*)")
    found = _with_specialists_together(found)
    names = _names([(run["output"], folder, run["arguments"]) for (folder, _, _), run in found.items()])
    runs = [
        Run(name, model, run["arguments"], run["tasks"], run["groups"], run["training"], run.get("origins", {}))
        for name, ((_, model, _), run) in zip(names, found.items(), strict=True)
    ]
    _check_same_data(runs)
    return runs


def _with_specialists_together(
    found: dict[tuple[Path, str, str], dict[str, Any]],
) -> dict[tuple[Path, str, str], dict[str, Any]]:
    """Adds each run to the first of its output folder trained and judged alike, on none of its data sets.

    Where no checkpoint can be looked at, nobody knows whether two were trained alike: they stay apart.
    """
    merged: dict[tuple[Path, str, str], dict[str, Any]] = {}
    for key, run in found.items():
        sets = {_data_set(task) for task in run["tasks"]}
        for (_, model, _), other in merged.items():
            alike = (model, other["output"], other["training"]) == (key[1], run["output"], run["training"])
            alike = alike and _seeds(other) == _seeds(run)
            same_flags = other["arguments"].keys() == run["arguments"].keys() and all(
                value == other["arguments"][name] for name, value in run["arguments"].items() if name not in PATHS
            )
            if (
                alike
                and run["training"] is not None
                and same_flags
                and not (run["groups"] or other["groups"])
                and sets.isdisjoint(map(_data_set, other["tasks"]))
            ):
                other["tasks"] |= run["tasks"]
                other["origins"] = other.get("origins", {}) | run.get("origins", {})
                for name, value in run["arguments"].items():
                    if value not in other["arguments"][name].split(" | "):
                        other["arguments"][name] += f" | {value}"
                break
        else:
            merged[key] = run
    return merged


def _seeds(run: Mapping[str, Any]) -> set[int | None]:
    return {origin.seed for origin in run.get("origins", {}).values()}


def _origin(arguments: Mapping[str, str]) -> Origin | None:
    """Of the checkpoint, or of a TSM that was judged alone."""
    tsm, connector = (Path(arguments[name]) if name in arguments else None for name in ("tsm", "connector"))
    folder = Path(arguments["pretrained"]) if "pretrained" in arguments else tsm
    return read_origin(folder, tsm, connector) if folder is not None and folder.is_dir() else None


def _data_set(task: str) -> str:
    """Whatever the split: models that were judged on two splits of one set are not specialists of two sets."""
    return split_task(split_of(task)[0])[0]


def _arguments(given: str | Mapping[str, Any]) -> dict[str, str]:
    """lmms-eval writes the text of `--model_args`, or what a configuration file holds."""
    if not isinstance(given, str):
        return {key: str(value) for key, value in given.items()}
    return dict(part.split("=", 1) for part in given.split(",") if "=" in part)


def _names(runs: Sequence[tuple[Path, Path, Mapping[str, str]]]) -> list[str]:
    """The shortest names that differ: of the output folder, of the model, of both, the path, with the arguments.

    Args:
        runs: (output folder, the model's folder in it, arguments).
    """
    output = [folder.name for folder, _, _ in runs]
    model = [folder.name.rpartition("__")[2] for _, folder, _ in runs]
    both = [f"{a}/{b}" for a, b in zip(output, model, strict=True)]
    counts = Counter(pair for _, _, arguments in runs for pair in arguments.items())
    differing = [
        ", ".join(f"{key}={Path(value).name}" for key, value in arguments.items() if counts[key, value] < len(runs))
        for _, _, arguments in runs
    ]
    common = os.path.commonpath([folder for folder, _, _ in runs])
    path = [folder.relative_to(common).as_posix() for folder, _, _ in runs]
    detailed = [f"{a} ({b})" if b else a for a, b in zip(both, differing, strict=True)]
    # lmms-eval names a model's folder after the last two parts of its path.
    whole = [f"{a}/{folder.name}" for a, (_, folder, _) in zip(output, runs, strict=True)]
    for names in (output, model, both, path, whole, detailed):
        if len(set(names)) == len(runs):
            return names
    return [f"{name} #{number}" for number, name in enumerate(detailed, start=1)]


def read_training(folder: Path) -> Training | None:
    """What a checkpoint says of its own training; None if there is no such folder.

    Raises:
        VITaskError: a record that cannot be read.
    """
    if not folder.is_dir():
        return None
    record = read_record(folder)
    if record is None:
        return Training(False, False, "no VITask record")
    flags = record["arguments"]
    # Without exemplars there is nothing to align with.
    rda = flags.get("vitask_rda_weight", 0) if flags.get("vitask_ep") != "none" else 0
    crt = flags.get("vitask_crt_weight", 0)
    crt = crt if flags.get("vitask_stage") == 2 else 0
    detached = flags.get("vitask_rda_detach", True)
    name = "RDA" if detached or not rda else "RDA* (not detached)"
    kind = str(flags.get("vitask_ep", ""))
    text = f"stage {flags.get('vitask_stage')}, EP {kind}, {name} {rda:g}, CRT {crt:g}"
    return Training(rda > 0, crt > 0, text, detached, kind)


def _check_same_data(runs: Sequence[Run]) -> None:
    """Refuses runs whose metrics of one data set do not belong in one table."""
    first: dict[str, tuple[str, TaskResult]] = {}
    for run in runs:
        for task, result in run.tasks.items():
            if result.data is None:
                continue
            name, known = first.setdefault(split_task(task)[0], (run.name, result))
            if known.data != result.data:
                raise VITaskError(
                    f"mixed data: {task!r} of {run.name!r} was judged on {result.data}, but of {name!r} on "
                    f"{known.data}; report them apart"
                )
            for index in known.answers.keys() & result.answers.keys():
                if known.answers[index].label != result.answers[index].label:
                    raise VITaskError(
                        f"mixed data: image {index} of {task!r} has label {result.answers[index].label} in "
                        f"{str(result.source)!r}, but {known.answers[index].label} in {str(known.source)!r}; the data "
                        "file was changed in between, so report them apart"
                    )
