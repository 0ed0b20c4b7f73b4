"""`calibration.json` beside a checkpoint: one block for each task, without and with exemplar prompting.

It says which weights it was made for. A checkpoint that was trained on, merged or copied into its folder since then is
another one, whose scores mean something else, so its calibration is refused.
"""

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import CALIBRATION_FILE, CONNECTOR_FILE
from vitask_plugin.record.calibration import Abstention, Calibration, Rate, Threshold

FORMAT = 1
# What transformers, PEFT and LLaVA call them; `training_args.bin` is none.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin")
_PIECE = 1 << 16  # bytes
_PIECES = 64  # of a file that are read


def weights_hash(checkpoint: str | Path) -> str:
    """Hex SHA-256 over the files of weights in a checkpoint, its connector among them: names, sizes, and of a large
    file 64 pieces of 64 KiB, spread evenly, first and last included.

    Training, merging or another dtype changes weights all over the files, so the pieces tell it within milliseconds. A
    change of a single weight would pass.

    Raises:
        VITaskError: there is no such file.
    """
    paths = sorted({path for pattern in _WEIGHTS for path in Path(checkpoint).glob(pattern) if path.is_file()})
    if not paths:
        raise VITaskError(f"{str(checkpoint)!r} holds no weights; give the folder of a checkpoint")
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        last = max(0, size - _PIECE)
        starts = range(0, size, _PIECE) if size <= _PIECE * _PIECES else _spread(last)
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _spread(last: int) -> list[int]:
    return [last * number // (_PIECES - 1) for number in range(_PIECES)]


def write_calibration(checkpoint: str | Path, calibration: Calibration, about: dict[str, Any]) -> Path:
    """Writes a block, in place of an earlier one of its task and `ep`. Blocks of other weights are dropped.

    Args:
        about: how it was made (data and its hash, figures before and after), kept as it is.

    Returns:
        The file.

    Raises:
        VITaskError: what is there is no calibration, or there are no weights.
    """
    path, weights = Path(checkpoint) / CALIBRATION_FILE, weights_hash(checkpoint)
    known = _read(path) if path.is_file() else {}
    own = (calibration.task, calibration.ep)
    kept = [block for block in known.get("calibrations", []) if (block["task"], block["ep"]) != own]
    blocks = (kept if known.get("weights") == weights else []) + [{**asdict(calibration), "about": about}]
    blocks.sort(key=lambda block: (block["task"], block["ep"]))
    write_json(path, {"format": FORMAT, "weights": weights, "calibrations": blocks})
    return path


def read_calibration(
    checkpoint: str | Path,
    task: str,
    ep: bool,
    *,
    tsm: str | None = None,
    connector: str | Path | None = None,
) -> Calibration | None:
    """The calibration of a task, without or with exemplar prompting; None where there is none.

    Args:
        tsm: hash of the TSM in use (`TSM.hash`), with EP. connector: folder of the connector in use, if it is not the
            checkpoint's own.

    Raises:
        VITaskError: it is damaged, or was made for other weights, another TSM or another connector.
    """
    path = Path(checkpoint) / CALIBRATION_FILE
    if not path.is_file():
        return None
    found = _read(path)
    again = "fit it again with `vitask calibrate`"
    if found["weights"] != weights_hash(checkpoint):
        raise VITaskError(f"{str(path)!r} was made for other weights than those beside it; {again}, or delete it")
    own = [block for block in found["calibrations"] if (block["task"], block["ep"]) == (task, ep)]
    if not own:
        return None
    try:
        calibration = _calibration(own[0])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its block of task {task!r}: {error!r}") from None
    if ep and (calibration.tsm != tsm or calibration.connector != connector_hash(connector or checkpoint)):
        what = "TSM" if calibration.tsm != tsm else "connector"
        raise VITaskError(
            f"{str(path)!r} holds a calibration of task {task!r} with exemplars of another {what} than the one in use; "
            f"{again} and this {what}"
        )
    return calibration


def connector_hash(folder: str | Path) -> str | None:
    """Hex SHA-256 of the connector's file in a folder; None without one."""
    path = Path(folder) / CONNECTOR_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path, "calibration")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise VITaskError(
            f"{str(path)!r} is no calibration of format {FORMAT}; upgrade vitask-plugin if a later one wrote it, or "
            "delete it and fit again with `vitask calibrate`"
        )
    blocks = found.get("calibrations")
    if not isinstance(found.get("weights"), str) or not isinstance(blocks, list):
        raise _damaged(path, "it has no 'weights' or no 'calibrations'")
    for block in blocks:
        if not isinstance(block, dict) or not {"task", "ep"} <= block.keys():
            raise _damaged(path, "one of its calibrations has no 'task' or no 'ep'")
    return found


def _damaged(path: Path, why: str) -> VITaskError:
    return VITaskError(f"calibration {str(path)!r} is damaged ({why}); fit it again with `vitask calibrate`")


def _calibration(block: dict[str, Any]) -> Calibration:
    block = {name: value for name, value in block.items() if name != "about"}
    calibration = Calibration(
        **{
            **block,
            "classes": tuple(block["classes"]),
            "bias": tuple(map(float, block["bias"])),
            "thresholds": tuple(_threshold(one) for one in block["thresholds"]),
            "abstention": block["abstention"] and _abstention(block["abstention"]),
        }
    )
    numbers = (calibration.temperature, *calibration.bias)
    columns = len(calibration.classes) + calibration.multi_label
    if not calibration.temperature > 0 or not all(map(math.isfinite, numbers)) or len(calibration.bias) != columns:
        raise ValueError(f"temperature {calibration.temperature}, {len(calibration.bias)} biases")
    return calibration


def _threshold(block: dict[str, Any]) -> Threshold:
    return Threshold(**{**block, **_rates(block, "sensitivity", "specificity")})


def _abstention(block: dict[str, Any]) -> Abstention:
    return Abstention(**{**block, **_rates(block, "error", "answered")})


def _rates(block: dict[str, Any], *names: str) -> dict[str, Any]:
    held_out = {name: Rate(**rate) for name, rate in block["held_out"].items()}
    return {**{name: Rate(**block[name]) for name in names}, "held_out": held_out}
