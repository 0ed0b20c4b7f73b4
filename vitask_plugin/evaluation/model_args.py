"""What `--model_args` of lmms-eval may hold for our models, looked at before anything is loaded.

lmms-eval makes a number, True or False of every value that looks like one, a folder's name too.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.exemplars import read_ep
from vitask_plugin.files import check_folder
from vitask_plugin.model_folder import saved_dtype
from vitask_plugin.record.host import host_of

# Of every host.
ARGUMENTS = (
    *("pretrained", "model_base", "tsm", "connector", "swap", "trust_tsm_code", "ep", "dtype", "batch_size", "device"),
    *("max_new_tokens", "image_size", "calibrated"),
)
# Host -> what its checkpoints are called, and the model that evaluates them.
HOSTS = {"llava": ("a checkpoint of LLaVA 1.2.2", "vitask_llava"), "hf": ("a model in HF format", "vitask_hf")}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_folders(model: str, given: Mapping[str, Any]) -> None:
    """Refuses what is no folder among `pretrained`, `model_base`, `tsm` and `connector`; None = not given.

    Args:
        model: lmms-eval's name of ours.

    Raises:
        VITaskError: naming the argument and what was given.
    """
    if not given["pretrained"]:
        raise VITaskError(f"{model} needs a checkpoint; give --model_args pretrained=DIR")
    for name, folder in given.items():
        if folder is None:
            continue
        if not isinstance(folder, str | Path):
            raise VITaskError(
                f"{name}={folder!r} in --model_args is taken for a {type(folder).__name__}, not for a folder; write "
                f"{name}=./{folder}, with the name of the folder as it is"
            )
        if folder == "":
            raise VITaskError(f"{name}= in --model_args is empty; give a folder, or leave it out")
        if name in ("tsm", "connector"):
            check_folder(folder, f"{name}= in --model_args")
        elif not Path(folder).is_dir():
            raise VITaskError(
                f"{name}={folder!r} in --model_args is no local folder, and {model} downloads nothing; give "
                "the path of a checkpoint folder (a model of the Hugging Face hub: download it first)"
            )


def check_host(folder: str, host: str) -> None:
    """Refuses a checkpoint of another host than `host`, as far as its files tell.

    Raises:
        VITaskError: naming the model that evaluates it.
    """
    found = host_of(folder)
    if found in HOSTS and found != host:
        kind, model = HOSTS[found]
        raise VITaskError(f"{str(folder)!r} is {kind}, which {HOSTS[host][1]} does not read; give --model {model}")


def check_numbers(batch_size: Any, max_new_tokens: Any) -> None:
    """Refuses numbers that nothing can be done with.

    Raises:
        VITaskError: naming the argument and what was given.
    """
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if not str(number).isdecimal() or int(number) < 1:
            raise VITaskError(f"{name}={number!r} is not a positive whole number; give one such as {name}=8")


def check_contrast(contrast: Any) -> None:
    """Refuses what is no weight of contrastive decoding.

    Raises:
        VITaskError: naming what was given.
    """
    if isinstance(contrast, bool) or not isinstance(contrast, int | float) or not 0 <= contrast < math.inf:
        raise VITaskError(f"contrast={contrast!r} is no weight; give 0 (off) or a positive number")


def check_calibrated(calibrated: Any, contrast: Any) -> None:
    """Refuses what says neither yes nor no, and scores that no calibration is of.

    Raises:
        VITaskError: naming the argument and what was given.
    """
    if not isinstance(calibrated, bool):
        raise VITaskError(f"calibrated={calibrated!r} is neither True nor False")
    if calibrated and contrast:
        raise VITaskError(
            f"calibrated=True is of the model's own label scores, which contrast={contrast!r} changes; leave one out"
        )


def check_prompting(ep: Any, tsm: Any, connector: Any, swap: Any, trust_tsm_code: Any) -> None:
    """Refuses what says nothing about exemplars, or contradicts itself.

    Raises:
        VITaskError: naming the argument and what was given.
    """
    read_ep(ep, tsm)
    if connector and (ep is False or (ep is None and not tsm)):
        raise VITaskError(
            f"connector={connector!r} is of use with its tsm=DIR only, as part of exemplar prompting; add tsm=DIR "
            "to --model_args and leave ep=False out, or leave connector out"
        )
    if swap not in (None, "force"):
        raise VITaskError(f"swap={swap!r} is unknown; leave it out, or give swap=force")
    if not isinstance(trust_tsm_code, bool):
        raise VITaskError(f"trust_tsm_code={trust_tsm_code!r} is neither True nor False")


def as_device(name: Any, local_process: int) -> torch.device:
    """The device called `name`; None = a GPU if there is one. Of several processes each has a GPU of its own.

    Raises:
        VITaskError: no such device here.
    """
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise VITaskError(f"device={name!r}, but torch sees no CUDA device; give --device cpu")
    try:
        device = torch.device(f"cuda:{local_process}" if name == "cuda" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise VITaskError(f"device={name!r} is unknown; give cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise VITaskError(
            f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA device(s); give one of them"
        )
    return device


def as_dtype(name: Any, folder: str) -> torch.dtype:
    """The dtype called `name`; auto = as the weights in `folder` were saved.

    Raises:
        VITaskError: another name.
    """
    if name == "auto":
        name = saved_dtype(folder)
    if name not in _DTYPES:
        raise VITaskError(f"dtype={name!r} is unknown; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
