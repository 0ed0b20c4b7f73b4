"""VITask: task-specific visual instruction tuning for LLaVA and for vision-language models in Hugging Face format.

From Python, what the commands are made of (imported when first asked for, so that `import vitask_plugin` is fast):

    VITaskArguments      every --vitask flag
    objective            the paper's losses and their sum (module)
    ExemplarConnector    TSM features -> exemplar tokens
    Packed, Separate     the layouts of all branches of a batch, and their reference
    ContrastiveSampler   the order of a run, and each sample's negative
    TSM                  the task-specific model: `TSM.load(folder)`, `tsm(pixels)`
    FeatureStore         its features on the disk: `FeatureStore.open(folder)`
    read_record          `vitask.json` of a checkpoint
    Specialist           a tuned checkpoint in use: `Specialist.load(folder).predict(images)`
    VITaskError          bad input, in one sentence
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_DOOR = {
    "VITaskArguments": "vitask_plugin.arguments",
    "objective": "vitask_plugin.method.objective",
    "ExemplarConnector": "vitask_plugin.method.connector",
    "Packed": "vitask_plugin.method.branches",
    "Separate": "vitask_plugin.method.branches",
    "ContrastiveSampler": "vitask_plugin.method.sampler",
    "TSM": "vitask_plugin.tsm.model",
    "FeatureStore": "vitask_plugin.tsm.features",
    "read_record": "vitask_plugin.record.checkpoint",
    "Specialist": "vitask_plugin.specialist.specialist",
    "VITaskError": "vitask_plugin.errors",
}
__all__ = ["__version__", *_DOOR]


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module 'vitask_plugin' has no attribute {name!r}")
    module = importlib.import_module(_DOOR[name])
    return module if _DOOR[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
