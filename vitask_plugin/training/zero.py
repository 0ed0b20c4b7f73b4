"""What ZeRO-3 needs to be told about weights that are read or written to."""

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from vitask_plugin.deepspeed.reading import shortened, zero_section
from vitask_plugin.errors import VITaskError


def writable(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """While the block runs, parameters that ZeRO-3 has divided are whole; what rank 0 writes to them is kept."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided, modifier_rank=0)


def zero_stage(args: Any) -> int | None:
    """Of training arguments; None without DeepSpeed."""
    if not args.deepspeed:
        return None
    return int(zero_section(args.hf_deepspeed_config.config, str(args.deepspeed)).stage)


def check_gathers(args: Any) -> None:
    """Refuses a ZeRO-3 config under which the trained weights could not be written. `args`: upstream's arguments.

    LoRA's are gathered by upstream and PEFT, whatever the config says.

    Raises:
        VITaskError: naming the key.
    """
    if args.lora_enable or not args.deepspeed or not args.hf_deepspeed_config.is_zero3():
        return
    given = str(args.deepspeed)
    if not zero_section(args.hf_deepspeed_config.config, given).gather_16bit_weights_on_model_save:
        raise VITaskError(
            f"--deepspeed {shortened(given)!r} leaves the trained weights divided among the ranks; set "
            '"stage3_gather_16bit_weights_on_model_save": true in its "zero_optimization", as `vitask deepspeed-config '
            "zero3` does"
        )


def gathered_weights(module: nn.Module) -> dict[str, Tensor]:
    """`{name: weight}` of a module, whole, on the CPU. Under ZeRO-3 all ranks have to call it."""
    parameters = dict(module.named_parameters())
    divided = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with _whole(divided):
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def _whole(divided: list[nn.Parameter]) -> AbstractContextManager:
    if not divided:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)
