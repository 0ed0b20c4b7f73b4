"""How many parameters an HF vision-language model has, and how many of them are trained.

The stock class is built on torch's meta device, which keeps shapes and no data.
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from vitask_plugin.deepspeed.sizes import Sizes, check_rank, connector_of, count, largest_layer
from vitask_plugin.errors import VITaskError
from vitask_plugin.hf import families, loading


@functools.lru_cache
def sizes_of(model: str, lora_r: int | None = None) -> Sizes:
    """Counts a model, trained as the host does it by default: all but the tower, or adapters and projector.

    Args:
        model: a folder with the config.json of any model that AutoModelForImageTextToText loads.
        lora_r: rank of LoRA on every linear layer of the decoder; None: full fine-tuning.

    Raises:
        VITaskError: no such model, or a rank below 1.
    """
    check_rank(lora_r)
    config = loading.read_config(model)
    try:
        with torch.device("meta"):
            built = AutoModelForImageTextToText.from_config(config)
            connector = connector_of(config.get_text_config().hidden_size)
    except (ValueError, ImportError) as error:
        raise VITaskError(
            f"--model {model!r} is of type {config.model_type!r}, which cannot be built here "
            f"({' '.join(str(error).split())[:200]}); give a vision-language model in HF format"
        ) from None
    projector = _different(families.PROJECTORS, built)
    tower = {key: weight for key, weight in _different(families.TOWERS, built).items() if key not in projector}
    llm = count(built) - _elements(projector.values()) - _elements(tower.values())
    largest = max(largest_layer(built), largest_layer(connector))
    adapters = _add_lora(built, lora_r) if lora_r else 0
    # A bare parameter, such as LLaVA-OneVision's image_newline, is not trained beside adapters.
    beside = [part for _, part in families.parts(built, families.PROJECTORS) if isinstance(part, nn.Module)]
    trained = adapters + sum(map(count, beside)) if adapters else llm + _elements(projector.values())
    return Sizes(
        llm=llm,
        projector=_elements(projector.values()),
        connector=count(connector),
        adapters=adapters,
        tower=_elements(tower.values()),
        trained=trained,
        numels=tuple(weight.numel() for part in (built, connector) for weight in part.parameters()),
        layer_numels=tuple(weight.numel() for weight in families.decoder(built).layers.parameters()),
        largest_layer=largest,
        config=config.get_text_config(),
        divides_tower=True,  # it is loaded with the model, which ZeRO-3 divides as it loads
    )


def _different(paths: tuple[str, ...], model: nn.Module) -> dict[int, nn.Parameter]:
    """{id: parameter} of the parts at `paths`, each once."""
    return {id(weight): weight for _, part in families.parts(model, paths) for weight in families.weights(part)}


def _elements(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def _add_lora(model: nn.Module, rank: int) -> int:
    """Adapters on what the host adapts; returns their size."""
    from peft import LoraConfig, inject_adapter_in_model

    before = count(model)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=families.lora_targets(model)), model)
    return count(model) - before
