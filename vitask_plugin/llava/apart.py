"""The frozen vision tower under ZeRO-3: whole on every rank."""

from typing import Any

from torch import Tensor, nn


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
