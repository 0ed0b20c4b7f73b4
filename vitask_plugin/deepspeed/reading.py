"""A DeepSpeed configuration as DeepSpeed and transformers read it: where it may stand, and what its keys mean.

DeepSpeed takes a ZeRO-3 key with or without its prefix `stage3_`, takes older names, and has a default for what is
"auto" or left out. So no key is looked up by its name; DeepSpeed's own model of the section is asked.
"""

import base64
import binascii
import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json

ZERO = "zero_optimization"


def configuration(given: str) -> dict[str, Any]:
    """What `--deepspeed` stands for: a file, JSON, or base64 of JSON.

    Raises:
        VITaskError: none of them, or no JSON object with a `zero_optimization` object in it, without which
            accelerate does not start.
    """
    # A long text is no path, and asking the system whether it is one would be an error.
    is_file = len(given) < 1024 and Path(given).is_file()
    if is_file and Path(given).read_bytes().startswith(codecs.BOM_UTF8):
        raise VITaskError(
            f"DeepSpeed configuration {given!r} begins with a byte-order mark, which transformers does not read; save "
            "it as UTF-8 without one"
        )
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


def check_accepted(config: Mapping[str, Any], given: str, *, bf16: bool, fp16: bool) -> None:
    """Refuses what DeepSpeed itself refuses, before anything long begins, and a precision that is not the flags'.

    Args:
        config: after transformers has put the flags in; the process group has to be there.
        given: what it is called in the error. bf16, fp16: the flags.

    Raises:
        VITaskError: with DeepSpeed's reason; or 16 bits of the flags that the configuration does not name, under which
            DeepSpeed would keep no float32 copies of the weights.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        found = DeepSpeedConfig(_without_auto(config))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, DeepSpeedConfigError) as error:
        raise VITaskError(
            f"DeepSpeed refuses the configuration {shortened(given)!r}: {' '.join(str(error).split())}; correct it"
        ) from None
    for name, is_on in _other_steps(found, config).items():
        if is_on:
            raise VITaskError(
                f"the DeepSpeed configuration {shortened(given)!r} has {name}, with which a step would see other "
                "tokens or weights than VITask lays out; take it out"
            )
    for flag, asked, section in (("bf16", bf16, found.bfloat16_config), ("fp16", fp16, found.float16_config)):
        if asked and not section.enabled:
            instead = " in place of torch_autocast" if found.torch_autocast_enabled else ""
            raise VITaskError(
                f"--{flag} True, and the DeepSpeed configuration {shortened(given)!r} does not turn {flag} on; add "
                f'"{flag}": {{"enabled": "auto"}} to it{instead}'
            )


def _other_steps(found: Any, config: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the sections under which a step is another one are on, by DeepSpeed's own reading `found`."""
    efficiency = found.data_efficiency_config
    return {
        # Its random layer dropping acts whatever the section's own "enabled" says.
        "data_efficiency": efficiency["enabled"] or efficiency["data_routing"]["random_ltd"]["enabled"],
        "tensor_parallel": found.tensor_parallel_config.autotp_size > 1,
        "sequence_parallel_size": config.get("sequence_parallel_size", 1) != 1,
    }


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value


def shortened(given: str) -> str:
    """A name for a message: a path as it is, JSON cut off."""
    return given if len(given) <= 200 else f"{given[:60]}..."
