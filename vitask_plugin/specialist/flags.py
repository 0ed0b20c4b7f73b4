"""The flags of every command that asks a tuned checkpoint, and what they are to `Specialist.load`."""

import argparse
from dataclasses import astuple
from typing import Any

from vitask_plugin.data.window import Window
from vitask_plugin.options import COUNT_OR_NONE
from vitask_plugin.tsm.trust import add_flag


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All but the checkpoint and the device, which commands have in places of their own."""
    add = parser.add_argument
    add("--task", metavar="NAME", help="what to ask about, of several tasks that the checkpoint was trained on")
    add("--tsm", metavar="DIR", help="folder of the TSM, for exemplars")
    add(
        "--model-base",
        metavar="DIR",
        help="of a LoRA checkpoint: what it was trained from (default: as it says)",
    )
    add("--connector", metavar="DIR", help="of another TSM than that of training: what `vitask connector` wrote")
    add("--calibrated", choices=("true", "false"), help="as calibration.json says (default: where there is one)")
    add(
        "--labels",
        metavar="DIR_OR_JSON",
        help="labels.json of a data set: what to ask, in place of the checkpoint's own",
    )
    add(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values that become black and white (default: that of the training images, else what a DICOM file says)",
    )
    add(
        "--frame",
        type=int,
        action=COUNT_OR_NONE,
        metavar="N",
        help="page or frame of files that have several (default: that of training, else 0, the first)",
    )
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto: as the weights were saved (default)")
    add_flag(parser)


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Of `Specialist.load`, but for checkpoint and device.

    Raises:
        VITaskError: the window is empty.
    """
    names = ("task", "tsm", "model_base", "connector", "labels", "dtype", "frame", "trust_tsm_code")
    window = None if args.window is None else astuple(Window(*args.window))  # refused before anything is read
    calibrated = None if args.calibrated is None else args.calibrated == "true"
    return {**{name: getattr(args, name) for name in names}, "window": window, "calibrated": calibrated}
