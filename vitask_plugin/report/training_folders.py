"""Output folders of a training in a report: what was trained, its loss term by term, and its validation."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.report import charts
from vitask_plugin.report.charts import Points
from vitask_plugin.report.origins import STATE_FILE, Origin, read_origin
from vitask_plugin.report.page import MISSING, Chart, Grid, Section, Table
from vitask_plugin.report.runs import Training, read_training
from vitask_plugin.report.training import loss_curves

_POINTS = 400  # of a line; of more, groups of neighbours are averaged
_LINES = 6  # of validation scores in one chart
_EVALUATED = "eval_"
_LOSSES = {"eval_loss": "validation", "eval_ep_loss": "validation, EP"}
# The Trainer logs these with what it was asked for.
_SPEED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
_LOW_IS_GOOD = ("loss", "ece", "unmapped")


@dataclass(frozen=True)
class TrainingLog:
    """One training.

    Attributes:
        name: unique in a report. history: the Trainer's `log_history`.
        steps, epochs: that it has done. training: what its record says. origin: the seed and all else that is known.
    """

    name: str
    folder: Path
    history: Sequence[Mapping[str, Any]]
    steps: int
    epochs: float | None
    training: Training | None
    origin: Origin | None

    @property
    def curves(self) -> dict[str, Points]:
        """{term: [(step, nats)]}, with the losses on validation data if they were measured."""
        measured = _lines(self.history, list(_LOSSES))
        curves = {**loss_curves(self.history), **{_LOSSES[key]: points for key, points in measured.items()}}
        return {term: points for term, found in curves.items() if (points := _thinned(found))}

    @property
    def scores(self) -> dict[str, Points]:
        """{name without "eval_": [(step, value)]} of what else was measured on validation data."""
        keys = dict.fromkeys(key for entry in self.history for key in entry if key.startswith(_EVALUATED))
        lines = _lines(self.history, [key for key in keys if key not in (*_SPEED, *_LOSSES)])
        return {key.removeprefix(_EVALUATED): points for key, points in lines.items() if points}


def _lines(history: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for key in keys:
            value = entry.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                lines.setdefault(key, []).append((entry["step"], value))
    return lines


def _thinned(points: Points) -> list[tuple[float, float]]:
    finite = [point for point in points if math.isfinite(point[1])]
    size = math.ceil(len(finite) / _POINTS) or 1
    groups = (finite[start : start + size] for start in range(0, len(finite), size))
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


# Reading -------------------------------------------------------------------------------------------------------------


def read_logs(directories: Iterable[str | Path]) -> list[TrainingLog]:
    """The trainings in or below the folders, in their order. Of one that was cut short, its newest checkpoint's log.

    Raises:
        VITaskError: a log that is not the Trainer's.
    """
    found: dict[Path, Path] = {}
    for directory in directories:
        for path in sorted(Path(directory).resolve().rglob(STATE_FILE)):
            step = _step(path.parent)
            owner = path.parent if step is None else path.parent.parent
            known = found.setdefault(owner, path)
            newer = step is None or (_step(known.parent) is not None and step > _step(known.parent))
            if newer:
                found[owner] = path
    names = _names(list(found))
    return [_read(name, owner, path) for name, (owner, path) in zip(names, found.items(), strict=True)]


def _step(folder: Path) -> int | None:
    """Of a folder `checkpoint-N`."""
    name, _, number = folder.name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdecimal() else None


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(common).as_posix() for folder in folders]


def _read(name: str, folder: Path, path: Path) -> TrainingLog:
    state = read_json(path, "training log")
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
        raise VITaskError(f"{str(path)!r} is not the log of a training (no 'log_history' with steps); remove it")
    steps, epochs = state.get("global_step"), state.get("epoch")
    return TrainingLog(
        *(name, folder, history, steps if isinstance(steps, int) else len(history)),
        *(epochs if isinstance(epochs, int | float) else None, read_training(folder), read_origin(folder)),
    )


# On the page ---------------------------------------------------------------------------------------------------------


def section(logs: Sequence[TrainingLog]) -> Section | None:
    """A row, the losses and the validation of each training; None without any."""
    if not logs:
        return None
    rows = []
    for log in logs:
        losses = log.curves.get("total") or [(0, math.nan)]
        rows.append(
            [
                log.name,
                log.training.text if log.training else MISSING,
                MISSING if log.origin is None or log.origin.seed is None else str(log.origin.seed),
                str(log.steps),
                MISSING if log.epochs is None else f"{log.epochs:.2f}",
                MISSING if math.isnan(losses[-1][1]) else f"{losses[-1][1]:.3f}",
            ]
        )
    drawn = [chart for log in logs for chart in _charts(log)]
    blocks = [Table(["training", "record", "seed", "steps", "epochs", "last loss"], rows, words=2)]
    validated = _validation(logs)
    notes = ["What the training logged: the loss and its terms, in nats per response token."]
    if validated.rows:
        notes.append("Validation metrics are those of the training run itself, on its own validation data.")
        blocks.append(validated)
    return Section("Training runs", [*blocks, Grid(drawn)], notes)


def _charts(log: TrainingLog) -> Iterator[Chart]:
    if log.curves:
        yield Chart(log.name, charts.loss_curves(log.curves))
    if log.scores:
        yield _scores(log)


def _scores(log: TrainingLog) -> Chart:
    # What is measured over all data sets has the shortest names.
    drawn = [name for name in log.scores if not name.endswith(("loss", "on_label"))] or list(log.scores)
    chosen = sorted(drawn, key=lambda name: (len(name), name))[:_LINES]
    left = len(log.scores) - len(chosen)
    caption = f"{left} more in the table" if left else ""
    lines = {name: _thinned(log.scores[name]) for name in chosen}
    return Chart(f"{log.name}: validation", charts.loss_curves(lines, "value"), caption)


def _validation(logs: Sequence[TrainingLog]) -> Table:
    rows = []
    for log in logs:
        for name, points in log.scores.items():
            finite = [point for point in points if math.isfinite(point[1])]
            if finite:
                choose = min if any(word in name for word in _LOW_IS_GOOD) else max
                step, best = choose(finite, key=lambda point: point[1])
                rows.append([log.name, name, f"{best:.3f}", f"{step:g}", f"{points[-1][1]:.3f}"])
    return Table(["training", "validation", "best", "at step", "last"], rows, words=2)
