"""How a TSM is trained: every setting of `vitask tsm train`, its check and its flag. Names and meanings are timm's
where timm's own `train.py` has them; the defaults suit medical images: nothing is mixed, erased, cropped or recoloured.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.options import LARGEST_REAL, LARGEST_SEED, check_number

FLIPS = {"none": (0.0, 0.0), "horizontal": (0.5, 0.0), "both": (0.5, 0.5)}  # shares mirrored left-right, top-bottom
SCHEDULES = ("cosine", "tanh", "step", "poly", "constant")  # of timm, those that need nothing but the number of a step
PRECISIONS = ("no", "bf16")
CLASS_WEIGHTS = ("none", "balanced")
TRACKERS = ("none", "tensorboard", "wandb")
# What has no part in the result, so that a killed run may go on with another value.
INDIFFERENT = ("workers", "device", "report_to")


@dataclass(frozen=True)
class Settings:
    """How to train. The paper trains a ViT-Base for 30 epochs; it reports nothing else of this.

    Attributes:
        arch: name of a timm model; None = that of `init`.
        pretrained: True = start from timm's pretrained weights; a file = from the weights in it (safetensors or a torch
            checkpoint); any other text = from those of timm's pretrained weights that have this name.
        init: folder of an earlier TSM of this architecture whose weights to start from; its image size and pixel
            statistics are kept. The result is still another TSM: see `vitask connector align`.
        image_size: side in pixels; None = what the architecture was made for.
        epochs: at most. patience: epochs without a better validation before an early stop, 0 = off.
        batch_size: images, of each process.
        lr: peak learning rate; None = 1e-4 with pretrained weights or `init`, else 1e-3. opt: an optimizer of timm.
        weight_decay: of the optimizer, not on biases and norms. layer_decay: factor of the rate from a layer to the one
            before it; None = one rate for all.
        sched, warmup_epochs, min_lr, decay_epochs, decay_rate: timm's schedule, by steps. All None: a warm-up over the
            first tenth of the steps, then a cosine to 0.
        drop, drop_path: shares of dropout and of stochastic depth. smoothing: of the labels.
        flip: random mirroring of training images: none, horizontal (left-right) or both (also top-bottom). Off by
            default, since left and right can be what tells classes apart. hflip, vflip: the same as shares of images.
        aa: timm's automatic augmentation, such as rand-m9-mstd0.5. color_jitter, reprob (random erasing): as in timm.
        scale: least and largest share of the picture's area that a random crop keeps; None = the whole picture.
        mixup, cutmix: alpha of either, 0 = off; images of one task are mixed with each other.
        class_weights: balanced = each class of a task weighs the same in the loss, however many images it has.
        model_ema: validate and keep the moving average of the weights. model_ema_decay: of it. model_ema_warmup: a
            smaller decay in the first steps.
        mixed_precision: no or bf16; None = what `accelerate launch` says, else no. The TSM itself is float32.
        folds: 0 = off; else that many further TSMs are trained, each without one part of the training images, whose
            features then come from it (see `cross_fitting`).
        report_to: none, tensorboard or wandb.
        separate_heads: tasks with the same labels in the same order have columns of their own too; else they share.
        allow_shared_groups: go on if a group (patient, lesion, slide) is in the training and the validation data.
        any_image_size: go on if the files of a task hold images of other sizes, or prepared in other ways.
        seed: same seed, data and machine = same weights. workers: processes that read images, 0 = this one.
        device: auto, cpu, cuda, cuda:1, ...

    Raises:
        VITaskError: on a value that cannot work.
    """

    arch: str | None = None
    pretrained: bool | str = False
    init: str | None = None
    image_size: int | None = None
    epochs: int = 30
    patience: int = 0
    batch_size: int = 64
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: str | None = None
    warmup_epochs: float | None = None
    min_lr: float | None = None
    decay_epochs: float | None = None
    decay_rate: float | None = None
    drop: float = 0.0
    drop_path: float = 0.0
    smoothing: float = 0.0
    flip: str = "none"
    hflip: float = 0.0
    vflip: float = 0.0
    aa: str | None = None
    color_jitter: float = 0.0
    scale: tuple[float, float] | None = None
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: str = "none"
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    mixed_precision: str | None = None
    folds: int = 0
    report_to: str = "none"
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
        if self.flip != "none" and (self.hflip or self.vflip):
            raise VITaskError(f"--flip {self.flip} and --hflip or --vflip say the same in two ways; leave one out")
        if self.folds == 1:
            raise VITaskError("--folds is 1; it must be at least 2, or 0 for none")
        if self.folds and self.init is not None:
            raise VITaskError(
                f"--folds {self.folds} and --init {self.init} exclude each other: if that TSM has seen these images, "
                "every fold's network has too, and no feature is of an image that it did not see; leave one of them out"
            )
        self._check_numbers()
        for flag, value, known in (
            ("--flip", self.flip, FLIPS),
            ("--sched", self.sched, (None, *SCHEDULES)),
            ("--class-weights", self.class_weights, CLASS_WEIGHTS),
            ("--mixed-precision", self.mixed_precision, (None, *PRECISIONS)),
            ("--report-to", self.report_to, TRACKERS),
        ):
            if value not in known:
                raise VITaskError(f"{flag} is {value}; it must be one of {', '.join(filter(None, known))}")

    def _check_numbers(self) -> None:
        counts = {
            "--epochs": (self.epochs, 1),
            "--patience": (self.patience, 0),
            "--batch-size": (self.batch_size, 2),
            "--image-size": (self.image_size, 8),
            "--workers": (self.workers, 0),
            "--folds": (self.folds, 0),
        }
        for flag, (value, low) in counts.items():
            if value is not None:
                check_number(flag, value, low)
        check_number("--seed", self.seed, 0, LARGEST_SEED)
        for name in ("lr", "decay_epochs", "decay_rate"):
            if getattr(self, name) is not None:
                check_number(_flag(name), getattr(self, name), 0, LARGEST_REAL, above=True)
        for name in ("weight_decay", "warmup_epochs", "min_lr", "color_jitter", "mixup", "cutmix"):
            if getattr(self, name) is not None:
                check_number(_flag(name), getattr(self, name), 0, LARGEST_REAL)
        for name in ("hflip", "vflip", "reprob"):
            check_number(_flag(name), getattr(self, name), 0, 1)
        for name in ("drop", "drop_path", "smoothing", "model_ema_decay"):
            check_number(_flag(name), getattr(self, name), 0, 0.9999999)
        if self.layer_decay is not None:
            check_number("--layer-decay", self.layer_decay, 0, 1, above=True)
        if self.scale is not None:
            for value in self.scale:
                check_number("--scale", value, 0, 1, above=True)
            if self.scale[0] > self.scale[1]:
                raise VITaskError(f"--scale is {self.scale[0]} {self.scale[1]}; the first must be the smaller one")

    @property
    def rate(self) -> float:
        """The peak learning rate that is used."""
        return self.lr or (1e-4 if self.pretrained or self.init else 1e-3)

    @property
    def flips(self) -> tuple[float, float]:
        """Shares of the training images that are mirrored left-right and top-bottom."""
        return FLIPS[self.flip] if self.flip != "none" else (self.hflip, self.vflip)

    @property
    def precision(self) -> str:
        """`no` or `bf16`."""
        return self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def record(self) -> dict[str, Any]:
        """Every setting as JSON, with the rate that is used."""
        return asdict(self) | {"lr": self.rate, "scale": None if self.scale is None else list(self.scale)}

    def decisive(self) -> dict[str, Any]:
        """`record` of what has a part in the result."""
        found = self.record() | {"mixed_precision": self.precision}
        return {name: value for name, value in found.items() if name not in INDIFFERENT}


def check_precision(settings: Settings) -> None:
    """Refuses what `accelerate launch` may ask for and is not done here.

    Raises:
        VITaskError: naming it.
    """
    if settings.precision not in PRECISIONS:
        raise VITaskError(
            f"accelerate was launched with --mixed_precision {settings.precision}; a TSM is trained in no or bf16"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Settings`, under its names."""
    start = parser.add_argument_group("start")
    add = start.add_argument
    add("--arch", metavar="NAME", help="a timm model (the paper: vit_base_patch16_224.augreg_in21k)")
    add(
        "--pretrained",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE_OR_NAME",
        help="start from pretrained weights: alone timm's for --arch (downloaded), or a .safetensors or .pth file, or "
        "the name of others of timm's for it",
    )
    add("--init", metavar="DIR", help="start from an earlier TSM's weights, which is recorded (then --arch is its own)")
    add("--image-size", type=int, metavar="N", help="side in pixels (default: the architecture's own, or --init's)")
    add("--drop", **_real("drop", "share of dropout"))
    add("--drop-path", **_real("drop_path", "share of stochastic depth"))
    _add_optimization(parser.add_argument_group("optimization").add_argument)
    _add_images(parser.add_argument_group("augmentation").add_argument)
    _add_running(parser.add_argument_group("running").add_argument)


