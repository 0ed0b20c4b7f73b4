"""A DeepSpeed configuration as DeepSpeed and transformers read it: where it may stand, and what its keys mean.

DeepSpeed takes a ZeRO-3 key with or without its prefix `stage3_`, takes older names, and has a default for what is
"auto" or left out. So no key is looked up by its name; DeepSpeed's own model of the section is asked.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import read_json

ZERO = "zero_optimization"


def configuration(given: str) -> dict[str, Any]:
    """What `--deepspeed` stands for: a file, JSON, or base64 of JSON.

    Raises:
        VITaskError: none of them, or no JSON object with a `zero_optimization` object in it, without which
            accelerate does not start.
    """
    # A long text is no path, and asking the system whether it is one would be an error.
    is_file = len(given) < 1024 and Path(given).is_file()
    found = read_json(given, "DeepSpeed configuration") if is_file else _inline(given)
    if not isinstance(found, dict) or not isinstance(found.get(ZERO), dict):
        raise VITaskError(
            f"DeepSpeed configuration {shortened(given)!r} is no JSON object with a {ZERO} object in it; add one, "
            f'such as "{ZERO}": {{"stage": 2}}'
        )
    return found


def _inline(given: str) -> Any:
    for text in (lambda: given, lambda: base64.urlsafe_b64decode(given).decode()):
        try:
            return json.loads(text())
        except (ValueError, binascii.Error):  # no JSON, no base64, no text
            continue
    raise VITaskError(
        f"--deepspeed {shortened(given)!r} is no file; give one, or one of ours: "
        '--deepspeed "$(vitask deepspeed-config zero2)" (`vitask deepspeed-config --help` lists them)'
    )


def zero_section(config: Mapping[str, Any], given: str) -> Any:
    """The `zero_optimization` of a configuration as a `DeepSpeedZeroConfig`; what is "auto" has DeepSpeed's default.

    Args:
        given: what the configuration is called in the error.

    Raises:
        VITaskError: settings that DeepSpeed refuses, naming the first.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = {name: value for name, value in config.get(ZERO, {}).items() if value != "auto"}
    if not isinstance(section.get("stage", 0), int):  # transformers compares it with a number
        raise VITaskError(
            f"DeepSpeed configuration {shortened(given)!r}: {ZERO}.stage is {section['stage']!r}; give a number"
        )
    try:
        return DeepSpeedZeroConfig(**section)
    except AssertionError as error:  # an older name beside the newer one
        raise VITaskError(f"DeepSpeed configuration {shortened(given)!r}: {error}; leave out the older one") from None
    except ValueError as error:  # pydantic's
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise VITaskError(
            f"DeepSpeed configuration {shortened(given)!r}: {ZERO}.{where} is not what DeepSpeed takes "
            f"({first['msg']}); correct it"
        ) from None


def shortened(given: str) -> str:
    """A name for a message: a path as it is, JSON cut off."""
    return given if len(given) <= 200 else f"{given[:60]}..."
