"""Runs a plan: what is done is kept, what depends on a change is done again, what was killed goes on.

`OUT/stages.json` says of each stage what its output depended on (`fingerprint`), whether it has ended, and what its
output was. A stage is done again when one of these differs; its old output is removed first, except where the same
commands go on from what a killed run left. One run at a time: `OUT/.lock` is held by this process and by the command
that it runs, so that a run after a kill waits until that is gone too.
"""

import contextlib
import fcntl
import glob
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import digest_of, read_json, write_json
from vitask_plugin.run.fingerprint import ABSENT, Contents, Fingerprint, difference, fingerprint
from vitask_plugin.run.stage import Plan, Stage
from vitask_plugin.stages import Stages

if TYPE_CHECKING:
    from rich.console import Console

STAGES_FILE, LOCK_FILE, CONTENTS_FILE, LOGS = "stages.json", ".lock", ".contents.json", "logs"
WAIT_SECONDS = 60  # for a command of a killed run to end
_DONE, _RUNNING = "done", "running"


class Engine:
    """One run in one folder.

    Attributes:
        ran: names of the stages that ran, in their order, with the reason of each.
    """

    def __init__(self, plan: Plan, console: "Console") -> None:
        self.plan, self.console = plan, console
        self.ran: dict[str, str] = {}
        self._contents = Contents(plan.out / CONTENTS_FILE)
        self._records: dict[str, dict[str, Any]] = _read_records(plan.out)
        self._outputs: dict[str, str] = {}

    def run(self) -> None:
        """Runs what has to run.

        Raises:
            VITaskError: a command failed, or another run is in the folder.
            KeyboardInterrupt: Ctrl-C or SIGTERM; what ran is stopped, and the same run goes on from there.
        """
        with _locked(self.plan.out) as lock, _terminable():
            stages = Stages(self.console, self.plan.out / LOGS, self.plan.environment, [lock])
            with stages:
                for stage in self.plan.stages:
                    self._bring_up_to_date(stage, stages)

    def _bring_up_to_date(self, stage: Stage, stages: Stages) -> None:
        now = fingerprint(stage, self.plan, self._outputs, self._contents)
        record = self._records.get(stage.name)
        reason = self._reason(stage, record, now)
        if reason is None:
            self._outputs[stage.name] = record["output"]
            stages.say(f"[dim]= {stage.title}: as it is[/dim]")
        else:
            self.ran[stage.name] = reason
            self._run(stage, stages, record, now, reason)
        self._contents.save()

    def _reason(self, stage: Stage, record: dict[str, Any] | None, now: Fingerprint) -> str | None:
        """Why a stage has to run, None = it need not."""
        if record is None:
            return "not done yet"
        if why := difference(record["inputs"], now):
            return why
        if record["state"] != _DONE:
            return "was not finished"
        found = self._output_of(stage)
        if found != record["output"]:
            return "its output is gone" if ABSENT in found else "its output was changed"
        return None

    def _run(self, stage: Stage, stages: Stages, record: dict[str, Any] | None, now: Fingerprint, reason: str) -> None:
        unfinished = record is not None and record["state"] == _RUNNING and record["inputs"] == now
        if record is not None:
            stages.say(f"[yellow]{stage.name}[/yellow]: {reason}", markup=True)
        done = record.get("commands", 0) if unfinished else 0
        if not (unfinished and (stage.resumes or done)):
            _remove(stage)
            done = 0
        elif stage.resumes:
            _remove_torn_checkpoints(stage)
        else:
            _remove_but(stage, record["files"])
        self._record(stage, {"state": _RUNNING, "inputs": now, "commands": done, "files": _files(stage)})
        # Ctrl-C would end a training of a TSM with the best so far, and nothing to go on from.
        stop = signal.SIGTERM if stage.resumes else signal.SIGINT
        for number, command in enumerate(stage.commands):
            if number < done:
                continue
            self._print(stages, command)
            several = len(stage.commands) > 1
            title = f"{stage.title} ({number + 1} of {len(stage.commands)})" if several else stage.title
            log = f"{stage.name}-{number + 1}" if several else stage.name
            how = {"bar": stage.bar, "environment": command.environment, "stop": stop}
            stages.command(title, log, command.words, **how)
            self._record(stage, {"state": _RUNNING, "inputs": now, "commands": number + 1, "files": _files(stage)})
        missing = [path for path in stage.outputs if not path.exists()]
        if missing:
            raise VITaskError(
                f"{stage.title}: ended well, and {str(missing[0])!r} is not there; see {str(self.plan.out / LOGS)!r}"
            )
        for path, advice in stage.needed.items():
            if not path.exists():
                raise VITaskError(f"{stage.title}: {str(path)!r} is not there; {advice}")
        _remove_beside(stage)
        self._outputs[stage.name] = output = self._output_of(stage)
        self._record(stage, {"state": _DONE, "inputs": now, "output": output})

    def _print(self, stages: Stages, command: Any) -> None:
        stages.say(f"$ {line_of(command)}", markup=False, style="dim", soft_wrap=True)

    def _output_of(self, stage: Stage) -> str:
        found = [self._contents.of(path, follow=False) for path in stage.outputs]
        return ABSENT if ABSENT in found else digest_of(found)

    def _record(self, stage: Stage, record: dict[str, Any]) -> None:
        self._records[stage.name] = record
        write_json(self.plan.out / STAGES_FILE, self._records)


