"""LLaVA 1.2.2 checkpoints, full or LoRA: read for inference, continued by a later stage, and named as upstream's."""

import logging
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.llava import compat
from vitask_plugin.llava.model_type import check_llama, check_tower
from vitask_plugin.model_folder import ADAPTER_FILE, CONNECTOR_FILE, NON_LORA_FILE, base_of, has_adapter
from vitask_plugin.reading import model_config, read_bin, readable
from vitask_plugin.record import base as base_weights
from vitask_plugin.record.checkpoint import RECORD_FILE, read_fitted, read_record
from vitask_plugin.record.connector_file import CONNECTOR_NAME, has_connector, load_connector
from vitask_plugin.record.whole_model import check_vocabulary, check_weights
from vitask_plugin.training.zero import writable

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A checkpoint ready for inference.

    Attributes:
        record: `vitask.json`, None for a LLaVA checkpoint without VITask. source: folder of the whole weights: the
            checkpoint's, or of an adapter its base's.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    record: dict[str, Any] | None
    source: Path


def name_stock_architecture(directory: str | Path) -> None:
    """Upstream's class name in config.json: without the connector the folder is a LLaVA checkpoint and says so."""
    path = Path(directory) / "config.json"
    if path.is_file():
        config = read_json(path, "model configuration")
        config["architectures"] = ["LlavaLlamaForCausalLM"]
        write_json(path, config)


def continue_stage(model: nn.Module, start: str, earlier: str, lora: bool) -> None:
    """The LLM resumes from the earlier stage too: from its adapter, or by starting from its folder.

    Args:
        start: --model_name_or_path. earlier: --vitask_connector_path.
    """
    started_there = Path(start).resolve() == Path(earlier).resolve()
    if has_adapter(earlier) and lora:
        base_weights.check(earlier, start)
        continue_adapter(model, earlier)
    elif has_adapter(earlier):
        raise VITaskError(
            f"{earlier!r} is the output of a LoRA run, and without --lora_enable True its adapter would be lost; "
            f"enable it, or merge it and put {CONNECTOR_FILE} and {RECORD_FILE} beside the result"
        )
    elif not started_there:
        raise VITaskError(
            f"--vitask_connector_path {earlier!r} holds a whole model, but --model_name_or_path {start!r} starts from "
            "another, which would lose what the earlier stage taught; give the same folder for both"
        )


def continue_adapter(model: nn.Module, directory: str | Path) -> None:
    """Loads the LoRA adapter and the non-LoRA weights of an earlier stage into a model that LoRA was just added to.

    Raises:
        VITaskError: unreadable, the shapes differ (another rank or base), or weights that the earlier stage trained are
            frozen now: upstream's LoRA checkpoints hold what is trained, so they would be lost.
    """
    from peft import set_peft_model_state_dict

    directory = Path(directory)
    # Read here and not by PEFT, which looks on the Hub for a file that is not there.
    with readable("adapter", directory / ADAPTER_FILE):
        adapter = safetensors.torch.load_file(directory / ADAPTER_FILE)
    other = read_bin(directory / NON_LORA_FILE)
    own = dict(model.named_parameters())
    try:
        unknown = [*set_peft_model_state_dict(model, adapter).unexpected_keys, *(other.keys() - own.keys())]
        if unknown:
            raise ValueError(f"weight {unknown[0]!r} is not in the model")
        with torch.no_grad(), writable(own[name] for name in other):
            for name, weight in other.items():
                own[name].copy_(weight)
    except (RuntimeError, ValueError) as error:
        raise VITaskError(
            f"the adapter in {str(directory)!r} does not continue this model ({error}); "
            "use the same --model_name_or_path, --lora_r and target modules as in the earlier stage"
        ) from None
    frozen = [name for name in other if not own[name].requires_grad]
    if frozen:
        raise VITaskError(
            f"the earlier stage in {str(directory)!r} trained {frozen[0]!r}, which is frozen now, and a LoRA "
            "checkpoint holds trained weights only; leave out --freeze_mm_mlp_adapter, or give it in both stages"
        )


