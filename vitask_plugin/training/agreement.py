"""The processes of a run agree with each other: on what each has met, on the data, and on the output folder.

Works without a process group too: one process agrees with itself. A *node* is what one launcher started, so that its
processes are counted from local rank 0.
"""

import os
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vitask_plugin.errors import VITaskError
from vitask_plugin.training.peers import EveryRankError

# Talking to each other -------------------------------------------------------------------------------------------


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order. All ranks have to call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(sentence: str | None) -> None:
    """Ends all ranks if one of them has something against going on. All ranks have to call it.

    Raises:
        EveryRankError: on every rank, with the sentence of the first one that has any.
    """
    for found in gathered(sentence):
        if found is not None:
            raise EveryRankError(found)


@contextmanager
def together() -> Iterator[None]:
    """Bad input that one rank meets in the block ends all of them. All ranks have to run it.

    Raises:
        EveryRankError: see `agree`.
    """
    sentence = None
    try:
        yield
    except VITaskError as error:
        sentence = str(error)
    agree(sentence)


def say(line: str) -> None:
    """A line on standard error, by rank 0."""
    if rank() == 0:
        sys.stderr.write(f"vitask: {line}\n")
        sys.stderr.flush()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_of_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def is_one_of_several() -> bool:
    """Whether this process has found the others of its run."""
    return dist.is_initialized() and dist.get_world_size() > 1


def speaks(error: VITaskError) -> bool:
    """Whether this process says what is wrong, or leaves it to the first of its node, which has the same to say."""
    alike = isinstance(error, EveryRankError) or not dist.is_initialized()  # one node, one command line
    return is_first_of_node() or not alike


def shared(directory: str | Path) -> bool:
    """Whether all ranks see `directory`, which is made if need be, as one and the same. All ranks have to call it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / gathered(f".vitask-{uuid.uuid4().hex}")[0]
    try:
        if rank() == 0:
            mark.touch()
        gathered(None)  # it is there before anyone looks
        return all(gathered(mark.exists()))
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)


def place() -> str:
    return f"rank {rank()} on {socket.gethostname()}"


# The same data, one folder ------------------------------------------------------------------------------------------


def check_data(digests: dict[str, str]) -> None:
    """Ends every rank if one of them would train on something else.

    Args:
        digests: `{what: hex digest of its content}`, the same keys on all ranks.
    """
    processes = gathered((place(), digests))
    first, expected = processes[0]
    for other, found in processes[1:]:
        for what in expected:
            if found[what] != expected[what]:
                raise EveryRankError(
                    f"the processes see different {what}: {first} {expected[what][:12]}, {other} {found[what][:12]}; "
                    "copy it again, so that all nodes have the same"
                )
    same = " on every rank" if len(processes) > 1 else ""
    say(f"{', '.join(f'{what} {digest[:12]}' for what, digest in expected.items())}{same}")


def check_disk(output_dir: str, *, save_on_each_node: bool) -> None:
    """Ends every rank if the folder cannot be written to, or nodes would spoil or lack each other's files there."""
    with together():
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir):
                pass
        except OSError as error:
            raise VITaskError(f"--output_dir {output_dir!r} cannot be written to ({error}); give another") from None
    nodes = sum(gathered(is_first_of_node()))
    if nodes == 1:
        return
    one_disk = shared(output_dir)
    if one_disk and save_on_each_node:
        raise EveryRankError(
            f"--output_dir {output_dir!r} is one folder for all nodes, and --save_on_each_node True makes each of them "
            "write the same files there; leave that flag out"
        )
    if not one_disk and not save_on_each_node:
        raise EveryRankError(
            f"--output_dir {output_dir!r} is another folder on each node, and without --save_on_each_node True no node "
            "has all that a run is resumed from; give that flag, or a folder on a disk that all nodes share"
        )
    say(f"{output_dir} is {'one folder for all nodes' if one_disk else 'a folder of its own on each node'}")
