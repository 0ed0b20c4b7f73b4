"""Where an unfinished training stands: one file, whole or absent, from which the same command goes on.

It lies in a hidden folder beside the output, which is removed once the TSM is written.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path

CHECKPOINT_FILE = "checkpoint.pt"


def training_folder(output: str | Path) -> Path:
    """The hidden folder of an output that is not there yet."""
    output = Path(os.path.abspath(output))
    return output.parent / f".{output.name}.training"


class Progress:
    """The checkpoint of one network's training.

    Args:
        folder: of this training. identity: `flags` by name, and whatever else has to be the same to go on, as JSON.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self._path = folder / CHECKPOINT_FILE

    def read(self) -> dict[str, Any] | None:
        """What `write` wrote last, on the CPU; None if it wrote nothing.

        Raises:
            VITaskError: damaged, or of a training with other flags or data.
        """
        if not self._path.is_file():
            return None
        again = f"or remove the folder {str(self.folder.parent)!r} to start anew"
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            found = state["identity"]
        except Exception as error:  # changed bytes make zip, pickle and torch fail in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise VITaskError(f"checkpoint {str(self._path)!r} is damaged ({reason}); copy it again, {again}") from None
        flags, own = found.get("flags", {}), self.identity["flags"]
        other = [name for name in own if flags.get(name) != own[name]]
        if other:
            listed = ", ".join(f"--{n.replace('_', '-')} {flags.get(n)} (now {own[n]})" for n in other[:4])
            raise VITaskError(
                f"an unfinished training of this output had other flags: {listed}; give those to go on with it, {again}"
            )
        for name, value in self.identity.items():
            if found.get(name) != value:
                shown = "" if len(str(value)) > 20 else f" ({found.get(name)}, now {value})"
                raise VITaskError(
                    f"an unfinished training of this output had other {name}{shown}; go on with the same, {again}"
                )
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces what was written before by `state`: tensors, numbers and texts in dicts and lists."""
        for stale in self.folder.glob(f".{CHECKPOINT_FILE}.*"):  # of a process that was killed as it wrote
            stale.unlink(missing_ok=True)
        try:
            with atomic_path(self._path) as path, path.open("wb") as file:
                torch.save({"identity": dict(self.identity), **state}, file)
                file.flush()
                os.fsync(file.fileno())  # a rename must not reach the disk before what it names
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            raise VITaskError(
                f"checkpoint {str(self._path)!r} cannot be written ({(str(error).splitlines() or [''])[0]}); free some "
                "room and give the same command, which goes on"
            ) from error

    def drop(self) -> None:
        """Removes this training's folder, and the one around it if nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def forget(output: str | Path) -> None:
    """Removes what is kept of an output's training."""
    shutil.rmtree(training_folder(output), ignore_errors=True)
