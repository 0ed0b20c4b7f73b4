"""Answers that are no labels: how many are too many, and the flag that is known to bring them about."""

from collections.abc import Mapping
from typing import Any

from vitask_plugin.arguments import VITaskArguments

MOST_UNREAD = 0.05  # of the answers to a task
_CRT = "vitask_crt_weight"


def cause_of(flags: Mapping[str, Any]) -> str | None:
    """A sentence's end about a training whose flags let words fall apart, None where they do not.

    Args:
        flags: as `VITaskArguments.flags` gives them.
    """
    usual = VITaskArguments.__dataclass_fields__[_CRT].default
    if flags.get("vitask_stage") == 2 and flags.get(_CRT, 0) > usual:
        return (
            f"the likely cause is --{_CRT} {flags[_CRT]:g}, under which words fall apart: train stage 2 again with "
            f"{usual:g}"
        )
    return None
