"""Fixtures for runs that save and go on: a command line, the runs that nothing happened to, and how others are cut."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mixture import LORA, flags
from ranks import Ended, launch

SAVING = ("--save_strategy", "steps", "--save_steps", "2")
MORE = {
    "full": (),
    # Parameter groups of their own settings, which going on has to keep.
    "lora": (*LORA, "--mm_projector_lr", "3e-3", "--weight_decay", "0.1", "--vitask_connector_lr", "2e-3"),
}


@dataclass(frozen=True)
class Commands:
    """Command lines of a step of 8 samples; 4 steps, saved at the second and the fourth."""

    make: Callable[..., list[str]]
    zero: Callable[[str], str]

    def __call__(self, output: Path, parallel: str, count: int, tuning: str = "full", *more: str) -> list[str]:
        """`parallel`: ddp (or one process), zero1, zero2, zero3."""
        deepspeed = ("--deepspeed", self.zero(parallel)) if parallel != "ddp" else ()
        batch = ("--per_device_train_batch_size", str(8 // count))
        return self.make(output, *deepspeed, *batch, *SAVING, *MORE[tuning], *more)


@pytest.fixture(scope="session")
def command(tiny_llava, mixture, mixture_features, zero) -> Commands:
    return Commands(lambda output, *more: flags(tiny_llava, mixture, mixture_features, output, *more), zero)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, command) -> Callable[..., Path]:
    """(parallel, count, tuning, flags...) to the output of a run that nothing happened to. Read only."""

    made: dict[tuple, Path] = {}

    def run(*case: object) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole") / "llava"
            finish(case[1], command(made[case], *case))
        return made[case]

    return run


def finish(count: int, arguments: list[str]) -> str:
    """Runs to its end, which has to be a good one; returns what rank 0 printed."""
    output = Path(arguments[arguments.index("--output_dir") + 1])
    ended = launch(count, arguments, output.parent / f"logs-{output.name}-{time.time_ns()}")
    assert ended.statuses == [0] * count, ended.text
    return ended.logs[0].read_text()


def interrupt(
    count: int, arguments: list[str], logs: Path, when: Callable[[], bool], act: Callable[[int], None]
) -> Ended:
    """A run that has `act` done to each of its processes (by pid) as soon as `when` holds."""
    over = threading.Event()
    others = set(multiprocessing.active_children())  # such as a loader's workers that an earlier test has left

    def watch() -> None:
        while not over.is_set():
            if when():
                for process in set(multiprocessing.active_children()) - others:
                    act(process.pid)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return launch(count, arguments, logs)
    finally:
        over.set()
        thread.join()


def sentences(ended: Ended) -> list[str]:
    """The lines that say why a run ended, of all ranks."""
    lines = "\n".join(log.read_text() for log in ended.logs).splitlines()
    return [line for line in lines if line.startswith("vitask: error: ")]


def tree(directory: Path) -> dict[str, int]:
    """`{path: bytes}` of all files below a folder."""
    return {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
