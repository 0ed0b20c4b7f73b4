"""The disk of a run: the checkpoints on it, the room beside them, and what a full one ends with."""

import contextlib
import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from vitask_plugin.deepspeed.activations import FLOAT32
from vitask_plugin.errors import VITaskError, causes
from vitask_plugin.record import checkpoint
from vitask_plugin.training import agreement, processes
from vitask_plugin.training.precision import written_dtype
from vitask_plugin.training.zero import zero_stage

SLACK = 1 << 20  # bytes: tokenizer, configuration, random states
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same where a library keeps the text alone; in the middle of a file torch says that its stream broke, not why.
_FULL_TEXTS = ("PytorchStreamWriter failed", "unexpected pos", *map(os.strerror, _FULL))


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The `checkpoint-STEP` folders in `output_dir`, by step, ascending."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    return dict(sorted(found.items()))


# Room ----------------------------------------------------------------------------------------------------------


def check_room_for_checkpoint(args: Any, model: nn.Module, name: str) -> None:
    """Ends every rank if checkpoint `name` does not fit beside the older ones. All ranks have to call it.

    Args:
        args: upstream's training arguments.

    Raises:
        VITaskError: on every rank, with the sentence of the first one without room.
    """
    agreement.agree(_no_room(args, _checkpoint_bytes(args, model), name))


def check_room_for_weights(args: Any, model: nn.Module) -> None:
    """Ends every rank if the final weights do not fit. All ranks have to call it. `args`: upstream's arguments.

    Raises:
        VITaskError: on every rank, with the sentence of the first one without room.
    """
    writes = args.should_save if args.lora_enable else writes_weights(args)
    size = sum(_numel(p) * written_dtype(p).itemsize for p in _written(args, model))
    agreement.agree(_no_room(args, size if writes else 0, "the trained weights"))


def writes_weights(args: Any) -> bool:
    """Whether this rank writes the whole model's weights: under ZeRO-3 they are gathered on rank 0 alone."""
    return args.should_save and (args.process_index == 0 or zero_stage(args) != 3)


def no_room(output: Path, needed: int, what: str) -> str | None:
    """The sentence for a disk without `needed` bytes for `what` in the run's folder `output`, None with them."""
    free = shutil.disk_usage(output).free
    if free >= needed:
        return None
    return _sentence(output, what, f"it takes about {_text(needed)} and {_text(free)} are free")


def _no_room(args: Any, share: int, what: str) -> str | None:
    """The sentence for a disk that is too full for `what`, of which this rank writes `share` bytes. Collective."""
    # Ranks with one disk share its room.
    disk = f"{socket.gethostname()}:{Path(args.output_dir).resolve()}" if args.save_on_each_node else ""
    needed = SLACK + sum(size for other, size in agreement.gathered((disk, share)) if other == disk)
    try:
        return no_room(Path(args.output_dir), needed, what)
    except OSError:
        return None  # writing will say why


def _checkpoint_bytes(args: Any, model: nn.Module) -> int:
    """What this rank writes of a checkpoint: as much as of the last one, or weights and optimizer, taken to be Adam.

    That has two moments, in the dtype of the weights; ZeRO's are float32, beside float32 weights, and it writes the
    weights themselves a second time below stage 3.
    """
    last = _last_bytes(args.output_dir)
    if last is not None:
        return last if args.should_save else 0
    weights = sum(map(_bytes, _written(args, model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = weights if writes_weights(args) else 0
    if args.save_only_model:
        return size
    stage = zero_stage(args)
    if stage is None:
        return size + (2 * sum(map(_bytes, trained)) if args.should_save else 0)
    model_states = weights if args.should_save and stage < 3 else 0
    return size + model_states + 3 * FLOAT32 * sum(map(_numel, trained)) // args.world_size


def _last_bytes(output_dir: str | Path) -> int | None:
    for path in reversed(checkpoints(output_dir).values()):
        with contextlib.suppress(VITaskError):  # damaged, and passed over on resuming
            if files := (checkpoint.read_record(path) or {}).get(checkpoint.FILES):
                return sum(files.values())
    return None


def _written(args: Any, model: nn.Module) -> list[nn.Parameter]:
    """The weights that upstream writes: all of them, or with LoRA the trained ones."""
    return [weight for weight in model.parameters() if weight.requires_grad or not args.lora_enable]


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a part of it on each rank


def _bytes(parameter: nn.Parameter) -> int:
    return _numel(parameter) * parameter.element_size()


def _text(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


# What a full disk ends with ----------------------------------------------------------------------------------------


def full(error: BaseException, output_dir: str | Path, what: str) -> str | None:
    """The sentence for an error of writing `what` into `output_dir` if the disk was full; None for other errors."""
    cause = _cause(error, Path(output_dir))
    return cause and _sentence(Path(output_dir), what, cause)


def check_written(error: BaseException, output_dir: str | Path, what: str) -> None:
    """Ends the run with the sentence of `full`; returns for other errors.

    With several processes it ends this one at once, since the others may be anywhere: none can be waited for.

    Raises:
        VITaskError: one process, and the disk was full.
    """
    sentence = full(error, output_dir, what)
    if sentence is None:
        return
    if dist.is_initialized():
        processes.end(sentence)
    raise VITaskError(sentence) from error


def _cause(error: BaseException, output_dir: Path) -> str | None:
    for cause in causes(error):
        text = str(cause).strip().partition("\n")[0]
        full = (isinstance(cause, OSError) and cause.errno in _FULL) or any(part in text for part in _FULL_TEXTS)
        if full and not _is_elsewhere(cause, text, output_dir):
            return text
    return None


def _is_elsewhere(error: BaseException, text: str, output_dir: Path) -> bool:
    """Whether it was another disk: that of temporary files, or the shared memory of DataLoader workers."""
    file = getattr(error, "filename", None)
    if file is not None:
        return not Path(os.fsdecode(file)).resolve().is_relative_to(output_dir.resolve())
    return "</torch_" in text or "shared memory" in text


def _sentence(output: Path, what: str, why: str) -> str:
    last = checkpoints(output)
    rest = f"{last[max(last)].name} there is untouched" if last else "no checkpoint was written there before"
    then = "resumes from it" if last else "starts anew"
    return (
        f"no room for {what} in {str(output)!r}: {why}; {rest}. Free some space, or a quota that the disk has, and the "
        f"same command {then}"
    )