def _real(name: str, text: str, metavar: str = "X") -> dict[str, Any]:
    default = Settings.__dataclass_fields__[name].default
    shown = "" if default is None else " (default %(default)s)"
    return {"type": float, "default": default, "metavar": metavar, "help": text + shown}


def _count(name: str, text: str) -> dict[str, Any]:
    return _real(name, text, "N") | {"type": int}


def _add_optimization(add: Any) -> None:
    add("--epochs", **_count("epochs", "at most"))
    add("--patience", **_count("patience", "epochs without gain before an early stop; 0 = off"))
    add("--batch-size", **_count("batch_size", "images of each process"))
    add("--opt", default=Settings.opt, metavar="NAME", help="an optimizer of timm (default %(default)s)")
    add("--lr", **_real("lr", "peak learning rate (default 1e-3, with --pretrained or --init 1e-4)"))
    add("--weight-decay", **_real("weight_decay", "not on biases and norms"))
    add("--layer-decay", **_real("layer_decay", "factor of the rate from each layer to the one before (default: off)"))
    add(
        "--sched",
        choices=SCHEDULES,
        help="timm's schedule, by steps (default: a warm-up over a tenth of the steps, then a cosine to 0; with "
        "another flag of the schedule: cosine)",
    )
    add("--warmup-epochs", **_real("warmup_epochs", "epochs of a linear warm-up", "N"))
    add("--min-lr", **_real("min_lr", "where cosine, tanh and poly end"))
    add("--decay-epochs", **_real("decay_epochs", "epochs between two steps of --sched step (default timm's 90)", "N"))
    add("--decay-rate", **_real("decay_rate", "factor of --sched step, power of poly (default timm's 0.1)"))
    add("--smoothing", **_real("smoothing", "of the labels"))
    add("--class-weights", choices=CLASS_WEIGHTS, default="none", help="balanced = a task's classes weigh the same")
    add("--model-ema", action="store_true", help="validate and keep the moving average of the weights")
    add("--model-ema-decay", **_real("model_ema_decay", "of the average, per step"))
    add("--model-ema-warmup", action="store_true", help="a smaller decay in the first steps; for short trainings")


