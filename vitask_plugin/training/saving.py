"""Checkpoints that are whole or absent.

A checkpoint is written into OUTPUT_DIR/.saving, where nothing looks for one. Once every rank has written its part, the
first process lists the files with their sizes in `vitask.json` and renames the folder; older checkpoints go after that.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from vitask_plugin.files import write_json
from vitask_plugin.record import checkpoint
from vitask_plugin.training import agreement, disk

STAGING = ".saving"


@contextlib.contextmanager
def whole(args: Any, model: nn.Module, step: int, best: int | None = None) -> Iterator[str]:
    """The folder to write `checkpoint-STEP` into; when the block ends well on every rank, it stands in OUTPUT_DIR.

    All ranks have to run it. `args.should_save` says which of them renames: one, or one of each node with a disk of
    its own.

    Args:
        args: upstream's training arguments. best: the step of the best checkpoint, which is kept, None = none is.

    Raises:
        VITaskError: no room for it, on every rank, before anything is written.
    """
    output = Path(args.output_dir)
    staging, name = output / STAGING, f"checkpoint-{step}"
    clear(args)
    disk.check_room_for_checkpoint(args, model, name)
    with _removed_on_failure(staging, name):
        staging.mkdir(parents=True, exist_ok=True)
        yield str(staging)
    agreement.gathered(None)  # every rank has written its part
    if args.should_save:
        with _removed_on_failure(staging, name):
            _publish(staging / name, output)
            _rotate(output, step, args.save_total_limit, best)
            shutil.rmtree(staging)


def clear(args: Any) -> None:
    """Removes what a run that was killed while it saved has left. `args`: upstream's training arguments."""
    if args.should_save:
        shutil.rmtree(Path(args.output_dir) / STAGING, ignore_errors=True)


def _publish(written: Path, output: Path) -> None:
    files = sorted(path for path in written.rglob("*") if path.is_file())
    record = checkpoint.read_record(written)
    sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in files}
    sizes.pop(checkpoint.RECORD_FILE)
    write_json(written / checkpoint.RECORD_FILE, {**record, checkpoint.FILES: sizes})
    # A rename must not reach the disk before what it names.
    for path in [*files, written]:
        _flush(path)
    target = output / written.name
    if target.exists():  # one that was passed over on resuming
        target.rename(written.with_name("replaced"))
    written.rename(target)
    _flush(output)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rotate(output: Path, step: int, limit: int | None, best: int | None) -> None:
    """Keeps `limit` checkpoints, two at least where the best one is not the latest.

    Later steps than `step` are of a run that was resumed before them: they go first.
    """
    if not limit or limit < 0:
        return
    if best not in (None, step):
        limit = max(limit, 2)
    by_age = sorted(disk.checkpoints(output), key=lambda other: (other == step, other == best, other < step, other))
    for old in by_age[:-limit]:
        # Not in place: half removed, it would look like one to resume from.
        moved = output / STAGING / f"removed-{old}"
        (output / f"checkpoint-{old}").rename(moved)


@contextlib.contextmanager
def _removed_on_failure(staging: Path, name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        disk.check_written(error, staging.parent, name)
        raise
