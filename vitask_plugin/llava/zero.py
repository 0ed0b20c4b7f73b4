"""What ZeRO-3 needs to be told about weights that are written to, and about the frozen vision tower."""

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


def set_apart(model: Any) -> None:
    """Takes the vision tower out of ZeRO-3's hands: whole on every rank, never partitioned, offloaded or gathered.

    It never changes, so all that partitioning it would save is its own size, 0.6 GB for CLIP ViT-L/336 in 16 bits, at
    the price of gathering as much in every step. Upstream holds it in a list under FSDP, where its modules look for it
    too. Its dtype becomes that of other runs: upstream's cast does not reach partitioned weights.

    Args:
        model: upstream's LlavaLlamaForCausalLM, loaded under ZeRO-3, before DeepSpeed's engine is made of it.
    """
    import deepspeed

    tower = model.get_vision_tower()
    dtypes = {name: weight.dtype for name, weight in tower.named_parameters()}  # as upstream cast it
    with deepspeed.zero.GatheredParameters(list(tower.parameters())):
        for path, module in tower.named_modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                dtype = dtypes[f"{path}.{name}" if path else name]
                setattr(module, name, nn.Parameter(weight.data.to(dtype, copy=True), requires_grad=False))
    llama = model.get_model()
    del llama.vision_tower
    llama.vision_tower = [tower]


def weights_apart(model: Any) -> dict[str, Tensor]:
    """The tower's weights under the names that they have in other runs' checkpoints, if it was set apart."""
    if not isinstance(getattr(model.get_model(), "vision_tower", None), list):
        return {}
    return {f"model.vision_tower.{name}": weight for name, weight in model.get_vision_tower().state_dict().items()}