def _add_images(add: Any) -> None:
    add("--flip", choices=FLIPS, default=Settings.flip, help="mirror half the training images (default %(default)s)")
    add("--hflip", **_real("hflip", "share of training images mirrored left-right"))
    add("--vflip", **_real("vflip", "share mirrored top-bottom"))
    add("--aa", metavar="NAME", help="timm's automatic augmentation, such as rand-m9-mstd0.5 (default: off)")
    add("--color-jitter", **_real("color_jitter", "strength of random brightness, contrast and saturation"))
    add(
        "--scale",
        type=float,
        nargs=2,
        metavar="X",
        help="least and largest share of the area that a random crop keeps (default: the whole picture, no crop)",
    )
    add("--reprob", **_real("reprob", "share of images with a random erasing"))
    add("--mixup", **_real("mixup", "alpha of mixup, 0 = off; within a task"))
    add("--cutmix", **_real("cutmix", "alpha of cutmix, 0 = off; within a task"))


def _add_running(add: Any) -> None:
    add("--folds", **_count("folds", "train N more TSMs, for features of images that were not trained on; 0 = off"))
    add("--mixed-precision", choices=PRECISIONS, help="(default: what `accelerate launch` says, else no)")
    add("--bf16", dest="mixed_precision", action="store_const", const="bf16", help="--mixed-precision bf16")
    add("--report-to", choices=TRACKERS, default=Settings.report_to, help="also log to (default %(default)s)")
    add(
        "--separate-heads",
        action="store_true",
        help="columns of its own for every task; else tasks with the same labels in the same order share theirs",
    )
    add("--allow-shared-groups", action="store_true", help="go on if a group is in the training and validation data")
    add("--any-image-size", action="store_true", help="go on if a task's files differ in image size or preparation")
    add("--seed", **_count("seed", "same seed, data and machine = same weights"))
    add("--workers", **_count("workers", "processes that read images"))
    add("--device", default=Settings.device, help="auto (default), cpu, cuda, cuda:1, ...")


def from_flags(args: argparse.Namespace) -> Settings:
    """The settings that the flags say."""
    found = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    return Settings(**found | {"scale": None if args.scale is None else tuple(args.scale)})
