"""Which split the tasks judge: `test_split: !function splits.medmnist` is what $MEDMNIST_SPLIT says, by default test.

So lmms-eval itself knows the split: it stands in the results (`configs`) and is part of the response cache's keys.
"""

import os

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.harness import exit_on_bad_input

VARIABLES = {"medmnist": "MEDMNIST_SPLIT", "folder": "VITASK_SPLIT"}
SPLITS = ("test", "val")


@exit_on_bad_input
def chosen(variable: str) -> str:
    """The split that an environment variable names.

    Raises:
        VITaskError: neither test nor val. Figures on training images would say what was memorised.
    """
    split = os.environ.get(variable) or SPLITS[0]
    if split not in SPLITS:
        raise VITaskError(f"{variable} is {split!r}; it must be test (the default) or val, to choose by")
    return split


def __getattr__(name: str) -> str:
    # lmms-eval takes from a module what is there, and calls nothing.
    if name not in VARIABLES:
        raise AttributeError(name)
    return chosen(VARIABLES[name])
