"""lmms-eval's own objects, made as the harness makes them."""

from pathlib import Path
from typing import Any

import pytest

TASKS = Path(__file__).parents[2] / "eval_tasks"
VARIANTS = ("vitask_drawn", "vitask_drawn_incomplete", "vitask_drawn_score")


def open_model(checkpoint: Path, **model_args: Any) -> Any:
    """As the harness does, from an argument string."""
    from vitask_plugin.evaluation.lmms_llava import VITaskLlava

    arguments = ",".join(f"{key}={value}" for key, value in {"pretrained": checkpoint, **model_args}.items())
    return VITaskLlava.create_from_arg_string(arguments, {"batch_size": 4, "device": "cpu"})


def load_tasks(model: Any, root: Path, *names: str) -> dict[str, Any]:
    """The harness' own task objects, known to the model as the harness makes them known."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        tasks = get_task_dict(list(names), manager)
    for name, task in tasks.items():
        model.task_dict[name] = task.dataset
        task.build_all_requests(limit=None, rank=0, world_size=1)
    return tasks
