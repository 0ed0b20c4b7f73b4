"""`vitask tsm train`: any timm classifier, trained jointly on several data sets with one shared head.

The loss of a sample is computed over its own data set's classes only (`joint.py`). The checkpoint kept is the best by
validation.
"""

import argparse
import copy
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from vitask_plugin.data.comparison import Seen, check_prepared
from vitask_plugin.data.difference import Images
from vitask_plugin.data.instructions import tasks_of
from vitask_plugin.data.preparation import prepared
from vitask_plugin.data.sizes import measured
from vitask_plugin.data.splits import check_not_test
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, write_json
from vitask_plugin.tsm.backbone import build_timm, native_image_size, pixel_statistics, timm_options
from vitask_plugin.tsm.cross_fitting import brought_together
from vitask_plugin.tsm.epoch_log import EpochLog, check_tracker
from vitask_plugin.tsm.fitting import Fit
from vitask_plugin.tsm.folds import Folds, assigned
from vitask_plugin.tsm.initial import lineage, load_initial, start_from
from vitask_plugin.tsm.joint import arranged, class_count, nearly_sharing, sharing
from vitask_plugin.tsm.model import FOLDS, METRICS_FILE, OUTPUT_FILES, TSM
from vitask_plugin.tsm.optimization import check_optimizer
from vitask_plugin.tsm.out_of_fold import OutOfFold
from vitask_plugin.tsm.overlap import check_other_files, check_overlap
from vitask_plugin.tsm.pretrained import start_pretrained
from vitask_plugin.tsm.processes import Processes
from vitask_plugin.tsm.progress import forget, training_folder
from vitask_plugin.tsm.samples import LabelledImage, check_pictures, read_labelled
from vitask_plugin.tsm.settings import Settings, add_flags, check_precision, from_flags
from vitask_plugin.tsm.temperature import fitted

logger = logging.getLogger(__name__)


def train(
    settings: Settings,
    data: Sequence[str | Path],
    val: Sequence[str | Path],
    image_folders: Sequence[str | Path],
    output: str | Path,
) -> TSM:
    """Trains, and writes the TSM that was best on validation to `output`, with `metrics.json` and `log.jsonl`.

    Best: the highest mean over tasks of the validation accuracy (`joint.correctness`); of equals, the lowest mean over
    tasks of the validation loss. An interrupt (Ctrl-C) ends the training and keeps the best so far, where one process
    trains one network. After any other end the same call goes on behind the last whole epoch.

    Args:
        data, val: LLaVA JSON files; samples without a `vitask` block are passed over.
        image_folders: one for all files, or one for each file of `data` and, in the same order, of `val`.
        output: folder to write; an older TSM there is replaced at the end.

    Raises:
        VITaskError: on bad data or settings, or if the loss is no longer a number. Nothing is left behind.
        KeyboardInterrupt: if interrupted before the first epoch was validated.
    """
    check_replaceable(output, OUTPUT_FILES)
    check_tracker(settings.report_to)
    check_optimizer(settings)
    check_precision(settings)
    for path in val:
        check_not_test(path, "--val")
    processes = Processes(settings.device)
    images = read_labelled(data, image_folders, training=True)
    val_images = read_labelled(val, image_folders, training=False)
    check_overlap(images, val_images, settings.allow_shared_groups)
    tasks = arranged(_tasks(images, val_images), separate=settings.separate_heads)
    if not settings.separate_heads and processes.is_main:
        _say_what_is_shared(tasks)
    check_pictures(images, "training data", refuse=True)
    check_pictures(val_images, "validation data", refuse=False)
    check_other_files(images, val_images)
    seen = _seen(images, settings.any_image_size)
    if not settings.any_image_size:
        validated = Seen("the validation data", _seen(val_images, False))
        check_prepared(Seen("this TSM would be trained", seen), validated)
    initial = None if settings.init is None else load_initial(settings.init, settings.arch)
    folds = assigned(images, settings.folds, settings.seed) if settings.folds else None
    trainer = _Trainer(settings, processes, tasks, seen, initial, Path(output))
    whole = trainer.fit(images, val_images)
    parts = [
        trainer.fit(folds.without(fold, images), val_images, fold) for fold in range(settings.folds if folds else 0)
    ]
    if processes.is_main:
        together = None
        if folds is not None:
            together = brought_together(
                whole.tsm, [part.tsm for part in parts], folds, images, val_images, settings.seed
            )
        whole = _written(whole, parts, folds, together, output)
        forget(output)
    processes.wait()
    processes.end()
    return whole.tsm


@dataclass(frozen=True)
class _Trained:
    """A trained network, and the files about its training."""

    tsm: TSM
    metrics: dict[str, Any]
    log: Path

    def save(self, directory: Path) -> None:
        self.tsm.save(directory)
        self.save_history(directory)

    def save_history(self, directory: Path) -> None:
        write_json(directory / METRICS_FILE, self.metrics)
        shutil.copyfile(self.log, directory / self.log.name)


