"""`vitask tsm import`: a classifier that was trained elsewhere, as a TSM.

Either a timm architecture with a checkpoint file, or any torch module that an import path makes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from vitask_plugin.data.instructions import read_samples, tasks_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, write_json
from vitask_plugin.options import COUNT, FINITE, POSITIVE
from vitask_plugin.tsm.backbone import (
    Backbone,
    build_network,
    head_names,
    native_image_size,
    pixel_statistics,
    timm_options,
)
from vitask_plugin.tsm.joint import arranged, class_count
from vitask_plugin.tsm.model import METRICS_FILE, OUTPUT_FILES, TSM
from vitask_plugin.tsm.samples import make_loader, read_labelled
from vitask_plugin.tsm.validation import validate
from vitask_plugin.tsm.weights import Found, read_weights


def import_tsm(
    output: str | Path,
    data: Sequence[str | Path],
    *,
    arch: str | None = None,
    module: str | None = None,
    checkpoint: str | Path | None = None,
    key: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_folders: Sequence[str | Path] = (),
) -> tuple[TSM, dict[str, Any] | None]:
    """Writes a TSM from somebody's classifier.

    Args:
        data: LLaVA JSON files whose tasks the classifier knows, in the order of its head; the columns of a task are in
            the order of its choices. Tasks with the same labels in the same order share columns if the head is as
            narrow as that.
        arch: name of a timm model; `checkpoint` is then required.
        module: "package.module:factory", where factory() gives a torch module that maps pixels [B, 3, S, S] to logits
            [B, K_all] (S = image side, K_all = classes of all tasks). It must be importable wherever the TSM is
            used. A `checkpoint` is loaded into it if given.
        key: which weights of a checkpoint that holds several, such as "ema" or "model".
        image_size, mean, std: what the classifier was trained with; a timm model's own if not given.
        image_folders: as for training; if given, the accuracy on `data` is measured, which shows at once whether the
            order of the classes and the normalisation are right.

    Returns:
        The TSM, and what `validation.validate` found (None without image folders).

    Raises:
        VITaskError: if the parts do not fit together. Nothing is left behind.
    """
    check_replaceable(output, OUTPUT_FILES)
    if (arch is None) == (module is None):
        raise VITaskError("give either --arch NAME with --checkpoint FILE, or --module package.module:factory")
    tasks = tasks_of(sample for path in data for sample in read_samples(path))
    if not tasks:
        raise VITaskError(f"data file {str(data[0])!r} has no sample with a 'vitask' block, so no task to import for")
    if arch is not None:
        network, record = _timm(arch, checkpoint, key, tasks, image_size)
    else:
        network, record = _module(module, checkpoint, key, tasks, image_size, mean, std)
    record |= {"mean": list(mean)} if mean else {}
    record |= {"std": list(std)} if std else {}
    _check_statistics(record)
    tsm = TSM(network, record)
    found = _validate(tsm, data, image_folders) if image_folders else None
    with atomic_directory(output) as directory:
        tsm.save(directory)
        if found is not None:
            write_json(directory / METRICS_FILE, found)
    return tsm, found


def _timm(
    arch: str, checkpoint: str | Path | None, key: str | None, tasks: Mapping[str, Any], image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    if checkpoint is None:
        raise VITaskError(f"--arch {arch} needs --checkpoint FILE; to train it here, use `vitask tsm train`")
    network = build_network(_timm_source(arch, class_count(tasks), image_size), class_count(tasks))
    head = head_names(network)
    found = read_weights(checkpoint, network.state_dict(), arch, key=key, loose=head)
    widths = {len(found.weights[name]) for name in head if name in found.weights}
    tasks = _arranged(tasks, widths.pop() if len(widths) == 1 else None, f"checkpoint {str(checkpoint)!r}")
    # Built again, since the head may be for fewer columns.
    source = _timm_source(arch, class_count(tasks), image_size)
    network = build_network(source, class_count(tasks))
    _take(network, found, arch, checkpoint)
    own_mean, own_std = pixel_statistics(network)
    side = image_size or native_image_size(network)
    return network, {"source": source, "image_size": side, "mean": own_mean, "std": own_std, "tasks": tasks}


def _timm_source(arch: str, classes: int, image_size: int | None) -> dict[str, Any]:
    return {"timm": arch, "options": timm_options(arch, classes, image_size)}


def _module(
    module: str,
    checkpoint: str | Path | None,
    key: str | None,
    tasks: Mapping[str, Any],
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    if image_size is None or not mean or not std:
        raise VITaskError(f"--module {module} needs --image-size, --mean and --std: what it was trained with")
    source = {"module": module}
    network = build_network(source, 0)
    if checkpoint is not None:
        found = read_weights(checkpoint, network.state_dict(), module, key=key)
        _take(network, found, module, checkpoint)
    return network, {"source": source, "image_size": image_size, "tasks": _seen(network, tasks, image_size)}


def _seen(network: nn.Module, tasks: Mapping[str, Any], side: int) -> dict[str, Any]:
    """The tasks of a head as wide as the network's turns out to be; `TSM` says it if none of them is."""
    shared, separate = arranged(tasks), arranged(tasks, separate=True)
    if class_count(shared) == class_count(separate):
        return shared
    try:
        with torch.no_grad():
            width = Backbone(network.eval())(torch.zeros(1, 3, side, side))[2].shape[-1]
    except Exception:
        return shared
    return separate if width == class_count(separate) else shared


