"""Installed versions of what figures depend on: recorded with them, and a stage of other ones is done again."""

from functools import lru_cache

from vitask_plugin.record import checkpoint

PACKAGES = (
    *("vitask-plugin", "llava-torch", "lmms_eval", "transformers", "torch", "timm", "peft", "deepspeed"),
    *("accelerate", "tokenizers", "numpy", "pillow", "medmnist"),
)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """`{name: version}` of those that are installed."""
    return checkpoint.versions(PACKAGES)
