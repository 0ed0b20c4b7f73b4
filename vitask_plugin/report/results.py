"""lmms-eval's output read back: the metrics of each task and, with `--log_samples`, every sample.

lmms-eval writes `<output_path>/<model>/<date>_results.json` and `<date>_samples_<task>.jsonl`. What our tasks log of a
sample stands below its metric `n`; `eval_tasks/README.md` documents it.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import Label
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.metric_list import INTERVAL
from vitask_plugin.formats.json_text import parse_json, read_json
from vitask_plugin.inference.metrics import Outcome
from vitask_plugin.report.results_format import RESULTS, SAMPLE

# `metadata.version` of the tasks whose metrics and samples this module knows.
TASK_VERSION = 2.0
RESULTS_ENDING = "_results.json"
_OURS = ("medmnist_", "vitask_")
_VARIANTS = ("incomplete", "score")
_FOLDER_TASK = "vitask_folder"
TEST = "test"


@dataclass(frozen=True)
class Answer:
    """One image's outcome. Which fields a task leaves empty depends on whether it answers in words or scores labels.

    Attributes:
        label: class index; multi-label: the sorted class indices.
        prediction: as `label`; None if the answer names no label.
        strict: the same by the strict reading; None for a task that scores labels.
        text: the answer in words, "" for a task that scores labels.
        log_likelihoods: nats, of each possible answer: K, multi-label K + 1 (the last is "no finding").
        probabilities: K.
        source, group: of one's own images, what their owner calls the file and what it shares with others; "" without.
    """

    label: Label
    prediction: Label | None
    strict: Label | None = None
    text: str = ""
    log_likelihoods: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()
    source: str = ""
    group: str = ""


@dataclass(frozen=True)
class Data:
    """What a task was judged on: the file in $MEDMNIST_ROOT, `medmnist`'s word for the kind of task, the K classes, and
    the split of the file."""

    file: str
    kind: str
    choices: tuple[str, ...]
    split: str = TEST

    def __str__(self) -> str:
        return f"{self.file!r} ({self.split} split) with the labels {', '.join(self.choices)} ({self.kind})"

    @property
    def multi_label(self) -> bool:
        return self.kind == MULTI_LABEL


@dataclass(frozen=True)
class TaskResult:
    """One task of an evaluation.

    Attributes:
        metrics: by name; None where lmms-eval wrote no finite number.
        intervals: ends of the 95% interval of a metric, where there is one.
        answers: by row of the split; empty without `--log_samples`.
        data: None without `--log_samples`.
        images: how many were judged, of how many there are (`--limit`).
        split: that was judged.
        group: whether this is a group of tasks: means over its tasks.
        source: the results file.
        over_seeds: where this is the mean over several trainings, of each of them the result.
    """

    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    data: Data | None = None
    images: tuple[int, int] | None = None
    split: str = TEST
    group: bool = False
    source: Path = Path()
    over_seeds: tuple["TaskResult", ...] = ()

    def deviation(self, metric: str) -> float | None:
        """Standard deviation of a metric over the seeds; None where it is a single training's, or is undefined."""
        values = [result.metrics.get(metric) for result in self.over_seeds]
        return statistics.stdev(values) if len(values) > 1 and None not in values else None

    @property
    def outcomes(self) -> list[Outcome]:
        """As `metrics` takes them: multi-label, K zeros and ones each."""
        if self.data is None or not self.data.multi_label:
            return [Outcome(answer.label, answer.prediction) for answer in self.answers.values()]
        classes = range(len(self.data.choices))

        def present(label: Label | None) -> list[int] | None:
            return None if label is None else [int(index in label) for index in classes]

        return [Outcome(present(answer.label), present(answer.prediction)) for answer in self.answers.values()]


def split_task(task: str) -> tuple[str, str]:
    """("medmnist_breast", "score") of "medmnist_breast_score"; the variant of a plain task is ""."""
    base, _, variant = task.rpartition("_")
    return (base, variant) if base and variant in _VARIANTS else (task, "")


def on_split(task: str, split: str) -> str:
    """What `read_results` calls a task that was judged on a split: of another one than test it is a data set of its
    own, "medmnist_breast@val_score", so that metrics of two splits never meet in one row."""
    base, variant = split_task(task)
    name = base if split == TEST else f"{base}@{split}"
    return f"{name}_{variant}" if variant else name


