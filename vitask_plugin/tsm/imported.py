"""`vitask tsm import`: a classifier that was trained elsewhere, as a TSM.

Either a timm architecture with a checkpoint file, or any torch module that an import path makes.
"""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from vitask_plugin.data.instructions import read_samples, tasks_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, write_json
from vitask_plugin.tsm.backbone import build_network, native_image_size, pixel_statistics, timm_options
from vitask_plugin.tsm.joint import class_count
from vitask_plugin.tsm.model import METRICS_FILE, OUTPUT_FILES, TSM
from vitask_plugin.tsm.samples import make_loader, read_labelled
from vitask_plugin.tsm.validation import validate

# Where training scripts put the weights in a checkpoint; averaged weights first, as timm does.
_WEIGHT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a `.safetensors` file or of a torch checkpoint (read with `weights_only=True`).

    Weights under "state_dict" or "model" are found, and the prefixes of DDP and torch.compile are removed.

    Raises:
        VITaskError: if the file is absent, damaged, or would run code when loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise VITaskError(f"checkpoint {str(path)!r} does not exist; check the path")
    try:
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            # timm's own training script stores its arguments beside the weights: plain values in a plain object.
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise VITaskError(
            f"checkpoint {str(path)!r} is damaged, or holds more than weights and would run code when loaded; "
            "save model.state_dict() alone, best as .safetensors"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VITaskError(f"checkpoint {str(path)!r} is damaged ({reason}); copy it again") from None
    if isinstance(weights, Mapping):
        weights = next((weights[key] for key in _WEIGHT_KEYS if isinstance(weights.get(key), Mapping)), weights)
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise VITaskError(f"checkpoint {str(path)!r} holds no state dict; save model.state_dict()")
    from timm.models import clean_state_dict

    return clean_state_dict(weights)


def import_tsm(
    output: str | Path,
    data: Sequence[str | Path],
    *,
    arch: str | None = None,
    module: str | None = None,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_folders: Sequence[str | Path] = (),
) -> tuple[TSM, dict[str, Any] | None]:
    """Writes a TSM from somebody's classifier.

    Args:
        data: LLaVA JSON files whose tasks the classifier knows, in the order of its head; the columns of a task are in
            the order of its choices.
        arch: name of a timm model; `checkpoint` is then required.
        module: "package.module:factory", where factory() gives a torch module that maps pixels [B, 3, S, S] to logits
            [B, K_all] (S = image side, K_all = classes of all tasks). It must be importable wherever the TSM is
            used. A `checkpoint` is loaded into it if given.
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
        network, record = _timm(arch, checkpoint, tasks, image_size)
    else:
        network, record = _module(module, checkpoint, image_size, mean, std)
    record |= {"mean": list(mean)} if mean else {}
    record |= {"std": list(std)} if std else {}
    _check_statistics(record)
    tsm = TSM(network, {**record, "tasks": tasks})
    found = _validate(tsm, data, image_folders) if image_folders else None
    with atomic_directory(output) as directory:
        tsm.save(directory)
        if found is not None:
            write_json(directory / METRICS_FILE, found)
    return tsm, found


def _timm(
    arch: str, checkpoint: str | Path | None, tasks: Mapping[str, Any], image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    if checkpoint is None:
        raise VITaskError(f"--arch {arch} needs --checkpoint FILE; to train it here, use `vitask tsm train`")
    options = timm_options(arch, class_count(tasks), image_size)
    source = {"timm": arch, "options": options}
    network = build_network(source, class_count(tasks))
    weights = read_weights(checkpoint)
    _check_head(network, weights, checkpoint, tasks)
    _load(network, weights, checkpoint, arch)
    own_mean, own_std = pixel_statistics(network)
    side = image_size or native_image_size(network)
    return network, {"source": source, "image_size": side, "mean": own_mean, "std": own_std}


def _module(
    module: str,
    checkpoint: str | Path | None,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    if image_size is None or not mean or not std:
        raise VITaskError(f"--module {module} needs --image-size, --mean and --std: what it was trained with")
    source = {"module": module}
    network = build_network(source, 0)
    if checkpoint is not None:
        _load(network, read_weights(checkpoint), checkpoint, module)
    return network, {"source": source, "image_size": image_size}


def _check_head(
    network: nn.Module, weights: Mapping[str, Tensor], checkpoint: str | Path, tasks: Mapping[str, Any]
) -> None:
    """The commonest misfit, said in its own words: a head for another number of classes."""
    names = network.pretrained_cfg.get("classifier") or ()
    for name in [names] if isinstance(names, str) else names:
        found = weights.get(f"{name}.weight")
        if found is not None and len(found) != class_count(tasks):
            listed = ", ".join(f"{task} ({len(entry['choices'])})" for task, entry in tasks.items())
            raise VITaskError(
                f"checkpoint {str(checkpoint)!r} has a head for {len(found)} classes, but the data's tasks, {listed}, "
                f"have {class_count(tasks)} together; give the data files of the tasks it was trained for"
            )


def _load(network: nn.Module, weights: Mapping[str, Tensor], checkpoint: str | Path, name: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise VITaskError(
            f"checkpoint {str(checkpoint)!r} does not fit {name} ({reason[:300]}); check the name and --image-size"
        ) from None


def _check_statistics(record: Mapping[str, Any]) -> None:
    for name in ("mean", "std"):
        values = record[name]
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise VITaskError(f"--{name} is {values}; expected three numbers, of pixels in 0..1 (red, green, blue)")


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
    add("--checkpoint", metavar="FILE", help=".safetensors, or a torch checkpoint of weights alone")
    add("--image-size", type=int, metavar="N", help="side in pixels it was trained with (default: timm's)")
    add("--mean", type=float, nargs=3, metavar="X", help="of pixels in 0..1, by channel (default: timm's)")
    add("--std", type=float, nargs=3, metavar="X", help="of pixels in 0..1, by channel (default: timm's)")
    add("--image-folder", nargs="+", default=(), metavar="DIR", help="measure the accuracy on --data, as a check")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    tsm, found = import_tsm(
        args.out,
        args.data,
        arch=args.arch,
        module=args.module,
        checkpoint=args.checkpoint,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        image_folders=args.image_folder,
    )
    tqdm.write(f"TSM {tsm.hash[:12]} in {args.out}")
    if found is not None:
        for task, accuracy in found["val_accuracy_by_task"].items():
            tqdm.write(f"  accuracy on {task}: {accuracy:.3f}")