@dataclass(frozen=True)
class _Trainer:
    """What the networks of one TSM's training have in common."""

    settings: Settings
    processes: Processes
    tasks: dict[str, Any]
    seen: Images
    initial: TSM | None
    output: Path

    def fit(
        self, images: Sequence[LabelledImage], val_images: Sequence[LabelledImage], fold: int | None = None
    ) -> _Trained:
        """Trains one network on some images; `fold` is which part of the training data they lack."""
        settings, name = self.settings, "whole" if fold is None else f"fold-{fold}"
        title = "TSM" if fold is None else f"TSM without fold {fold + 1} of {settings.folds}"
        with self._reproducible():
            network, record, said = _network(settings, self.tasks, self.initial)
            if said and fold is None and self.processes.is_main:
                tqdm.write(said)
            record["images"] = self.seen
            # Refuses an impossible image size now and not after the last epoch. A copy, since a TSM is frozen.
            TSM(copy.deepcopy(network), record)
            folder = training_folder(self.output) / name
            runs = self.output.parent / f"{self.output.name}.runs"
            tracker = settings.report_to if self.processes.is_main else "none"
            log = EpochLog(folder, tracker, runs, name, settings.record())
            network = network.to(self.processes.device)
            fit = Fit(settings, network, record, images, val_images, self.processes, folder, log, title)
            fit.run(interruptible=self.processes.count == 1 and not settings.folds)
            record["temperature"] = fitted(fit.answers(), self.tasks)
        return _Trained(TSM(network.cpu(), record), fit.metrics(), log.path)

    @contextmanager
    def _reproducible(self) -> Iterator[None]:
        on_gpu = self.processes.device.type == "cuda"
        devices = range(torch.cuda.device_count()) if on_gpu else []
        with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            torch.manual_seed(self.settings.seed)
            yield


def _written(
    whole: _Trained,
    parts: Sequence[_Trained],
    folds: Folds | None,
    together: tuple[OutOfFold, list[dict[str, float]]] | None,
    output: str | Path,
) -> _Trained:
    """Writes the TSM's folder; the TSM as it is in there."""
    with atomic_directory(output) as directory:
        if together is not None:
            networks, residuals = together
            record = networks.save(directory)
            for number, part in enumerate(parts):
                part.save_history(directory / FOLDS / str(number))
            sizes = [folds.numbers.count(fold) for fold in range(folds.count)]
            record |= {"by": folds.by, "images": sizes, "residual": residuals}
            whole = replace(whole, tsm=TSM(whole.tsm.backbone.network, {**whole.tsm.record, "folds": record}))
        whole.save(directory)
    return whole


def _tasks(images: list[LabelledImage], val_images: list[LabelledImage]) -> dict[str, Any]:
    tasks = tasks_of({"vitask": image.block} for image in images)
    tasks_of({"vitask": image.block} for image in [*images, *val_images])  # the same choices in both
    validated = {image.block["task"] for image in val_images}
    if validated != set(tasks):
        raise VITaskError(
            f"the training data has the tasks {sorted(tasks)}, the validation data {sorted(validated)}; "
            "give both files for each task"
        )
    return tasks


def _seen(images: Sequence[LabelledImage], several: bool) -> Images:
    files: dict[str | Path, list[tuple[str, bytes | Path]]] = {}
    for image in images:
        files.setdefault(image.source, []).append((image.block["task"], image.path))
    return prepared({source: measured(own) for source, own in files.items()}, several=several)


def _say_what_is_shared(tasks: Mapping[str, Any]) -> None:
    for names in sharing(tasks):
        tqdm.write(
            f"tasks {', '.join(names)} have the same labels in the same order and share their "
            f"{len(tasks[names[0]]['choices'])} of the head's {class_count(tasks)} columns; --separate-heads gives "
            "each its own"
        )
    for names in nearly_sharing(tasks):
        written = ", ".join(f"{name} {list(tasks[name]['choices'])!r}" for name in names)
        logger.warning(
            "tasks have the same labels in another order or spelling, and so each has columns of its own: %s; write "
            "them alike to have them share",
            written,
        )


def _network(
    settings: Settings, tasks: dict[str, Any], initial: TSM | None
) -> tuple[nn.Module, dict[str, Any], str | None]:
    """The network to train, its record, and where its weights come from, in words."""
    arch = settings.arch or initial.record["source"]["timm"]
    size = settings.image_size or (initial and initial.record["image_size"])
    options = timm_options(arch, class_count(tasks), size)
    dropped = {"drop_rate": settings.drop, "drop_path_rate": settings.drop_path}
    dropped = {name: value for name, value in dropped.items() if value}
    said = None
    try:
        if settings.pretrained:
            network, said = start_pretrained(arch, class_count(tasks), options, settings.pretrained, dropped)
        else:
            network = build_timm(arch, class_count(tasks), {**options, **dropped})
    except TypeError as error:  # timm's for an option that the architecture does not have
        wrong = [name for name in dropped if repr(name) in str(error)]
        if not wrong:
            raise
        flag = f"--{wrong[0].removesuffix('_rate').replace('_', '-')}"
        raise VITaskError(f"timm's {arch!r} has no {flag}; leave it out") from None
    mean, std = pixel_statistics(network)
    record = {
        "source": {"timm": arch, "options": options},
        "image_size": size or native_image_size(network),
        "mean": mean,
        "std": std,
        "tasks": tasks,
    }
    if initial is not None:
        said = start_from(network, tasks, initial)
        record |= {"mean": initial.record["mean"], "std": initial.record["std"], "init": lineage(initial)}
    return network, record, said


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="JSON", help="training data: LLaVA JSON files")
    add("--val", required=True, nargs="+", metavar="JSON", help="validation data for the same tasks")
    add("--image-folder", required=True, nargs="+", metavar="DIR", help="one for all files, or one for each")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    tsm = train(from_flags(args), args.data, args.val, args.image_folder, args.out)
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(f"TSM {tsm.hash[:12]} in {args.out}; its validation by epoch is in {Path(args.out) / METRICS_FILE}")
