"""Which documents of an evaluation get an exemplar: those of a task that the checkpoint was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitask_plugin.data.comparison import tasks_alike
from vitask_plugin.errors import VITaskError


@dataclass(frozen=True)
class Prompting:
    """The rule of one evaluation with exemplars.

    An exemplar is put behind one image, as in training. Of another task, as of general questions, the connector has
    seen nothing: what it says there is noise, and would be taken for what tuning cost the model.

    Attributes:
        label_sets: {task: its labels} of the training data; empty = the checkpoint does not tell.
        everywhere: every document with one image, whatever its task (`ep=all`).
    """

    label_sets: Mapping[str, Sequence[str]]
    everywhere: bool = False

    def covers(self, block: Any) -> bool:
        """Whether a document with this `vitask` block (None = without) is of a task of training: by the task's name,
        or, as an external set is, by the same labels in any order and spelling that look alike."""
        if self.everywhere or not self.label_sets:
            return True
        if not isinstance(block, Mapping):
            return False
        return bool(tasks_alike(self.label_sets, block["task"], block["choices"]))

    def summary(self, task: str, blocks: Sequence[Any]) -> str:
        """One line on how many documents of an lmms-eval task get an exemplar.

        Args:
            blocks: the `vitask` block of each document that is asked about, None where there is none.
        """
        prompted = sum(map(self.covers, blocks))
        line = f"exemplars: {prompted} of {len(blocks)} documents of {task!r}"
        if self.everywhere:
            return f"{line}, whatever they ask (ep=all), if they show one image"
        if not self.label_sets:
            return f"{line}, if they show one image: the checkpoint does not tell which tasks it was trained on"
        if prompted < len(blocks):
            trained = ", ".join(self.label_sets)
            return f"{line}; the checkpoint was trained on {trained} (ep=all prompts every document with one image)"
        return line


def read_ep(given: Any, tsm: str | None) -> tuple[bool, bool]:
    """(whether there are exemplars, whether everywhere) of `ep=` in `--model_args`; None = as there is a TSM.

    Raises:
        VITaskError: if it is none of True, False and all.
    """
    if given is None:
        return tsm is not None, False
    if isinstance(given, str) and given.lower() == "all":
        return True, True
    if not isinstance(given, bool):
        raise VITaskError(f"ep={given!r} is neither True nor False nor all")
    return given, False
