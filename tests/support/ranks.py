"""The ranks of a training run as processes of their own, each forked from a server that has done the imports.

Every rank is a new process with the environment that torchrun gives it, a group of its own over gloo, and calls what
`python -m vitask_plugin.HOST.train` calls.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["imported"])
# `_importable` changes the environment for a moment. And a start asks after the processes of other threads too: of two
# that ask at once, one reads the status, and the other takes the process for one that was lost (255).
_ASKING = threading.Lock()
SECONDS = 240


@dataclass(frozen=True)
class Ended:
    """How a run ended. `statuses` are exit statuses by rank, negative ones the signal that killed it."""

    statuses: list[int]
    logs: list[Path]

    @property
    def text(self) -> str:
        """The end of what each rank printed."""
        return "\n".join(f"-- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(self.logs))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(
    count: int,
    flags: list[str] | list[list[str]],
    logs: Path,
    *,
    kill_at: tuple[int, int] | None = None,
    nodes: int = 1,
    before: dict[int, Callable[[], None]] | None = None,
    kill_others: bool = True,
    host: str = "llava",
) -> Ended:
    """Runs `count` ranks to their end.

    Args:
        flags: the command line of every rank, or one for each.
        logs: folder; gets rank-R.log, and rank-R.json of `witness`.
        kill_at: (rank, step): that rank gets SIGKILL in the middle of that step, counted from 1.
        nodes: that the ranks take themselves to be on.
        before: what a rank does before it starts.
        host: whose training it is.
        kill_others: when one dies, as torchrun does; else the others end by themselves.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port, per_node = free_port(), count // nodes
    paths = [logs / f"rank-{rank}.log" for rank in range(count)]
    processes = []
    with _ASKING, _importable(Path(__file__).parent):
        for rank in range(count):
            environment = {
                **{"RANK": rank, "LOCAL_RANK": rank % per_node, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": per_node},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            }
            step = kill_at[1] if kill_at and kill_at[0] == rank else None
            own = flags[rank] if isinstance(flags[0], list) else flags
            prepare = (before or {}).get(rank)
            arguments = (environment if count > 1 else {}, own, paths[rank], step, prepare, host)
            process = _FORKS.Process(target=_rank, args=arguments)
            process.start()
            processes.append(process)
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with _ASKING:
                statuses = [process.exitcode for process in processes]
            if None not in statuses or (kill_others and any(statuses)):
                break
            time.sleep(0.05)
    finally:
        with _ASKING:
            for process in processes:
                process.kill()
                process.join()
    return Ended([process.exitcode for process in processes], paths)


class _importable:
    """The server is started with the first process, and finds `imported` by PYTHONPATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, os.environ.get("PYTHONPATH")

    def __enter__(self) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.folder), self.before)))

    def __exit__(self, *error: object) -> None:
        os.environ.pop("PYTHONPATH")
        if self.before is not None:
            os.environ["PYTHONPATH"] = self.before


def _rank(
    environment: dict[str, int],
    flags: list[str],
    log: Path,
    kill_at_step: int | None,
    prepare: Callable[[], None] | None,
    host: str,
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = ["train.py", *flags]
    import imported  # noqa: F401
    import witness

    witness.watch(log.with_suffix(".json"), kill_at_step, host)
    if prepare is not None:
        prepare()
    importlib.import_module(f"vitask_plugin.{host}.train").main()