def _read_records(out: Path) -> dict[str, dict[str, Any]]:
    path = out / STAGES_FILE
    found = read_json(path, "record of an earlier run") if path.is_file() else {}
    if not isinstance(found, dict) or not all(isinstance(one, dict) and "inputs" in one for one in found.values()):
        raise VITaskError(f"{str(path)!r} is no record of an earlier run; choose another --out")
    return found


def _remove(stage: Stage) -> None:
    """The outputs, and what lies beside them."""
    _remove_beside(stage)
    for path in stage.outputs:
        _delete(path)


def _remove_beside(stage: Stage) -> None:
    """What commands that were killed left beside the outputs (see `files.atomic_path`)."""
    for path in stage.outputs:
        for old in list(path.parent.glob(f".{glob.escape(path.name)}.*")) if path.parent.is_dir() else ():
            _delete(old)


def _files(stage: Stage) -> list[str]:
    """The files of the outputs, as they are after a whole command."""
    found = [path for output in stage.outputs for path in (output.rglob("*") if output.is_dir() else [output])]
    return sorted(str(path) for path in found if os.path.lexists(path) and not path.is_dir())


def _remove_but(stage: Stage, kept: Collection[str]) -> None:
    """What a command that was killed left among the outputs of those that had ended: lmms-eval's files are in no one
    order, none of them whole or absent, and have a new name each time."""
    for path in sorted(set(_files(stage)) - set(kept)):
        _delete(Path(path))


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _remove_torn_checkpoints(stage: Stage) -> None:
    """Those of a plain Trainer that was killed while it wrote: its state comes last."""
    for path in stage.outputs:
        for folder in path.glob("checkpoint-*"):
            try:
                json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """The lock of a run's folder, as a file descriptor.

    Raises:
        VITaskError: another run has it, or what a killed one started does not end.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, out)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _take(handle: int, out: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            owner = os.pread(handle, 20, 0).decode() or "?"
            if owner.isdecimal() and not _runs(int(owner)) and time.monotonic() < deadline:
                time.sleep(0.2)  # its command is about to end too
                continue
            raise VITaskError(
                f"another `vitask run` (process {owner}) works in {str(out)!r}; wait for it, or choose another --out"
            ) from None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# The commands as text ------------------------------------------------------------------------------------------------


def line_of(command: Any) -> str:
    """A command as a shell takes it, with the variables that are its own."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    return " ".join([*variables, shlex.join(command.words)])


def script_of(plan: Plan) -> str:
    """All commands as a script that can be run as it is."""
    lines = ["#!/usr/bin/env bash", "# What `vitask run` runs, in this order.", "set -euo pipefail"]
    lines.append(f"cd {shlex.quote(os.getcwd())}")  # what flags name may be relative to it
    for name, value in plan.environment.items():
        if name == "PATH":
            lines.append(f'export PATH={shlex.quote(value.split(os.pathsep)[0])}:"$PATH"')
        else:
            lines.append(f"export {name}={shlex.quote(value)}")
    for stage in plan.stages:
        lines += ["", f"# {stage.title}", *map(line_of, stage.commands)]
    return "\n".join(lines) + "\n"
