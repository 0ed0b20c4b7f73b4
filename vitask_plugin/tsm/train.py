"""`vitask tsm train`: any timm classifier, trained jointly on several data sets with one shared head.

The loss of a sample is computed over its own data set's classes only (`joint.py`). The checkpoint kept is the best by
validation.
"""

import argparse
import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitask_plugin.data.comparison import Seen, check_prepared
from vitask_plugin.data.difference import Images
from vitask_plugin.data.instructions import tasks_of
from vitask_plugin.data.preparation import prepared
from vitask_plugin.data.sizes import measured
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, write_json
from vitask_plugin.options import LARGEST_REAL, LARGEST_SEED, check_number
from vitask_plugin.tsm.backbone import build_timm, native_image_size, pixel_statistics, timm_options
from vitask_plugin.tsm.device import as_device
from vitask_plugin.tsm.initial import lineage, load_initial, start_from
from vitask_plugin.tsm.joint import arranged, class_count, joint_loss, nearly_sharing, sharing
from vitask_plugin.tsm.model import METRICS_FILE, OUTPUT_FILES, TSM, preprocess
from vitask_plugin.tsm.overlap import check_overlap
from vitask_plugin.tsm.samples import LabelledImage, batches, check_pictures, make_loader, read_labelled
from vitask_plugin.tsm.validation import validate

logger = logging.getLogger(__name__)
FLIPS = {"none": (), "horizontal": (3,), "both": (3, 2)}  # mirrored dimensions of [B, 3, S, S]


@dataclass(frozen=True)
class Settings:
    """How to train. The paper trains a ViT-Base for 30 epochs; it reports nothing else of this.

    Attributes:
        arch: name of a timm model; None = that of `init`.
        pretrained: start from timm's pretrained weights.
        init: folder of an earlier TSM of this architecture whose weights to start from; its image size and pixel
            statistics are kept. The result is still another TSM: see `vitask connector align`.
        image_size: side in pixels; None = what the architecture was made for.
        epochs: at most. patience: epochs without a better validation before an early stop, 0 = off.
        batch_size: images.
        lr: peak learning rate of AdamW, after a warm-up over the first tenth of the steps and before a cosine to 0;
            None = 1e-4 with pretrained weights or `init`, else 1e-3. weight_decay: of AdamW, not on biases and norms.
        flip: random mirroring of training images: none, horizontal (left-right) or both (also top-bottom). Off by
            default, since left and right can be what tells classes apart.
        separate_heads: tasks with the same labels in the same order have columns of their own too; else they share.
        allow_shared_groups: go on if a group (patient, lesion, slide) is in the training and the validation data.
        any_image_size: go on if the files of a task hold images of other sizes, or prepared in other ways.
        seed: same seed, data and machine = same weights. workers: processes that read images, 0 = this one.
        device: auto, cpu, cuda, cuda:1, ...

    Raises:
        VITaskError: on a value that cannot work.
    """

    arch: str | None = None
    pretrained: bool = False
    init: str | None = None
    image_size: int | None = None
    epochs: int = 30
    patience: int = 0
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 0.05
    flip: str = "none"
    separate_heads: bool = False
    allow_shared_groups: bool = False
    any_image_size: bool = False
    seed: int = 0
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.arch is None and self.init is None:
            raise VITaskError(
                "which network is not said; give --arch NAME, or --init DIR to start from a TSM's weights"
            )
        if self.pretrained and self.init is not None:
            raise VITaskError(f"--init {self.init} and --pretrained are two starts; leave one of them out")
        checks = {
            "--epochs": (self.epochs, 1),
            "--patience": (self.patience, 0),
            "--batch-size": (self.batch_size, 2),
            "--image-size": (self.image_size, 8),
            "--workers": (self.workers, 0),
        }
        for flag, (value, low) in checks.items():
            if value is not None:
                check_number(flag, value, low)
        check_number("--seed", self.seed, 0, LARGEST_SEED)
        if self.lr is not None:
            check_number("--lr", self.lr, 0, LARGEST_REAL, above=True)
        check_number("--weight-decay", self.weight_decay, 0, LARGEST_REAL)
        if self.flip not in FLIPS:
            raise VITaskError(f"--flip is {self.flip}; it must be one of {', '.join(FLIPS)}")


