"""One JSON line for each epoch of a TSM's training, and the same figures for TensorBoard or Weights & Biases."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, make_parent

LOG_FILE = "log.jsonl"


def check_tracker(name: str) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        VITaskError: naming the package.
    """
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    available = {"none": lambda: True, "tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[name]
    if not available():
        raise VITaskError(f"--report-to {name} needs the package {name}; install it with `pip install {name}`")


class EpochLog:
    """The log of one network's training.

    Args:
        folder: the log is written there as it grows.
        tracker: none, tensorboard or wandb. runs: folder that it writes to, and stays. name: of this training in it.
        settings: said to the tracker.
    """

    def __init__(self, folder: Path, tracker: str, runs: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / LOG_FILE
        self._tracker: Any = None
        if tracker == "none":
            return
        import accelerate.tracking

        accelerate.PartialState()  # the trackers ask it whether this is the first process
        runs.mkdir(parents=True, exist_ok=True)
        if tracker == "tensorboard":
            self._tracker = accelerate.tracking.TensorBoardTracker(name, logging_dir=str(runs))
        else:
            self._tracker = accelerate.tracking.WandBTracker(runs.name, dir=str(runs), name=name)
        self._tracker.start()
        self._tracker.store_init_configuration({key: str(value) for key, value in settings.items()})

    def begin(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Starts the file anew with the epochs that a resumed training has behind it."""
        make_parent(self.path)
        with atomic_path(self.path) as path:
            path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Writes the line of an epoch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._tracker is not None:
            values = {key: value for key, value in entry.items() if isinstance(value, float)}
            by_task = {f"val_accuracy/{task}": value for task, value in entry["val_accuracy_by_task"].items()}
            self._tracker.log(values | by_task, step=entry["epoch"])

    def end(self) -> None:
        """Tells the tracker that nothing follows."""
        if self._tracker is not None:
            self._tracker.finish()
