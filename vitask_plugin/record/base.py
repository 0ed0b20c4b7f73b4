"""Which weights an adapter was trained on: some of their values, kept in `vitask.json` and looked for in a base.

Two models of one shape, such as a base model and its instruction-tuned form, take each other's adapters in silence. The
values are those of the files, so it does not matter how a run partitions or quantizes them; they are compared as
bfloat16, so a copy in another dtype is the same model.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import CONFIG_FILE
from vitask_plugin.reading import readable
from vitask_plugin.record.checkpoint import BASE, RECORD_FILE

TENSORS, VALUES = 8, 64  # of each tensor one row
# Rounded to float16 on the way, one value in sixteen becomes another bfloat16; of a tuned model most are others.
ALIKE = 0.85


def sampled(name: str) -> dict[str, str] | None:
    """`{tensor: bfloat16 values as hex}` of a model's weight files, None where they are not on this machine.

    Args:
        name: a folder, or a name on the Hub whose files are here.
    """
    rows = dict(_rows(name, None))
    kept = sorted(rows)[:: max(1, len(rows) // TENSORS)][:TENSORS]
    return {tensor: _words(rows[tensor]()) for tensor in kept} or None


def check(checkpoint: str | Path, base: str | Path) -> None:
    """Refuses a base that is not the one of an adapter's training.

    Nothing is said where the adapter's folder `checkpoint` has no record or an early one, or where no tensor of it is
    in the base's files.

    Raises:
        VITaskError: naming both and a tensor.
    """
    path = Path(checkpoint) / RECORD_FILE
    known = read_json(path, "VITask record").get(BASE) if path.is_file() else None
    if not known:
        return
    total, other = 0, []
    for tensor, row in _rows(str(base), known):
        with readable("VITask record", path):
            ours = _values(known[tensor])
        theirs = _values(_words(row()))
        if len(ours) == len(theirs):  # else loading the adapter says that the shapes differ
            total += len(ours)
            other += [tensor] * int((ours != theirs).sum())
    if len(other) > (1 - ALIKE) * total:
        raise VITaskError(
            f"the adapter in {str(checkpoint)!r} was trained on other weights than those in {str(base)!r} "
            f"({len(other)} of {total} values that its {RECORD_FILE} holds differ, some in {other[0]!r}); give the "
            "model that it was trained from (--model-base, model_base= of lmms-eval, --model_name_or_path in training)"
        )


def _words(row: Tensor) -> str:
    places = torch.linspace(0, len(row) - 1, min(VALUES, len(row))).long()
    return row[places].to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes().hex()


def _values(words: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(words), dtype=torch.int16)


def _rows(name: str, wanted: Mapping[str, Any] | None) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(tensor, what reads its middle row) of all matrices of floats in a model's files, or of those wanted."""
    folder = local_folder(name)
    if folder is None:
        return
    for path in sorted(folder.glob("model*.safetensors")):
        with readable("weights", path), safetensors.safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(tensor)
                shape = part.get_shape()
                if len(shape) == 2 and part.get_dtype() in ("F64", "F32", "F16", "BF16") and _asked(tensor, wanted):
                    yield tensor, partial(_sliced, part, shape[0] // 2)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        with readable("weights", path):
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for tensor, whole in weights.items():
            if whole.ndim == 2 and whole.is_floating_point() and _asked(tensor, wanted):
                yield tensor, partial(whole.__getitem__, len(whole) // 2)


def _sliced(part: Any, row: int) -> Tensor:
    sliced: Tensor = part[row : row + 1][0]
    return sliced


def _asked(tensor: str, wanted: Mapping[str, Any] | None) -> bool:
    return wanted is None or tensor in wanted


def local_folder(name: str) -> Path | None:
    """Where a model's files are on this machine: a folder, or of a name on the Hub that of its cache."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, CONFIG_FILE, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None