def train(
    settings: Settings,
    data: Sequence[str | Path],
    val: Sequence[str | Path],
    image_folders: Sequence[str | Path],
    output: str | Path,
) -> TSM:
    """Trains, and writes the TSM that was best on validation to `output`, with `metrics.json`.

    Best: the highest mean over tasks of the validation accuracy (`joint.correctness`); of equals, the lowest mean over
    tasks of the validation loss. An interrupt (Ctrl-C) ends the training and keeps the best so far.

    Args:
        data, val: LLaVA JSON files; samples without a `vitask` block are passed over.
        image_folders: one for all files, or one for each file of `data` and, in the same order, of `val`.
        output: folder to write; an older TSM there is replaced at the end.

    Raises:
        VITaskError: on bad data or settings, or if the loss is no longer a number. Nothing is left behind.
        KeyboardInterrupt: if interrupted before the first epoch was validated.
    """
    check_replaceable(output, OUTPUT_FILES)
    device = as_device(settings.device)
    images = read_labelled(data, image_folders, training=True)
    val_images = read_labelled(val, image_folders, training=False)
    check_overlap(images, val_images, settings.allow_shared_groups)
    tasks = arranged(_tasks(images, val_images), separate=settings.separate_heads)
    if not settings.separate_heads:
        _say_what_is_shared(tasks)
    check_pictures(images, "training data", refuse=True)
    check_pictures(val_images, "validation data", refuse=False)
    seen = _seen(images, settings.any_image_size)
    if not settings.any_image_size:
        validated = Seen("the validation data", _seen(val_images, False))
        check_prepared(Seen("this TSM would be trained", seen), validated)
    initial = None if settings.init is None else load_initial(settings.init, settings.arch)
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        torch.manual_seed(settings.seed)
        network, record = _network(settings, tasks, initial)
        record["images"] = seen
        # Refuses an impossible image size now and not after the last epoch. A copy, since a TSM is frozen.
        TSM(copy.deepcopy(network), record)
        run = _Run(settings, network.to(device), record)
        run.fit(images, val_images)
    tsm = TSM(network.cpu(), record)
    with atomic_directory(output) as directory:
        tsm.save(directory)
        write_json(directory / METRICS_FILE, run.metrics())
    return tsm


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


def _network(settings: Settings, tasks: dict[str, Any], initial: TSM | None) -> tuple[nn.Module, dict[str, Any]]:
    arch = settings.arch or initial.record["source"]["timm"]
    size = settings.image_size or (initial and initial.record["image_size"])
    options = timm_options(arch, class_count(tasks), size)
    network = build_timm(arch, class_count(tasks), options, settings.pretrained)
    mean, std = pixel_statistics(network)
    record = {
        "source": {"timm": arch, "options": options},
        "image_size": size or native_image_size(network),
        "mean": mean,
        "std": std,
        "tasks": tasks,
    }
    if initial is not None:
        tqdm.write(start_from(network, tasks, initial))
        record |= {"mean": initial.record["mean"], "std": initial.record["std"], "init": lineage(initial)}
    return network, record


