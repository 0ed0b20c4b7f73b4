"""`vitask calibrate`: makes a checkpoint's probabilities as right as they are sure, by its label scores on validation
images, and keeps what was found beside it.

What is fitted, and what the held-out figures mean, is in docs/calibrate.md.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_creatable, check_folder, sha256_file
from vitask_plugin.model_folder import CALIBRATION_FILE
from vitask_plugin.options import COUNT, at_least
from vitask_plugin.tsm.trust import add_flag

if TYPE_CHECKING:
    from vitask_plugin.evaluation.lmms_base import VITaskModel
    from vitask_plugin.evaluation.validation_data import TaskImages
    from vitask_plugin.inference.calibration import Round, Scored
    from vitask_plugin.record.calibration import Calibration


@dataclass(frozen=True)
class Wishes:
    """What thresholds are to reach; None = not asked for. `positive`: the class; None = each by itself."""

    sensitivity: float | None = None
    specificity: float | None = None
    positive: str | None = None
    error_rate: float | None = None

    def check(self, tasks: list["TaskImages"]) -> None:
        """Raises a VITaskError where they say nothing, or nothing of these tasks."""
        if self.positive is None:
            return
        if self.sensitivity is None and self.specificity is None:
            raise VITaskError(f"--positive {self.positive!r} is of use with --sensitivity or --specificity; give one")
        for task in tasks:
            if self.positive not in task.classes:
                raise VITaskError(
                    f"--positive {self.positive!r} is no class of task {task.task!r}, which has "
                    f"{', '.join(task.classes)}; give one of these, or --task with the one that is meant"
                )


@dataclass(frozen=True)
class Calibrated:
    """What was fitted for one task, without exemplars or with: the calibration, and `about` as the file keeps it."""

    calibration: "Calibration"
    about: dict[str, Any]


def calibrate(
    checkpoint: str | Path,
    data: str | Path,
    image_folder: str | Path | None = None,
    *,
    judge: str | Path | None = None,
    task: str | None = None,
    wishes: Wishes | None = None,
    **model_args: Any,
) -> Iterator[Calibrated]:
    """Fits, judges and writes the calibration of each task in the data, without exemplars and, if there are, with.

    Args:
        image_folder: of both files; None = `images` beside each.
        judge: data to judge by; None = the same data, cross-validated.
        task: the only one to calibrate; None = all.
        model_args: of our lmms-eval models, see `VITaskModel`.

    Raises:
        VITaskError: the data is a test split, or was trained on as far as the checkpoint's record tells, or shares
            images or groups with `judge`; too few images; a class without one that a threshold needs.
    """
    from vitask_plugin.data.splits import check_not_test
    from vitask_plugin.evaluation import validation_data
    from vitask_plugin.method.connector import LEARNED
    from vitask_plugin.record.checkpoint import read_record

    check_folder(checkpoint, "checkpoint")
    check_creatable(Path(checkpoint) / CALIBRATION_FILE)
    check_not_test(data)
    tasks, wishes = validation_data.read_tasks(data, _images(data, image_folder), task), wishes or Wishes()
    wishes.check(tasks)
    record = read_record(checkpoint)
    own = [image for one in tasks for image in one.images]
    compared = validation_data.compared_with_training(record, data, _images(data, image_folder), own)
    judging = {} if judge is None else _judging(tasks, own, data, judge, image_folder)
    label_scores, open_model = _through_lmms_eval()
    learned = record is not None and record["ep"] == LEARNED
    model = open_model(checkpoint, ep=model_args.get("tsm") is not None or learned, **model_args)
    about = {"data": _file(data), "judged_by": None if judge is None else _file(judge), "training_data": compared}
    for one in tasks:
        for ep in _branches(model, one):
            yield _calibrated(checkpoint, model, one, judging.get(one.task), ep, wishes, about, label_scores)


def _images(data: str | Path, given: str | Path | None) -> Path:
    return Path(data).parent / "images" if given is None else Path(given)


def _file(path: str | Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256_file(path)}


def _through_lmms_eval() -> Any:
    try:
        from vitask_plugin.evaluation.lmms_scores import label_scores, open_model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lmms_eval":
            raise
        raise VITaskError(
            "`vitask calibrate` asks the model as lmms-eval does, which is not installed; pip install "
            "'vitask-plugin[eval]'"
        ) from None
    return label_scores, open_model


def _judging(
    tasks: list["TaskImages"], own: list[Any], data: str | Path, judge: str | Path, image_folder: str | Path | None
) -> dict[str, "TaskImages"]:
    from vitask_plugin.evaluation.validation_data import check_apart, read_tasks

    found = {}
    for one in tasks:
        (other,) = read_tasks(judge, _images(judge, image_folder), one.task)
        for what in ("classes", "question", "multi_label"):
            if getattr(one, what) != getattr(other, what):
                raise VITaskError(
                    f"task {one.task!r} has the {what} {getattr(one, what)!r} in {str(data)!r} and "
                    f"{getattr(other, what)!r} in --judge {str(judge)!r}; give two files of one task"
                )
        found[one.task] = other
    images = [image for one in found.values() for image in one.images]
    check_apart((f"data file {str(data)!r}", own), (f"--judge {str(judge)!r}", images))
    return found


def _branches(model: "VITaskModel", one: "TaskImages") -> list[bool]:
    prompted = model.prompting is not None and model.prompting.covers(one.images[0].block)
    return [False, True] if prompted else [False]


def _calibrated(
    checkpoint: str | Path,
    model: "VITaskModel",
    asked: "TaskImages",
    judged: "TaskImages | None",
    ep: bool,
    wishes: Wishes,
    about: dict[str, Any],
    label_scores: Any,
) -> Calibrated:
    from vitask_plugin.data.instructions import kind_of
    from vitask_plugin.evaluation.calibration_figures import figures
    from vitask_plugin.inference.calibration import Round, Scored, chosen_fit, cross_fitted, untouched
    from vitask_plugin.record.calibration import Calibration
    from vitask_plugin.record.calibration_file import connector_hash, write_calibration

    blank = Calibration(
        *(asked.task, ep, asked.classes, 1.0, ()),
        multi_label=asked.multi_label,
        question=asked.question,
        tsm=model.tsm.hash if ep and model.tsm is not None else None,
        connector=connector_hash(model.connector_folder) if ep else None,
    )
    images, units = Scored(label_scores(model, asked, ep=ep), asked.targets), asked.units()
    fitted, choice = chosen_fit(untouched(blank), images, units)
    if judged is None:
        rounds = list(cross_fitted(fitted, images, units))
    else:
        rounds = [Round(fitted, images, Scored(label_scores(model, judged, ep=ep), judged.targets))]
    found = _with_thresholds(fitted, images, rounds, wishes)
    kind = kind_of(asked.classes, multi_label=asked.multi_label)
    about = about | {"images": len(images.targets), "choice": asdict(choice), "figures": figures(rounds, kind)}
    write_calibration(checkpoint, found, about)
    return Calibrated(found, about)


def _with_thresholds(
    calibration: "Calibration", images: "Scored", rounds: list["Round"], wishes: Wishes
) -> "Calibration":
    from vitask_plugin.inference.thresholds import abstention_of, threshold_of
    from vitask_plugin.record.calibration import AIMS

    classes = calibration.classes if wishes.positive is None else (wishes.positive,)
    wished = [(aim, value) for aim in AIMS if (value := getattr(wishes, aim)) is not None]
    thresholds = [
        threshold_of(calibration, images, rounds, name, aim, value) for aim, value in wished for name in classes
    ]
    kept_back = None
    if wishes.error_rate is not None:
        kept_back = abstention_of(calibration, images, rounds, wishes.error_rate)
    return replace(calibration, thresholds=tuple(thresholds), abstention=kept_back)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="folder of the checkpoint; calibration.json is written into it")
    add("--data", required=True, metavar="JSON", help="LLaVA JSON of validation images that were not trained on")
    add("--image-folder", metavar="DIR", help="folder the image paths are relative to (default: images beside JSON)")
    judge = "other images to judge by, say test.json (default: the same data, cross-validated)"
    add("--judge", metavar="JSON", help=judge)
    add("--task", metavar="NAME", help="the only task of the data to calibrate (default: all)")
    add("--tsm", metavar="DIR", help="folder of the TSM: calibrates with exemplars too")
    add("--connector", metavar="DIR", help="folder of the connector made for that TSM, if it is not the checkpoint's")
    add("--model-base", metavar="DIR", help="the model a LoRA checkpoint was trained from")
    share = {"type": float, "action": at_least(0, 1, above=True), "metavar": "X"}
    add("--sensitivity", help="find the threshold that finds this share of a class, as .95", **share)
    add("--specificity", help="find the threshold that this share of the others stays below", **share)
    add("--positive", metavar="CLASS", help="the class of both (default: each class against the others)")
    wrong = "find the probability below which to give no answer, that this share of the answers is wrong"
    add("--error-rate", type=float, action=at_least(0, 1), metavar="X", help=wrong)
    add("--batch-size", type=int, action=COUNT, default=8, metavar="N", help="images per forward (default 8)")
    add("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16 (default: as the weights are)")
    add("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add_flag(parser)
    add("--any-image-size", action="store_true", help="go on if the images are unlike those of training")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vitask_plugin.calibrate_tables import show

    found = calibrate(
        args.checkpoint,
        args.data,
        args.image_folder,
        judge=args.judge,
        task=args.task,
        wishes=Wishes(args.sensitivity, args.specificity, args.positive, args.error_rate),
        tsm=args.tsm,
        connector=args.connector,
        model_base=args.model_base,
        trust_tsm_code=args.trust_tsm_code,
        image_size="any" if args.any_image_size else None,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=None if args.device == "auto" else args.device,
    )
    console = Console()
    for one in found:
        show(one.calibration, one.about, console)
    console.print(str(Path(args.checkpoint) / CALIBRATION_FILE), highlight=False, soft_wrap=True)
