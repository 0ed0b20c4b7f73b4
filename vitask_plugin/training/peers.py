"""The processes of a run in work of any length, where waiting in a collective would run into its timeout.

Each process says in the store of the process group that it lives, how far it is, and what it has against going on. A
waiting process reads that; it waits as long as the others live, and ends when one of them has ended or met bad input.
"""

import itertools
import json
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

from vitask_plugin.errors import VITaskError

BEAT = 2.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one, after which a process is taken for dead
POLL = 0.2  # seconds between two looks at the others; more where they are many
_OVER = 1 << 30  # the stage of a process that waits for nothing more
_NUMBERS = itertools.count()  # all processes make the same `Peers` in the same order


class EveryRankError(VITaskError):
    """What all ranks end with, so that one of each node says it for all."""


def node_share() -> tuple[int, int]:
    """(number of this process on its node, processes there), as the launcher says; alone where it does not."""
    if not dist.is_initialized():
        return 0, 1
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        count, local = os.environ.get(name, ""), os.environ.get("LOCAL_RANK", "")
        if count.isdecimal() and local.isdecimal() and int(local) < int(count):
            return int(local), int(count)
    return 0, 1


def world_share() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Peers:
    """All ranks have to enter it; whoever leaves it waits for all others.

    Raises:
        EveryRankError: on every rank, if one of them left it with an error, or no longer lives.
    """

    def __init__(self) -> None:
        self.rank, self.count = world_share()
        self._number = next(_NUMBERS)
        self._stage, self._sentence, self._beats = 0, None, itertools.count()
        self._left = threading.Event()
        now = time.monotonic()
        # Rank -> its last beat, and when we saw it first.
        self._seen: dict[int, tuple[int, float]] = {rank: (-1, now) for rank in range(self.count)}
        self._poll, self._looked = max(POLL, 0.01 * self.count), 0.0

    def __enter__(self) -> "Peers":
        if self.count > 1:
            self._store = dist.PrefixStore(f"vitask/{self._number}", dist.distributed_c10d._get_default_store())
            self._say()
            threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.count == 1:
            return
        try:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                return
            if error is not None and not isinstance(error, EveryRankError):
                self._sentence = str(error) if isinstance(error, VITaskError) else self._end_of(error)
            states = self._linger(error)
        finally:
            self._left.set()
        if error is None or isinstance(error, VITaskError):
            self._check(states)

    def check(self) -> None:
        """Ends this rank if another one has ended, or has something against going on. Cheap.

        Raises:
            EveryRankError: with the sentence of the first such rank.
        """
        if self.count > 1 and time.monotonic() - self._looked > self._poll:
            self._check(self._states())

    def wait(self) -> None:
        """Until every rank has called it as often as this one, or has left."""
        self._stage += 1
        if self.count > 1:
            self._wait()

    def _wait(self) -> None:
        self._say()
        while True:
            states = self._states()
            self._check(states)
            if len(states) == self.count and all(state["stage"] >= self._stage for state in states.values()):
                return
            time.sleep(self._poll)

    def _linger(self, error: BaseException | None) -> dict[int, dict[str, Any]]:
        """Leaves when nobody needs the store or a sentence from here any more; returns what all said last."""
        self._stage = _OVER
        states: dict[int, dict[str, Any]] = {}
        try:
            self._say()
            while True:
                states = self._states()
                over = {rank for rank, state in states.items() if state["stage"] == _OVER}
                if all(rank in over or self._is_silent(rank) for rank in range(self.count)):
                    break
                time.sleep(self._poll)
            if self.rank == 0:
                time.sleep(2 * self._poll)  # the store may be here, and the others have a last look
        except (dist.DistStoreError, dist.DistNetworkError):
            if error is None:
                raise  # else what we met ourselves is said
        return states

    def _check(self, states: dict[int, dict[str, Any]]) -> None:
        for _, state in sorted(states.items()):
            if state["sentence"] is not None:
                raise EveryRankError(state["sentence"])
        for rank in range(self.count):
            state = states.get(rank, {"stage": 0, "place": f"rank {rank}"})
            if state["stage"] != _OVER and self._is_silent(rank):
                raise EveryRankError(
                    f"{state['place']} has given no sign of life for {SILENCE:.0f} seconds; see what its own node "
                    "printed. The same command on all nodes goes on with what is finished"
                )

    def _states(self) -> dict[int, dict[str, Any]]:
        """What each rank said last, by rank; without those that have not come here yet."""
        self._looked = time.monotonic()
        names = [str(rank) for rank in range(self.count)]
        if not self._store.check(names):
            names = [name for name in names if self._store.check([name])]
        found = {int(name): json.loads(text) for name, text in zip(names, self._store.multi_get(names), strict=True)}
        for rank, state in found.items():
            if self._seen[rank][0] != state["beat"]:
                self._seen[rank] = state["beat"], self._looked
        return found

    def _is_silent(self, rank: int) -> bool:
        return rank != self.rank and time.monotonic() - self._seen[rank][1] > SILENCE

    def _say(self) -> None:
        state = {"beat": next(self._beats), "stage": self._stage, "sentence": self._sentence, "place": self._place()}
        self._store.set(str(self.rank), json.dumps(state))

    def _live(self) -> None:
        while not self._left.wait(BEAT):
            try:
                self._say()
            except RuntimeError:
                return  # the store is gone; whoever waits meets that too

    def _place(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def _end_of(self, error: BaseException) -> str:
        reason = (str(error).splitlines() or [""])[0][:200]
        return f"{self._place()} has ended with {type(error).__name__}: {reason}; see what it printed"