def split_of(task: str) -> tuple[str, str]:
    """("medmnist_breast_score", "val") of "medmnist_breast@val_score": what `on_split` was given."""
    base, variant = split_task(task)
    name, _, split = base.partition("@")
    return (f"{name}_{variant}" if variant else name), split or TEST


def is_ours(task: str) -> bool:
    """Whether `eval_tasks` holds the task; lmms-eval's own tasks may lie in the same folder."""
    return task.startswith(_OURS)


def results_files(directory: str | Path) -> list[Path]:
    """The files of results below `directory`, the oldest first.

    Raises:
        VITaskError: if there is no folder or none in it: lmms-eval exits with status 0 after most of its errors.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise VITaskError(
            f"results folder {str(directory)!r} {'is no folder' if folder.exists() else 'does not exist'}; give the "
            "--output_path of an lmms-eval run, and if it is that, the evaluation failed: see its output"
        )
    # The names begin with the date.
    found = sorted(folder.rglob(f"*{RESULTS_ENDING}"), key=lambda path: (path.name, str(path)))
    if not found:
        raise VITaskError(
            f"results folder {str(directory)!r} holds no results of lmms-eval (*{RESULTS_ENDING}) and no log of a "
            "training (trainer_state.json); either it is another folder, or the evaluation failed: see its output"
        )
    return found


def read_results(directory: str | Path) -> dict[str, TaskResult]:
    """{task: result} of the latest evaluation that lmms-eval wrote below `directory` (its `--output_path`).

    Raises:
        VITaskError: if there is none, or a file is not as lmms-eval and this version of the tasks write it.
    """
    return read_file(results_files(directory)[-1])[1]


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, TaskResult]]:
    """The parsed results file, and {task: result} of it and of the samples beside it.

    `vitask_folder` of a folder `aptos` is called `vitask_aptos`, so that several sets have names of their own; for
    another split than test see `on_split`.

    Raises:
        VITaskError: naming the file, if it or a file of samples is damaged or of another version of the tasks.
    """
    record = read_json(path, "lmms-eval results")
    RESULTS.check(record, f"lmms-eval results {str(path)!r}")
    found = [(task, _task_result(path, record, task)) for task in record["results"]]
    return record, {_name(task, result): result for task, result in found}


def _name(task: str, result: TaskResult) -> str:
    """The task's name; of `vitask_folder`, which is one name for all of one's own sets, `vitask_<the set's folder>`.

    The folder stands in the samples alone: without them the name stays.
    """
    base, variant = split_task(task)
    if not is_ours(task) and not _is_our_group(task):
        return task
    if base != _FOLDER_TASK or result.data is None:
        return on_split(task, result.split)
    name = own_task(result.data.file.partition("/")[0])
    return on_split(f"{name}_{variant}" if variant else name, result.split)


def headline(results: Mapping[str, TaskResult], task: str) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """Accuracy, macro-F1 and AUC of a task, None where one is not defined, and the 95% intervals that are known.

    Accuracy is the paper's: of several labels to an image, the share of images with all of them right. The AUC comes
    from the labels' likelihoods.

    Args:
        results: of one run, with the `_score` variants.
    """
    own, scored = results[task], results.get(f"{task}_score")
    sources = {"accuracy": (own, "subset_accuracy"), "macro_f1": (own, "macro_f1"), "auc": (scored, "auc")}
    figures: dict[str, float | None] = {}
    intervals = {}
    for name, (result, metric) in sources.items():
        figures[name] = None if result is None else result.metrics.get(metric)
        if result is not None and metric in result.intervals:
            intervals[name] = list(result.intervals[metric])
    return figures, intervals


def own_task(folder: str) -> str:
    """What `read_file` calls the task `vitask_folder` of a folder of this name."""
    name = f"vitask_{folder}".replace("@", "-")
    stem, ending = split_task(name)
    # A folder x_score is not the variant of a set x.
    return f"{stem}-{ending}" if ending else name


def _task_result(path: Path, record: Mapping[str, Any], task: str) -> TaskResult:
    found = record["results"][task]
    reported = _values(found)
    intervals = {
        name.removesuffix(INTERVAL): (float(ends[0]), float(ends[1]))
        for name, ends in reported.items()
        if name.endswith(INTERVAL) and isinstance(ends, list) and all(_finite(end) is not None for end in ends)
    }
    metrics = {
        name: _finite(value)
        for name, value in reported.items()
        if "_stderr" not in name and not name.endswith(INTERVAL) and not isinstance(value, list | dict)
    }
    parts = record.get("group_subtasks", {}).get(task)
    if parts:
        # Not every version of lmms-eval writes a group's.
        if _is_our_group(task) and isinstance(record["versions"].get(task), int | float):
            _check_version(path, record, task)
        return TaskResult(metrics, intervals, split=_judged_split(record, task), group=True, source=path)
    sizes = record.get("n-samples", {}).get(task)
    images = (sizes["effective"], sizes["original"]) if sizes else None
    if not is_ours(task):
        return TaskResult(metrics, intervals, images=images, source=path)
    _check_version(path, record, task)
    samples = path.with_name(f"{path.name.removesuffix(RESULTS_ENDING)}_samples_{task}.jsonl")
    scored = split_task(task)[1] == "score"
    answers, data = _read_samples(samples, scored) if samples.is_file() else ({}, None)
    if answers and images and len(answers) != images[0]:
        raise VITaskError(
            f"{str(samples)!r} holds {len(answers)} samples, but {images[0]} were judged; evaluate it again"
        )
    split = data.split if data else _judged_split(record, task)
    return TaskResult(metrics, intervals, answers, data, images, split, source=path)


def _judged_split(record: Mapping[str, Any], task: str) -> str:
    """As the task's configuration in the results says it; results that do not say are of the test split.

    Args:
        task: or a group, which has no configuration of its own.
    """
    while members := record.get("group_subtasks", {}).get(task):
        task = members[0]
    return (record.get("configs", {}).get(task) or {}).get("test_split") or TEST


def _values(found: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval writes `name,filter`; a task of its own may have several filters, ours have none."""
    pairs = [(*key.partition(",")[::2], value) for key, value in found.items() if "," in key]
    return {name if kind == "none" else f"{name} ({kind})": value for name, kind, value in pairs}


