"""Commands run in stages, some side by side: a progress line and a log for each, and an error that shows its tail."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from vitask_plugin.errors import VITaskError

TAIL_LINES = 15
TAIL_BYTES = 16384
POLL_SECONDS = 0.2
STOP_SECONDS = 10


def module(name: str, *arguments: object) -> list[str]:
    """The command line that runs a Python module with this interpreter."""
    return [sys.executable, "-m", name, *map(str, arguments)]


class Stages:
    """Runs stages and tells the console: a live line for each that runs, a lasting one for each that is done.

    A command ends with this process, even if that is killed.

    Args:
        logs: folder for one log per command.
        environment: added to this process's own for every command.
        handles: file descriptors that commands keep open, such as a lock's.
    """

    def __init__(
        self, console: Console, logs: Path, environment: Mapping[str, str], handles: Sequence[int] = ()
    ) -> None:
        self.logs, self.handles = logs, tuple(handles)
        self.environment = {**os.environ, **environment}
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, transient=True)
        self._given_up = threading.Event()

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, title: str) -> Iterator[TaskID]:
        """Shows `title` while the block runs, and keeps a line with the time it took if it ends well."""
        start = time.monotonic()
        task = self._progress.add_task(title, total=None)
        try:
            yield task
            self.say(f"[green]✓[/green] {title} [dim]{time.monotonic() - start:.0f} s[/dim]")
        finally:
            self._progress.remove_task(task)

    def say(self, text: str, **how: Any) -> None:
        """Prints above the live lines."""
        self._progress.console.print(text, highlight=False, **how)

    def command(
        self,
        title: str,
        name: str,
        command: Sequence[str],
        *,
        bar: str = "",
        environment: Mapping[str, str] | None = None,
        stop: signal.Signals = signal.SIGINT,
    ) -> None:
        """Runs `command`; its output goes to `logs`/`name`.log, behind the command line itself.

        Args:
            bar: what stands before the tqdm bar that the live line follows (a regular expression).
            environment: of this command, beside that of all.
            stop: what ends it early.

        Raises:
            VITaskError: if the command fails; the tail of its log is printed.
        """
        log = self.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        steps = re.compile(rf"(?:^|[\r\n]) *{bar} *\d+%\|[^|]*\| *(\d+)/(\d+) \[")
        with self.stage(title) as task, open(log, "w", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**self.environment, **(environment or {})},
                pass_fds=self.handles,
                preexec_fn=_ends_with(os.getpid()),
                start_new_session=True,  # Ctrl-C reaches it through `_interrupt`, once
            )
            try:
                while process.poll() is None and not self._given_up.wait(POLL_SECONDS):
                    if found := steps.findall(_tail(log)):
                        done, total = map(int, found[-1])
                        self._progress.update(task, completed=done, total=total)
            finally:
                _interrupt(process, stop)
            if self._given_up.is_set():
                raise VITaskError(f"{title}: given up because another stage failed")
            if process.returncode:
                self.say(f"[red]✗[/red] {title}; its log ends with:")
                self.say("\n".join(last_lines(log)), markup=False, style="dim")
                raise VITaskError(f"{title}: failed with status {process.returncode}; the whole log is in {str(log)!r}")

    def together(self, *chains: Callable[[], Any]) -> list[Any]:
        """Calls all `chains` side by side and returns their results in order; if one fails, the others are given up."""
        with ThreadPoolExecutor(len(chains)) as pool:
            futures = [pool.submit(chain) for chain in chains]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._given_up.set()
                raise
        return [future.result() for future in futures]


_PR_SET_PDEATHSIG = 1  # of Linux
_libc = ctypes.CDLL(None)


def _ends_with(parent: int) -> Callable[[], None]:
    """For a new process: SIGTERM when `parent` ends, or at once where it has ended in between."""

    def prepare() -> None:
        if hasattr(_libc, "prctl"):
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def last_lines(log: Path) -> list[str]:
    """The last lines of a log that say something, without what a progress bar overwrote."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in _tail(log).split("\n")]
    return [line for line in lines if line][-TAIL_LINES:]


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def _interrupt(process: subprocess.Popen, stop: signal.Signals) -> None:
    """Ends a process that still runs so that it can clean up, as Ctrl-C would where `stop` is SIGINT."""
    if process.poll() is not None:
        return
    process.send_signal(stop)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
