"""`vitask predict`: class probabilities of a tuned checkpoint for images of any kind, as a table.

What is written is what `Specialist.predict` says, and what lmms-eval's `_score` tasks score. Killed at any moment, the
same command goes on.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_creatable
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import CONFIG_FILE, base_of, check_checkpoint
from vitask_plugin.options import COUNT
from vitask_plugin.specialist.flags import add_flags, keywords

if TYPE_CHECKING:
    from vitask_plugin.specialist.parts import Parts
    from vitask_plugin.specialist.prediction import Prediction

WAYS = {"true": True, "false": False, "average": "average"}
STRICT_STATUS = 2
SHOWN = 20  # labels of the last line


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="output folder of a training run, of LLaVA or in HF format, LoRA or whole")
    add(
        "images",
        nargs="+",
        metavar="IMAGES_OR_CSV",
        help="image files, folders of them, or a CSV with the column image",
    )
    add("--ep", choices=WAYS, help="with exemplars, without, or the mean of both (default: true if --tsm is given)")
    add("--answer", action="store_true", help="the answer in words too (slower)")
    add("--out", type=Path, default=Path("predictions.csv"), metavar="CSV", help="table to write (predictions.csv)")
    add("--strict", action="store_true", help=f"end with status {STRICT_STATUS} at the first image that cannot be read")
    add("--image-folder", metavar="DIR", help="CSV: what paths are relative to (default: the CSV's)")
    add("--image-column", default="image", metavar="NAME", help="CSV: column of the images (default image)")
    add("--batch-size", type=int, action=COUNT, default=8, metavar="N", help="images per forward (default 8)")
    add("--processes", type=int, action=COUNT, default=1, metavar="N", help="each with a model and a GPU of its own")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vitask_plugin.record.checkpoint import read_record
    from vitask_plugin.specialist import csv_file
    from vitask_plugin.specialist.inputs import inputs_of
    from vitask_plugin.specialist.parts import key
    from vitask_plugin.specialist.question import question_of
    from vitask_plugin.specialist.work import Work, predict

    check_checkpoint(args.checkpoint)
    load = _load(args)
    question = question_of(read_record(args.checkpoint), args.checkpoint, args.task, args.labels)
    if args.out.resolve() in [Path(place).resolve() for place in args.images]:
        raise VITaskError(f"--out {str(args.out)!r} is one of the inputs, which it would replace; choose another --out")
    check_creatable(args.out)
    csv_file.check_own(args.out)
    images = inputs_of(args.images, args.image_folder, args.image_column)
    ep, parts = WAYS[args.ep] if args.ep else None, _parts(args)
    keys, known = [key(image) for image in images], parts.known()
    left = [image for image, own in zip(images, keys, strict=True) if own not in known]
    if len(left) < len(images):
        tqdm.write(f"{len(images) - len(left)} of {len(images)} images are there from a run that was ended")
    work = Work(load, args.device, ep, args.answer, args.batch_size, parts)
    bar = tqdm(total=len(images), initial=len(images) - len(left), desc="Predicting", unit="image")
    with bar, contextlib.closing(predict(work, left, args.processes)) as events:
        for kind, what in events:
            if kind == "line":
                tqdm.write(what)
                continue
            bar.update()
            if what is not None and args.strict:
                tqdm.write(f"vitask: error: {what} (--strict)", file=sys.stderr)
                return STRICT_STATUS
    found = parts.all()
    predictions = [found[own] for own in keys]
    csv_file.write(args.out, question.choices, predictions, answer=args.answer)
    parts.remove()
    tqdm.write(_summary(predictions, args.out))
    return 0


def _load(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `Specialist.load`, but for the device."""
    return {"checkpoint": args.checkpoint, **keywords(args)}


def _parts(args: argparse.Namespace) -> "Parts":
    from vitask_plugin.record.base import local_folder
    from vitask_plugin.record.checkpoint import versions
    from vitask_plugin.record.host import TOWER
    from vitask_plugin.specialist.parts import Parts, stamps

    path = Path(args.checkpoint) / CONFIG_FILE
    tower = read_json(path, "model configuration").get(TOWER) if path.is_file() else None
    named = [args.model_base or base_of(args.checkpoint), tower]  # folders, or names in the Hub's cache
    folders = [args.checkpoint, *(local_folder(name) for name in named if name), args.tsm, args.connector, args.labels]
    # Not what the figures do not depend on: how they are computed, and where they go.
    asked = {**_load(args), "ep": args.ep, "answer": args.answer}
    return Parts(args.out, {**asked, "files": stamps(folders, but=args.out), "versions": versions()})


def _summary(predictions: Sequence["Prediction"], out: Path) -> str:
    failed = [one for one in predictions if one.error is not None]
    counts = Counter(one.label for one in predictions if one.error is None)
    labels = ", ".join(f"{label} {count}" for label, count in counts.most_common(SHOWN))
    more = ", ..." if len(counts) > SHOWN else ""
    line = f"{out}: {len(predictions)} images ({labels}{more})" if counts else f"{out}: {len(predictions)} images"
    if not failed:
        return line
    return f"{line}; {len(failed)} could not be read, see the column error, the first: {failed[0].error}"
