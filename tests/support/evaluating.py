"""lmms-eval's own objects, made as the harness makes them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

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


def ask(model: Any, questions: Sequence[tuple[list[Image.Image], str]], **settings: Any) -> list[str]:
    """Answers to (images, question) of a task of one's own, through the harness' requests."""
    from lmms_eval.api.instance import Instance

    model.task_dict["own"] = {"test": _Rows(SimpleNamespace(images=images) for images, _ in questions)}
    return model.generate_until(
        [
            Instance(
                request_type="generate_until",
                arguments=(question, dict(settings), lambda row: row.images, number, "own", "test"),
                idx=0,
                metadata={"task": "own", "doc_id": number, "repeats": 1},
            )
            for number, (_, question) in enumerate(questions)
        ]
    )


class _Rows(list):
    """Documents of a task without a `vitask` block."""

    column_names = ()
