"""What a damaged or absent file looks like to the user: one sentence, whichever library stumbled over it."""

import contextlib
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitask_plugin.errors import VITaskError

_DAMAGED = (
    SafetensorError,
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    LookupError,
    pickle.UnpicklingError,
    struct.error,
)


@contextlib.contextmanager
def readable(what: str, path: str | Path) -> Iterator[None]:
    """Turns the errors of reading `what` from `path` into a VITaskError that names both and the first line of why."""
    try:
        yield
    except VITaskError:
        raise
    except _DAMAGED as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise VITaskError(
            f"{what} {str(path)!r} cannot be read ({why}); it is absent, truncated or of another kind: check the path, "
            "copy it again, or train it again"
        ) from error


def read_bin(path: str | Path) -> dict[str, Tensor]:
    """Weights by name from a torch file; nothing in it is executed.

    Raises:
        VITaskError: absent, truncated, or more than weights.
    """
    with readable("weights", path):
        return torch.load(path, map_location="cpu", weights_only=True)


def model_config(path: str) -> dict[str, Any]:
    """The `config.json` of a model in a folder or on the Hub; empty where there is none, which loading it says."""
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError):
        return {}
