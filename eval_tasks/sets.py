"""Every set of $VITASK_FOLDER, which `vitask data merge` wrote, as a task of its own: the members of `vitask_sets`.

How many there are is known when a group is loaded, so its one line names what makes them: `!function sets.score`.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.utils import load_yaml_config
from vitask_plugin.eval_tasks import folder, splits

from vitask_plugin.data.instructions import label_sets
from vitask_plugin.data.label_file import LABELS_FILE, read_sets
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.report.results import split_task

GROUP = "vitask_sets"
TEMPLATES = {"words": "_template.yaml", "incomplete": "_incomplete.yaml", "score": "_score.yaml"}
_TAKEN = (GROUP, "vitask_folder")


@exit_on_bad_input
def documents(stand_in: datasets.Dataset) -> datasets.Dataset:
    """The documents of one set, which is called like the `dataset_name` of its task."""
    merged, name = folder.named_folder(), stand_in.info.config_name
    return folder.read(merged / name, str(stand_in.split), f"{merged.name}/{name}")


@exit_on_bad_input
def members(variant: str) -> dict[str, Any]:
    """A group of lmms-eval with a task for each set.

    Raises:
        VITaskError: $VITASK_FOLDER is not set, or holds no sets.
    """
    merged = folder.named_folder()
    path = merged / LABELS_FILE
    sets = read_sets(merged, "VITASK_FOLDER's label set")
    if not sets:
        raise VITaskError(
            f"{str(path)!r} is not of several data sets; put them together with `vitask data merge`, or judge one with "
            "the task vitask_folder"
        )
    ending = "" if variant == "words" else f"_{variant}"
    template = load_yaml_config(str(Path(__file__).with_name(TEMPLATES[variant])))
    own = {"test_split": splits.chosen("VITASK_SPLIT"), "process_docs": documents}
    tasks = [
        {**template, **own, "task": f"{task}{ending}", "dataset_name": name} for name, task in task_names(sets).items()
    ]
    return {"group": f"{GROUP}{ending} of {merged.name}", "task": tasks}


def task_names(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{set: name of its task in words}: MedMNIST's own where it is that set, so that a report puts the paper's figures
    beside it, else `vitask_SET`."""
    often = Counter(labels["task"] for labels in sets.values())
    return {name: _task_name(name, labels, often[labels["task"]] == 1) for name, labels in sets.items()}


def _task_name(name: str, labels: Mapping[str, Any], alone: bool) -> str:
    known = label_sets().get(labels["task"])
    if alone and known is not None and [*known.choices] == labels["choices"]:
        return known.task
    stem, ending = split_task(f"vitask_{name}")
    task = f"{stem}-{ending}" if ending else stem
    return f"{task}-set" if task in _TAKEN else task


def __getattr__(name: str) -> dict[str, Any]:
    # lmms-eval takes from a module what is there, and calls nothing.
    if name not in TEMPLATES:
        raise AttributeError(name)
    return members(name)
