"""Runs a plan: what is done is kept, what depends on a change is done again, what was killed goes on.

`OUT/stages.json` says of each stage what its output depended on (`fingerprint`), whether it has ended, and what its
output was. A stage is done again when one of these differs; its old output is removed first, except where the same
commands go on from what a killed run left. One run at a time: `OUT/.lock` is held by this process and by the commands
that it runs, so that a run after a kill waits until they are gone too.

Stages may run side by side (`Plan.at_once`), each in a thread that takes the next stage of which all that it reads has
ended. Only commands run beside each other: whatever is looked at, removed or remembered is so by one thread at a time.
"""

import glob
import json
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import digest_of, write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.run.fingerprint import ABSENT, Contents, Fingerprint, difference, fingerprint
from vitask_plugin.run.lock import locked, terminable
from vitask_plugin.run.stage import Plan, Stage
from vitask_plugin.stages import Stages, last_lines

if TYPE_CHECKING:
    from rich.console import Console

STAGES_FILE, CONTENTS_FILE, LOGS = "stages.json", ".contents.json", "logs"
_DONE, _RUNNING = "done", "running"


class Engine:
    """One run in one folder.

    Args:
        verbose: commands are printed before they run; else they are in their logs alone.

    Attributes:
        ran: names of the stages that ran, in their order, with the reason of each.
    """

    def __init__(self, plan: Plan, console: "Console", *, verbose: bool = True) -> None:
        self.plan, self.console, self.verbose = plan, console, verbose
        self.ran: dict[str, str] = {}
        self._contents = Contents(plan.out / CONTENTS_FILE)
        self._records: dict[str, dict[str, Any]] = _read_records(plan.out)
        self._outputs: dict[str, str] = {}
        self._waiting, self._unfinished = list(plan.stages), {stage.name for stage in plan.stages}
        self._turn = threading.Condition()  # held by whoever reads or changes anything of the above

    def run(self) -> None:
        """Runs what has to run.

        Raises:
            VITaskError: a command failed, or another run is in the folder.
            KeyboardInterrupt: Ctrl-C or SIGTERM; what ran is stopped, and the same run goes on from there.
        """
        with self.opened() as stages:
            self.bring_up_to_date(stages)

    @contextmanager
    def opened(self) -> Iterator[Stages]:
        """The folder, for this run alone; for a caller with work of its own around `bring_up_to_date`."""
        out, variables = self.plan.out, self.plan.environment
        with locked(out) as lock, terminable(), Stages(self.console, out / LOGS, variables, [lock]) as stages:
            yield stages

    def bring_up_to_date(self, stages: Stages) -> None:
        """As `run`, in a folder that is open."""
        if self.plan.at_once == 1:
            self._work(stages)
        else:
            stages.together(*[lambda: self._work(stages)] * self.plan.at_once)

    def _work(self, stages: Stages) -> None:
        """Brings one stage after another up to date until none is left, or another thread has failed."""
        try:
            while (stage := self._next()) is not None:
                self._bring_up_to_date(stage, stages)
        except BaseException:
            with self._turn:
                self._waiting.clear()
                self._turn.notify_all()
            raise

    def _next(self) -> Stage | None:
        """The first stage that waits for nothing; waits until there is one."""
        with self._turn:
            while self._waiting:
                for stage in self._waiting:
                    if self._unfinished.isdisjoint(stage.reads):
                        self._waiting.remove(stage)
                        return stage
                self._turn.wait()
            return None

    def _bring_up_to_date(self, stage: Stage, stages: Stages) -> None:
        with self._turn:
            now = fingerprint(stage, self.plan, self._outputs, self._contents)
            record = self._records.get(stage.name)
            reason = self._reason(stage, record, now)
        if reason is None:
            output = record["output"]
            stages.say(f"[dim]= {stage.title}: as it is[/dim]")
        else:
            output = self._run(stage, stages, record, now, reason)
        with self._turn:
            self._outputs[stage.name] = output
            self._unfinished.remove(stage.name)
            self._contents.save()
            self._turn.notify_all()

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

    def _run(self, stage: Stage, stages: Stages, record: dict[str, Any] | None, now: Fingerprint, reason: str) -> str:
        """Runs a stage; returns what its output is."""
        if record is not None:
            stages.say(f"[yellow]{stage.name}[/yellow]: {reason}", markup=True)
        with self._turn:
            self.ran[stage.name] = reason
            done = self._prepare(stage, record, now)
        # Ctrl-C would end a training of a TSM with the best so far, and nothing to go on from.
        stop = signal.SIGTERM if stage.resumes else signal.SIGINT
        for number, command in enumerate(stage.commands[done:], start=done + 1):
            self._print(stages, command)
            several = len(stage.commands) > 1
            title = f"{stage.title} ({number} of {len(stage.commands)})" if several else stage.title
            log = f"{stage.name}-{number}" if several else stage.name
            before = _files(stage) if command.leaves else ()
            stages.command(title, log, command.words, bar=stage.bar, environment=command.environment, stop=stop)
            files = _files(stage)
            self._check_left(stages, title, log, command.leaves, set(files).difference(before))
            with self._turn:
                self._record(stage, {"state": _RUNNING, "inputs": now, "commands": number, "files": files})
        missing = [path for path in stage.outputs if not path.exists()]
        if missing:
            raise VITaskError(
                f"{stage.title}: ended well, and {str(missing[0])!r} is not there; see {str(self.plan.out / LOGS)!r}"
            )
        for path, advice in stage.needed.items():
            if not path.exists():
                raise VITaskError(f"{stage.title}: {str(path)!r} is not there; {advice}")
        with self._turn:
            _remove_beside(stage)
            output = self._output_of(stage)
            self._record(stage, {"state": _DONE, "inputs": now, "output": output})
        return output

    def _check_left(self, stages: Stages, title: str, log: str, leaves: Collection[str], new: Collection[str]) -> None:
        """Refuses a command that ended well without what it is for."""
        lacking = next((ending for ending in leaves if not any(name.endswith(ending) for name in new)), None)
        if lacking is not None:
            path = self.plan.out / LOGS / f"{log}.log"
            stages.say("\n".join(last_lines(path)), markup=False, style="dim")
            raise VITaskError(
                f"{title}: ended with status 0 and has failed: it wrote no new file *{lacking}; the whole log is in "
                f"{str(path)!r}; the same command goes on from here"
            )

    def _prepare(self, stage: Stage, record: dict[str, Any] | None, now: Fingerprint) -> int:
        """Removes what an earlier run left, but for what is gone on from; returns how many commands have ended."""
        unfinished = record is not None and record["state"] == _RUNNING and record["inputs"] == now
        done = record.get("commands", 0) if unfinished else 0
        if not (unfinished and (stage.resumes or done)):
            _remove(stage)
            done = 0
        elif stage.resumes:
            _remove_torn_checkpoints(stage)
        else:
            _remove_but(stage, record["files"])
        self._record(stage, {"state": _RUNNING, "inputs": now, "commands": done, "files": _files(stage)})
        return done

    def _print(self, stages: Stages, command: Any) -> None:
        if self.verbose:
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
