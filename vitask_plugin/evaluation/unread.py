"""A word where a tuned model's answers cannot be labels, or stop being labels: what it is, and the likely cause."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitask_plugin.data.comparison import tasks_alike
from vitask_plugin.evaluation.answers import parse_flexible
from vitask_plugin.inference.off_label import MOST_UNREAD, cause_of

_SHOWN = 60  # characters of an answer

Record = Mapping[str, Any] | None  # of a checkpoint; None: it is not VITask's


def foreign(task: str, blocks: Sequence[Any], record: Record) -> str | None:
    """The sentence about a task whose label set the checkpoint has never seen, under whatever name; None for others.

    Args:
        task: of lmms-eval. blocks: the `vitask` block of each document, None where there is none.
    """
    trained = (record or {}).get("tasks", {})
    for block in filter(None, blocks) if trained else ():
        if not tasks_alike(trained, block["task"], block["choices"]):
            known = "; ".join(f"{name} ({', '.join(choices)})" for name, choices in trained.items())
            return (
                f"task {task!r} has the labels {', '.join(block['choices'])} (of {block['task']!r}), and the "
                f"checkpoint was trained on none of that kind but on {known}; if a data set of its training is meant, "
                "check --tasks and VITASK_FOLDER"
            )
    return None


def unread(task: str, blocks: Sequence[Any], answers: Sequence[str], record: Record) -> str | None:
    """The sentence about a task of whose answers too many name no label; None where most do.

    Args:
        blocks: the `vitask` block of each answer's document, None where there is none.
    """
    pairs = [(block, answer) for block, answer in zip(blocks, answers, strict=True) if block]
    lost = [answer for block, answer in pairs if _label(block, answer) is None]
    if len(lost) <= MOST_UNREAD * len(pairs):
        return None
    return (
        f"task {task!r}: {len(lost)} of {len(pairs)} answers name no label and count as wrong, {lost[0][:_SHOWN]!r} "
        f"among them; {_cause(task, [block for block, _ in pairs], record)}"
    )


def _label(block: Mapping[str, Any], answer: str) -> Any:
    return parse_flexible(answer, block["choices"], multi_label=isinstance(block["label"], list))


def _cause(task: str, blocks: Sequence[Any], record: Record) -> str:
    if record is None:
        return "the model was not tuned by VITask, and _score tasks ask any model for the likeliest label"
    if foreign(task, blocks, record):
        return "it was not trained on these labels"
    if task.endswith("_incomplete"):
        return "the labels are not in the prompts of an _incomplete task, so train with --incomplete data too"
    return cause_of(record.get("arguments", {})) or (
        "the likely cause is too short a training: look at its loss_vanilla, and at the samples of --log_samples"
    )