def _is_our_group(task: str) -> bool:
    return is_ours(f"{task}_")


def _check_version(path: Path, record: Mapping[str, Any], task: str) -> None:
    version = record["versions"].get(task)
    if version != TASK_VERSION:
        raise VITaskError(
            f"{str(path)!r}: task {task!r} is of version {version}, but this program reads version {TASK_VERSION}, "
            "whose figures are not comparable; evaluate it again"
        )


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def _read_samples(path: Path, scored: bool) -> tuple[dict[int, Answer], Data | None]:
    answers: dict[int, Answer] = {}
    data = None
    for number, line in _lines(path):
        where = f"{str(path)!r}, line {number}"
        said = f"{where}: not a sample as the tasks of version {TASK_VERSION} log it; the line"
        sample = parse_json(line, said, finite=False)
        SAMPLE.check(sample, said)
        needed = ("log_likelihoods", "probabilities") if scored else ("strict",)
        lacking = next((name for name in needed if name not in sample["n"]), None)
        if lacking is not None or not (scored or "filtered_resps" in sample):
            raise VITaskError(f"{said} has no {lacking or 'filtered_resps'!r}; evaluate it again")
        index, answer, found = sample["doc_id"], _answer(sample, scored), _data(sample["n"])
        if index in answers:
            raise VITaskError(f"{where}: image {index} is there twice; remove the folder and evaluate it again")
        if data not in (None, found):
            raise VITaskError(f"{where}: judged on {found}, but earlier lines on {data}; evaluate them apart")
        answers[index], data = answer, found
    return dict(sorted(answers.items())), data


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise VITaskError(f"{str(path)!r} is not text ({error}); evaluate it again") from None


def _answer(sample: Mapping[str, Any], scored: bool) -> Answer:
    logged = sample["n"]
    label, prediction = logged["label"], logged["prediction"]
    known = {name: str(logged.get(name, "")) for name in ("source", "group")}
    if scored:
        likely = tuple(logged["log_likelihoods"]), tuple(logged["probabilities"])
        return Answer(label, prediction, log_likelihoods=likely[0], probabilities=likely[1], **known)
    return Answer(label, prediction, strict=logged["strict"], text=str(sample["filtered_resps"]), **known)


def _data(logged: Mapping[str, Any]) -> Data:
    return Data(logged["file"], logged["kind"], tuple(logged["choices"]), logged.get("split", TEST))


def label_names(label: Label | None, choices: Sequence[str], none: str) -> str:
    """A label in words; `none` for no class at all and for an answer that names none."""
    if label is None:
        return "no label"
    if isinstance(label, int):
        return choices[label]
    return ", ".join(choices[index] for index in label) or none