class _Run:
    """One training run: its epochs, and what is remembered of them."""

    def __init__(self, settings: Settings, network: nn.Module, record: dict[str, Any]) -> None:
        self.settings, self.network, self.tasks = settings, network, record["tasks"]
        self.device = next(network.parameters()).device
        self.preprocess = partial(preprocess, image_size=record["image_size"], mean=record["mean"], std=record["std"])
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.stopped = "finished"

    def fit(self, images: list[LabelledImage], val_images: list[LabelledImage]) -> None:
        """Runs the epochs and leaves the best weights in the network."""
        from timm.optim import create_optimizer_v2

        settings = self.settings
        loader, val_loader = self._loader(images, training=True), self._loader(val_images, training=False)
        lr = settings.lr or (1e-4 if settings.pretrained or settings.init else 1e-3)
        optimizer = create_optimizer_v2(self.network, opt="adamw", lr=lr, weight_decay=settings.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(_lr_factor, steps=settings.epochs * len(loader))
        )
        weights: dict[str, Tensor] = {}
        try:
            with tqdm(range(1, settings.epochs + 1), desc="TSM", unit="epoch") as epochs:
                for epoch in epochs:
                    entry = {"epoch": epoch, "train_loss": self._train_epoch(loader, optimizer, scheduler, epoch)}
                    self.network.eval()
                    entry |= validate(self.network, val_loader, self.tasks, self.device)
                    self.history.append(entry)
                    if self.best is None or _rank(entry) > _rank(self.best):
                        self.best = entry
                        weights = {name: value.cpu().clone() for name, value in self.network.state_dict().items()}
                    logger.info("TSM %s", entry)
                    epochs.set_postfix(val=f"{entry['val_accuracy']:.3f}", best=f"{self.best['val_accuracy']:.3f}")
                    if settings.patience and epoch - self.best["epoch"] >= settings.patience:
                        self.stopped = "early"
                        break
        except KeyboardInterrupt:
            if not weights:
                raise
            self.stopped = "interrupted"
        self.network.load_state_dict(weights)

    def _loader(self, images: list[LabelledImage], *, training: bool) -> DataLoader:
        return make_loader(
            images,
            self.tasks,
            self.preprocess,
            training=training,
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            seed=self.settings.seed,
        )

    def _train_epoch(self, loader: DataLoader, optimizer: Any, scheduler: Any, epoch: int) -> float:
        self.network.train()
        total, count = 0.0, 0
        for batch in batches(loader, self.device, f"epoch {epoch}"):
            logits = self.network(self._flip(batch.pixels))
            loss = joint_loss(logits, batch.targets, batch.task, self.tasks).mean()
            if not math.isfinite(loss.item()):
                raise VITaskError(f"the TSM's loss is {loss.item()} in epoch {epoch}; lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total, count = total + loss.item() * len(batch.task), count + len(batch.task)
        return total / count

    def _flip(self, pixels: Tensor) -> Tensor:
        # On the batch, not in the workers: what is drawn does not depend on how many workers there are.
        for dimension in FLIPS[self.settings.flip]:
            chosen = (torch.rand(len(pixels)) < 0.5).to(pixels.device)
            pixels = torch.where(chosen[:, None, None, None], pixels.flip(dimension), pixels)
        return pixels

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds; `stopped` is finished, early or interrupted."""
        return {"best": self.best, "stopped": self.stopped, "settings": asdict(self.settings), "history": self.history}


def _lr_factor(step: int, *, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps`: a linear warm-up over a tenth, then a cosine to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _rank(entry: Mapping[str, Any]) -> tuple[float, float]:
    return entry["val_accuracy"], -entry["val_loss"]


def configure(parser: argparse.ArgumentParser) -> None:
    default = Settings(arch="any")
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="JSON", help="training data: LLaVA JSON files")
    add("--val", required=True, nargs="+", metavar="JSON", help="validation data for the same tasks")
    add("--image-folder", required=True, nargs="+", metavar="DIR", help="one for all files, or one for each")
    add("--arch", metavar="NAME", help="a timm model (the paper: vit_base_patch16_224.augreg_in21k)")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights (downloads them)")
    add("--init", metavar="DIR", help="start from an earlier TSM's weights, which is recorded (then --arch is its own)")
    add("--image-size", type=int, metavar="N", help="side in pixels (default: the architecture's own, or --init's)")
    add("--epochs", type=int, default=default.epochs, metavar="N", help="at most (default %(default)s)")
    add("--patience", type=int, default=default.patience, metavar="N", help="epochs without gain; 0 = off (default)")
    add("--batch-size", type=int, default=default.batch_size, metavar="N", help="images (default %(default)s)")
    add("--lr", type=float, metavar="X", help="peak learning rate (default 1e-3, with --pretrained or --init 1e-4)")
    add("--weight-decay", type=float, default=default.weight_decay, metavar="X", help="(default %(default)s)")
    add("--flip", choices=FLIPS, default=default.flip, help="mirror training images at random (default %(default)s)")
    add(
        "--separate-heads",
        action="store_true",
        help="columns of its own for every task; else tasks with the same labels in the same order share theirs",
    )
    add("--allow-shared-groups", action="store_true", help="go on if a group is in the training and validation data")
    add("--any-image-size", action="store_true", help="go on if a task's files differ in image size or preparation")
    add("--seed", type=int, default=default.seed, metavar="N", help="(default %(default)s)")
    add("--workers", type=int, default=default.workers, metavar="N", help="processes that read images (default 0)")
    add("--device", default=default.device, help="auto (default), cpu, cuda, cuda:1, ...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    tsm = train(settings, args.data, args.val, args.image_folder, args.out)
    tqdm.write(f"TSM {tsm.hash[:12]} in {args.out}; its validation by epoch is in {Path(args.out) / METRICS_FILE}")
