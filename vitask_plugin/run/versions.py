"""Installed versions of what figures depend on: recorded with them, and a stage of other ones is done again."""

import importlib.metadata
from functools import lru_cache

PACKAGES = (
    *("vitask-plugin", "llava-torch", "lmms_eval", "transformers", "torch", "timm", "peft", "deepspeed"),
    "medmnist",
)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """`{name: version}` of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
