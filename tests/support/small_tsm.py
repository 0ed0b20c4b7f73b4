"""A small untrained TSM of two tasks, for the tests of `tsm`."""

import torch

from vitask_plugin.tsm.backbone import build_timm, timm_options
from vitask_plugin.tsm.model import TSM

TASKS = {
    "one": {"choices": ["a", "b", "c"], "multi_label": False},
    "many": {"choices": ["p", "q"], "multi_label": True},
}


def make(arch: str = "test_vit", image_size: int = 32, **changes) -> TSM:
    torch.manual_seed(0)
    options = timm_options(arch, 5, image_size)
    record = {
        "source": {"timm": arch, "options": options},
        "image_size": image_size,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "tasks": TASKS,
    }
    return TSM(build_timm(arch, 5, options), record | changes)