def _arranged(tasks: Mapping[str, Any], width: int | None, what: str) -> dict[str, Any]:
    """The tasks of a head of `width` columns.

    Raises:
        VITaskError: the commonest misfit, said in its own words: a head for another number of classes.
    """
    shared, separate = arranged(tasks), arranged(tasks, separate=True)
    for arrangement in (shared, separate):
        if width in (None, class_count(arrangement)):
            return arrangement
    listed = ", ".join(f"{task} ({len(entry['choices'])})" for task, entry in tasks.items())
    if width == 1 and class_count(shared) == 2:
        raise VITaskError(
            f"{what} has a head of one output, the logit of the second class, but the data's tasks, {listed}, have two "
            "classes; give it a row of zeros for the first class: weight = torch.cat([0 * weight, weight]), and the "
            "bias likewise"
        )
    fewer = f", or {class_count(shared)} where the same labels share columns"
    raise VITaskError(
        f"{what} has a head for {width} classes, but the data's tasks, {listed}, have {class_count(separate)} together"
        f"{fewer if class_count(shared) < class_count(separate) else ''}; give the data files of the tasks it was "
        "trained for"
    )


def _take(network: nn.Module, found: Found, name: str, checkpoint: str | Path) -> None:
    """Puts the weights into the network, and says which they are where the checkpoint has others."""
    try:
        network.load_state_dict(found.weights)
    except RuntimeError as error:  # a network with a rule of its own for what it takes
        reason = " ".join(str(error).split())[:200]
        raise VITaskError(
            f"checkpoint {str(checkpoint)!r} does not fit {name} ({reason}); give the weights as the network saves them"
        ) from None
    if found.others:
        listed = ", ".join(repr(other) if other else "those at its top" for other in found.others)
        taken = repr(found.label) if found.label else "those at its top"
        tqdm.write(f"{checkpoint} holds several weights that fit: took {taken}; --key takes another of {listed}")


# Of pixels in 0..1: a mean lies among them, and none is spread wider. Networks for 0..255 have a spread of 1 / 255.
_PLAUSIBLE = {"mean": (0.0, 1.0), "std": (1 / 512, 1.0)}


def _check_statistics(record: Mapping[str, Any]) -> None:
    for name, (low, high) in _PLAUSIBLE.items():
        values = record[name]
        if len(values) != 3 or not all(low <= value <= high for value in values):
            raise VITaskError(
                f"--{name} is {values}; expected three numbers from {low:.3g} to {high:g}, of pixels in 0..1 (red, "
                "green, blue); divide those of pixels in 0..255 by 255"
            )


def _validate(tsm: TSM, data: Sequence[str | Path], folders: Sequence[str | Path]) -> dict[str, Any]:
    images = read_labelled(data, folders, training=False)
    tasks = tsm.record["tasks"]
    loader = make_loader(images, tasks, tsm.preprocessing(), training=False, batch_size=64, workers=0, seed=0)
    return validate(lambda pixels: tsm(pixels).logits, loader, tasks, tsm.device)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--data", required=True, nargs="+", metavar="JSON", help="data of its tasks, in the order of its head")
    add("--arch", metavar="NAME", help="a timm model; needs --checkpoint")
    add(
        "--module",
        metavar="PKG.MOD:FACTORY",
        help="FACTORY() gives a torch module, pixels -> logits; the TSM's hash does not cover its code",
    )
    add("--checkpoint", metavar="FILE", help=".safetensors, or a torch checkpoint, as training scripts save it")
    add("--key", metavar="NAME", help="which weights of a checkpoint that holds several, such as ema")
    add(
        "--image-size", type=int, action=COUNT, metavar="N", help="side in pixels it was trained with (default: timm's)"
    )
    add(
        "--mean",
        type=float,
        action=FINITE,
        nargs=3,
        metavar="X",
        help="of pixels in 0..1, by channel (default: timm's)",
    )
    add(
        "--std",
        type=float,
        action=POSITIVE,
        nargs=3,
        metavar="X",
        help="of pixels in 0..1, by channel (default: timm's)",
    )
    add("--image-folder", nargs="+", default=(), metavar="DIR", help="measure the accuracy on --data, as a check")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    tsm, found = import_tsm(
        args.out,
        args.data,
        arch=args.arch,
        module=args.module,
        checkpoint=args.checkpoint,
        key=args.key,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        image_folders=args.image_folder,
    )
    tqdm.write(f"TSM {tsm.hash[:12]} in {args.out}")
    if found is not None:
        for task, accuracy in found["val_accuracy_by_task"].items():
            tqdm.write(f"  accuracy on {task}: {accuracy:.3f}")
