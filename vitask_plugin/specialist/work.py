"""Predicting many images, in this process or in several, each with its share; rows are kept as they are made."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.specialist.inputs import Input
from vitask_plugin.specialist.parts import Parts
from vitask_plugin.specialist.specialist import EP, Specialist


@dataclass(frozen=True)
class Work:
    """What is to be done; travels to other processes.

    Attributes:
        load: keywords of `Specialist.load`. device: auto, cpu, cuda or cuda:N.
    """

    load: dict[str, Any]
    device: str
    ep: EP | None
    answer: bool
    batch_size: int
    parts: Parts


def predict(work: Work, images: Sequence[Input], processes: int) -> Iterator[tuple[str, Any]]:
    """What becomes known as it does: ("line", what is asked), and ("row", its error or None) for each image.

    Raises:
        VITaskError: what `Specialist` refuses, or a process that was ended from outside.
    """
    processes = min(processes, len(images))
    if not images:
        return
    if processes == 1:
        yield from _alone(work, images)
    else:
        yield from _together(work, images, processes)


def _alone(work: Work, images: Sequence[Input], number: int = 0) -> Iterator[tuple[str, Any]]:
    specialist = Specialist.load(**work.load, device=work.device)
    yield "line", specialist.describe(work.ep)
    with contextlib.closing(work.parts.writer(number)) as writer:
        paths = [image.path for image in images]
        found = specialist.stream(paths, ep=work.ep, answer=work.answer, batch_size=work.batch_size)
        for image, prediction in zip(images, found, strict=True):
            writer.write(image, replace(prediction, image=image.name))
            yield "row", prediction.error


def _together(work: Work, images: Sequence[Input], processes: int) -> Iterator[tuple[str, Any]]:
    context = multiprocessing.get_context("spawn")
    started, ends = [], []
    try:
        for number in range(processes):
            own, theirs = context.Pipe(duplex=False)
            share = images[number::processes]
            process = context.Process(target=_work, args=(work, share, number, processes, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            ends.append(own)
        yield from _heard(ends)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _heard(ends: list[Connection]) -> Iterator[tuple[str, Any]]:
    """What the processes say until each has said that it is done."""
    while ends:
        for end in wait(ends):
            try:
                kind, what = end.recv()
            except EOFError:
                raise VITaskError(
                    "a process of --processes was ended from outside, perhaps for lack of memory; give fewer of them, "
                    "or a smaller --batch-size: what is there is kept"
                ) from None
            if kind == "error":
                raise VITaskError(what)
            if kind == "done":
                ends.remove(end)
            else:
                yield kind, what


def _work(work: Work, images: Sequence[Input], number: int, processes: int, end: Connection) -> None:
    """One of several processes."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    cards = torch.cuda.device_count()
    if work.device in ("auto", "cuda") and cards:
        work = replace(work, device=f"cuda:{number % cards}")
    elif torch.get_num_threads() > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        for kind, what in _alone(work, images, number):
            if kind != "line" or number == 0:
                end.send((kind, what))
        end.send(("done", None))
    except VITaskError as error:
        end.send(("error", str(error)))
    except BrokenPipeError:
        sys.exit(1)  # the first process was killed
