"""Whether what lies in a model's folder is one whole model: weights, configuration and tokenizer of each other."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from vitask_plugin.errors import VITaskError
from vitask_plugin.record.connector_file import CONNECTOR_NAME

_NUMBER = re.compile(r"\.\d+\.")


def check_weights(found: Mapping[str, Any], model: nn.Module, name: str, *, added: Collection[str] = ()) -> None:
    """Refuses weights that are not those of the configuration beside them.

    Args:
        found: `output_loading_info` of transformers. model: what was loaded. name: its folder.
        added: parts of the names of weights that are not in the folder yet.

    Raises:
        VITaskError: some are missing, which transformers draws at random, or there are those of more layers than the
            model has. What else a folder holds, such as another head, is left alone, as transformers does.
    """
    missing = sorted(key for key in found["missing_keys"] if not any(part in key for part in added))
    if missing:
        raise VITaskError(
            f"the weights in {name!r} lack {len(missing)} tensors, {missing[0]!r} among them; copy them again"
        )
    more = _of_more_layers(found["unexpected_keys"], model.state_dict().keys())
    if more:
        raise VITaskError(
            f"the weights in {name!r} hold {len(more)} tensors of layers that config.json does not have, {more[0]!r} "
            "among them; the two are not of one model, so copy both again"
        )


def _of_more_layers(unexpected: Iterable[str], own: Iterable[str]) -> list[str]:
    """Those that differ from a weight of the model in a number alone."""
    layers = {_NUMBER.sub(".0.", key) for key in own}
    named = (key for key in unexpected if _NUMBER.search(key) and not key.startswith(f"{CONNECTOR_NAME}."))
    return sorted(key for key in named if _NUMBER.sub(".0.", key) in layers)


def check_vocabulary(tokenizer: Any, model: Any, name: str) -> None:
    """Refuses a tokenizer with words that the model has no embedding of; it may have fewer, as many models are padded.

    Raises:
        VITaskError: naming both numbers.
    """
    embeddings: nn.Embedding = model.get_input_embeddings()
    rows, words = embeddings.num_embeddings, len(tokenizer)
    if words > rows:
        raise VITaskError(
            f"the tokenizer in {name!r} has {words} words and the model embeddings of {rows}; it is another model's, "
            "so copy the tokenizer again"
        )
