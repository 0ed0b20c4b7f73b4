"""The paths of a training command, looked at before anything is loaded: one sentence for each that cannot be right."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.llava.model_type import check_tower
from vitask_plugin.reading import read_bin
from vitask_plugin.training import paths

_HUB_TOWERS = ("openai", "laion")  # upstream takes names that begin so for models of the Hub


def check(flags: Mapping[str, str]) -> None:
    """Refuses paths that lead to nothing, or to something else, see `training.paths.check`."""
    paths.check(flags, _LOOKS)


def _tower(flag: str, path: str) -> None:
    if not Path(path).exists() and (path.startswith(_HUB_TOWERS) or "ShareGPT4V" in path):
        return
    check_folder(path, flag)
    paths.model(flag, path)
    check_tower(read_json(Path(path) / "config.json", f"{flag} configuration"), path)


def _projector(flag: str, path: str) -> None:
    paths.file(flag, path)
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
    **paths.LOOKS,
    "vision_tower": _tower,
    "pretrain_mm_mlp_adapter": _projector,
}