def load(
    path: str | Path,
    base: str | Path | None = None,
    *,
    connector: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Loaded:
    """A LLaVA or VITask checkpoint for inference, in eval mode, its connector attached if it has one.

    Upstream's `load_pretrained_model` goes by the folder's name and rounds everything to float16; this keeps `dtype`.

    Args:
        base: the model a LoRA checkpoint was trained from; by default the one that its adapter names.
        connector: folder of a connector that was aligned or fitted to this checkpoint, in place of its own.

    Raises:
        VITaskError: absent or truncated files, a LoRA checkpoint without its base, a connector of another checkpoint.
    """
    compat.prepare()
    from transformers import AutoTokenizer

    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise VITaskError(f"{str(path)!r} is not a LLaVA checkpoint: it has no config.json")
    is_adapter = has_adapter(path)
    source = _base_of(path, base) if is_adapter else path
    for folder in {path, source}:
        check_llama(model_config(str(folder)), folder)
    record = read_record(path) if connector is None else read_fitted(connector, path)
    if is_adapter:
        base_weights.check(path, source)
    kwargs: dict[str, Any] = {"torch_dtype": dtype}
    with readable("configuration", path / "config.json"):
        if is_adapter:
            kwargs["config"] = _unquantized(VITaskLlavaLlamaForCausalLM.config_class.from_pretrained(path), dtype)
    model, found = VITaskLlavaLlamaForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
    if is_adapter:
        model, found["missing_keys"] = _merge_adapter(model, path, found["missing_keys"])
    check_weights(found, model, str(source))
    tower = model.get_vision_tower()
    check_tower(model_config(tower.vision_tower_name), tower.vision_tower_name)
    with readable("vision tower", tower.vision_tower_name):
        if not tower.is_loaded:
            tower.load_model()
    # Padding on the left gives a batch the answers each sample gets alone.
    model.config.tokenizer_padding_side = "left"
    model.config.use_cache = True
    if record is not None:
        has = connector is not None or has_connector(path)
        model.connect(VITaskArguments(**record["arguments"]), load_connector(connector or path) if has else None)
    model = model.to(device=device, dtype=dtype).eval()  # tower and connector; the model keeps its buffers
    with readable("tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
    check_vocabulary(tokenizer, model, str(source))
    return Loaded(model, tokenizer, tower.image_processor, record, source)


def _base_of(path: Path, base: str | Path | None) -> Path:
    if base is not None:
        return Path(base)
    named = base_of(path)
    found = base_weights.local_folder(named) if named else None
    if found is None:
        raise VITaskError(
            f"{str(path)!r} is a LoRA checkpoint, and its base {str(named)!r} is not here; name the folder of the "
            "model that it was trained from (--model-base, model_base= of lmms-eval and Specialist.load)"
        )
    return found


def _unquantized(config: Any, dtype: torch.dtype) -> Any:
    """The configuration of a LoRA run without its `--bits`: it is merged into the base as that is stored."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
        logger.info("the adapter was trained on quantized weights (--bits); it is merged into the base in %s", dtype)
    return config


def _merge_adapter(model: Any, path: Path, missing: Collection[str]) -> tuple[Any, list[str]]:
    """The base with a LoRA checkpoint's weights in it, and which of the base's `missing` weights are still missing."""
    from peft import PeftModel

    # PEFT's wrapping put "base_model.model." before the names; checkpoints in mid-run hold the connector too.
    weights = {
        name.removeprefix("base_model.model."): weight for name, weight in read_bin(path / NON_LORA_FILE).items()
    }
    weights = {name: weight for name, weight in weights.items() if not name.startswith(f"{CONNECTOR_NAME}.")}
    if not (path / ADAPTER_FILE).is_file():
        raise VITaskError(f"{str(path)!r} holds no {ADAPTER_FILE}; copy it again")
    try:
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"weight {unknown[0]!r} is not in the base model")
        with warnings.catch_warnings(), readable("adapter", path / ADAPTER_FILE):
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, VITaskError):
            raise
        raise VITaskError(
            f"the LoRA weights in {str(path)!r} do not fit this base ({error}); give the base they were trained from"
        ) from None
    return merged, [name for name in missing if name not in weights]
