"""The TSM's own prediction in words: what the control `--vitask_ep text` puts where the exemplar would stand."""

from torch import Tensor

from vitask_plugin.data.instructions import response
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.joint import Tasks, columns


def task_of(tasks: Tasks, wanted: str | None) -> str:
    """Which of a TSM's tasks answers for the data of task `wanted`: the one of that name, or the only one it has.

    Raises:
        VITaskError: several tasks and none of that name.
    """
    if wanted in tasks:
        return wanted
    if len(tasks) > 1:
        raise VITaskError(
            f"the TSM knows the tasks {', '.join(tasks)}, and which of them is to predict a label for task {wanted!r} "
            "is not clear; use a TSM of this task, or of one task alone"
        )
    return next(iter(tasks))


def predicted_answer(tasks: Tasks, logits: Tensor, task: str) -> str:
    """The likeliest class of `task` as a response; of a multi-label task, all classes likelier than not.

    Args:
        tasks: of the TSM. logits: [K_all] of one image.

    Raises:
        VITaskError: if the TSM was not made for `task`.
    """
    own = logits[columns(tasks, task)]
    label = (own > 0).nonzero().squeeze(-1).tolist() if tasks[task]["multi_label"] else int(own.argmax())
    return response(tasks[task]["choices"], label)
