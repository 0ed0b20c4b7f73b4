"""The paths of a training command, looked at before anything is loaded: one sentence for each that cannot be right."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, read_json
from vitask_plugin.llava.model_type import check_tower
from vitask_plugin.reading import read_bin

_HUB_TOWERS = ("openai", "laion")  # upstream takes names that begin so for models of the Hub


def check(flags: Mapping[str, str]) -> None:
    """Refuses paths that lead to nothing, or to something else.

    Args:
        flags: `{flag: value}` of the command line, as typed.

    Raises:
        VITaskError: naming flag, path, and what was found there.
    """
    for name in ("data_path", "image_folder"):
        if not flags.get(name):
            kind = "JSON" if name == "data_path" else "DIR"
            raise VITaskError(f"--vitask True needs --{name} {kind}, and it is {_given(flags, name)}; give it")
    for name, look in _LOOKS.items():
        if name in flags:
            if not flags[name]:
                raise VITaskError(f"--{name} is empty, perhaps an unset shell variable; give a path or leave it out")
            look(f"--{name}", flags[name])


def _given(flags: Mapping[str, str], name: str) -> str:
    return "empty" if name in flags else "left out"


def _file(flag: str, path: str) -> None:
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise VITaskError(f"{flag} {path!r} {found}; give a file")


def _folder(flag: str, path: str) -> None:
    check_folder(path, flag)


def _model(flag: str, path: str) -> None:
    """A folder with a configuration; a name that may be one of the Hub passes."""
    if Path(path).exists() or Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1:
        check_folder(path, flag)
        if not (Path(path) / "config.json").is_file():
            raise VITaskError(f"{flag} {path!r} has no config.json, so it is no model; give the folder of one")
        if (Path(path) / "adapter_config.json").is_file():
            raise VITaskError(
                f"{flag} {path!r} is the output of a LoRA run, which holds an adapter and no model; give the model it "
                "was trained from, and this folder as --vitask_connector_path with --lora_enable True to go on from it"
            )


def _tower(flag: str, path: str) -> None:
    if not Path(path).exists() and (path.startswith(_HUB_TOWERS) or "ShareGPT4V" in path):
        return
    check_folder(path, flag)
    _model(flag, path)
    check_tower(read_json(Path(path) / "config.json", f"{flag} configuration"), path)


def _projector(flag: str, path: str) -> None:
    _file(flag, path)
    if not any("mm_projector" in name for name in read_bin(path)):
        raise VITaskError(f"{flag} {path!r} holds no weights of a projector (mm_projector); give an mm_projector.bin")


def check_projector(parsed: Namespace, model: Mapping[str, Any], tower: Mapping[str, Any]) -> None:
    """Refuses a projector of another shape than model and tower need.

    Args:
        parsed: upstream's flags. model, tower: their `config.json`; where a width is not in them, nothing is compared.

    Raises:
        VITaskError: naming both shapes.
    """
    path = parsed.pretrain_mm_mlp_adapter
    widths = tower.get("vision_config", tower).get("hidden_size"), model.get("hidden_size")
    if path is None or None in widths:
        return
    from llava.model.multimodal_projector.builder import build_vision_projector

    kind = parsed.mm_projector_type
    with torch.device("meta"):
        needed = build_vision_projector(
            Namespace(mm_projector_type=kind, mm_hidden_size=widths[0], hidden_size=widths[1])
        )
    expected = {name: tuple(weight.shape) for name, weight in needed.state_dict().items()}
    found = {
        name.partition("mm_projector.")[2]: tuple(weight.shape)
        for name, weight in read_bin(path).items()
        if "mm_projector" in name
    }
    if found != expected:
        raise VITaskError(
            f"--pretrain_mm_mlp_adapter {path!r} holds {found}, and --mm_projector_type {kind} between a vision tower "
            f"{widths[0]} wide and a model {widths[1]} wide needs {expected}; give the projector of this model"
        )


_LOOKS: dict[str, Callable[[str, str], None]] = {
    "model_name_or_path": _model,
    "data_path": _file,
    "image_folder": _folder,
    "vision_tower": _tower,
    "pretrain_mm_mlp_adapter": _projector,
    "vitask_tsm": _folder,
    "vitask_features": _folder,
    "vitask_connector_path": _folder,
}
