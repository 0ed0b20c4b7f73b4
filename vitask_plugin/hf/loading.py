"""Models in HF format: for training, for inference, and what an earlier stage taught them.

A checkpoint of the host is a plain HF folder, or PEFT's adapter, with connector and `vitask.json` beside it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.hf import families
from vitask_plugin.hf.conversation import Template
from vitask_plugin.hf.merge import merged
from vitask_plugin.hf.model import with_vitask
from vitask_plugin.model_folder import ADAPTER_FILE, has_adapter
from vitask_plugin.reading import readable
from vitask_plugin.record import base as base_weights
from vitask_plugin.record.checkpoint import read_fitted, read_record
from vitask_plugin.record.connector_file import CONNECTOR_NAME, has_connector, load_connector
from vitask_plugin.record.whole_model import check_vocabulary, check_weights

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A checkpoint ready for inference. `record` is `vitask.json`, None for a model without VITask."""

    model: Any
    template: Template
    record: dict[str, Any] | None


def read_config(name: str, **kwargs: Any) -> Any:
    """The configuration of a model in a folder or on the Hub.

    Raises:
        VITaskError: absent, unreadable, a model that needs code of its own, or the Hub cannot be reached.
    """
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        if not Path(name).exists():
            raise VITaskError(
                f"{name!r} is no folder here, and the Hub gave no model of that name ({why}); check the name and the "
                "network, or download it and give its folder"
            ) from None
        raise VITaskError(
            f"the model in {name!r} has no configuration that transformers reads ({why}); give a folder in HF format"
        ) from None


def load_model(name: str, config: Any, *, dtype: torch.dtype, **kwargs: Any) -> Any:
    """The stock class of `config` with a VITask step, its weights from `name`.

    Raises:
        VITaskError: unreadable, or weights that are not there: transformers draws them at random, and warns.
    """
    # Under ZeRO-3 loading draws random numbers: LoRA would start from others than elsewhere.
    with readable("model", name), torch.random.fork_rng(devices=[], enabled=is_deepspeed_zero3_enabled()):
        model, found = with_vitask(config).from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    check_weights(found, model, name)
    families.decoder(model)
    # Under ZeRO-3 transformers 5 keeps every renaming for saving, not those alone that the folder needed: tensors of a
    # folder with today's names would be written under names that no other program reads.
    if getattr(model, "_weight_conversions", None):
        model._weight_conversions = [one for one in model._weight_conversions if one.was_used()]
    return model


def reload(model: nn.Module, directory: str) -> None:
    """Puts the weights of a checkpoint of a whole model into it, all but the connector's.

    transformers' Trainer takes tensors by the names in the file, and passes over those that it does not know. Many
    families are saved under the names of transformers 4, so that a resumed run would begin with untrained weights.

    Raises:
        VITaskError: weights that are not there.
    """
    with readable("checkpoint", directory), torch.random.fork_rng(devices=[]):
        saved, found = type(model).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    check_weights(found, saved, directory)
    left = model.load_state_dict(saved.state_dict(), strict=False)
    missing = [name for name in left.missing_keys if not name.startswith(f"{CONNECTOR_NAME}.")]
    if missing or left.unexpected_keys:
        odd = [*missing, *left.unexpected_keys][0]
        raise VITaskError(f"the checkpoint {directory!r} is of another model ({odd!r} is not in both); use the same")


def load_template(name: str, config: Any, **kwargs: Any) -> Template:
    """The processor of a model and its chat template, see `Template`."""
    with readable("processor", name):
        processor = AutoProcessor.from_pretrained(name, **kwargs)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise VITaskError(
            f"the processor of {name!r} has no tokenizer or no image processor; give the whole folder of a "
            "vision-language model, preprocessor_config.json among it"
        )
    return Template(processor, families.image_token(config, name), name)


def add_lora(model: nn.Module, args: Any, *, projector: bool) -> nn.Module:
    """PEFT's adapters on the decoder's linear layers; the projector is trained whole, and saved in the adapter.

    Args:
        args: the host's training arguments. projector: whether it is trained.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=families.lora_targets(model),
        modules_to_save=_leaves(model) if projector else None,
        task_type="CAUSAL_LM",
    )
    own = {"autocast_adapter_dtype": False} if is_deepspeed_zero3_enabled() else {}
    return get_peft_model(model, config, **own)


def _leaves(model: nn.Module) -> list[str]:
    """The projector's modules, lists of modules taken apart; a bare parameter cannot be saved beside adapters."""
    found = []
    for path, part in families.parts(model, families.PROJECTORS):
        name = path.removeprefix("model.")
        if isinstance(part, nn.ModuleList):
            found += [f"{name}.{number}" for number in range(len(part))]
        elif isinstance(part, nn.Module):
            found.append(name)
    return found


def continue_stage(model: nn.Module, start: str, earlier: str, lora: bool) -> None:
    """The model resumes from the earlier stage too: from its adapter, or by starting from its folder.

    Args:
        model: with adapters, if `lora`. start: --model_name_or_path. earlier: --vitask_connector_path.
    """
    if has_adapter(earlier) and lora:
        base_weights.check(earlier, start)
        _continue_adapter(model, Path(earlier))
    elif has_adapter(earlier):
        raise VITaskError(
            f"{earlier!r} is the output of a LoRA run, and without --lora_enable True its adapter would be lost; "
            f"enable it, or merge it with `vitask merge` and start from the result"
        )
    elif Path(start).resolve() != Path(earlier).resolve():
        raise VITaskError(
            f"--vitask_connector_path {earlier!r} holds a whole model, but --model_name_or_path {start!r} starts from "
            "another, which would lose what the earlier stage taught; give the same folder for both"
        )


def _continue_adapter(model: nn.Module, directory: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    with readable("adapter", directory / ADAPTER_FILE):
        saved = safetensors.torch.load_file(directory / ADAPTER_FILE)
    own = {name: tuple(getattr(w, "ds_shape", w.shape)) for name, w in get_peft_model_state_dict(model).items()}
    found = {name: tuple(weight.shape) for name, weight in saved.items()}
    if own.keys() != found.keys() or (own != found and not is_deepspeed_zero3_enabled()):
        odd = sorted({*own.items()} ^ {*found.items()})[0][0]
        raise VITaskError(
            f"the adapter in {str(directory)!r} does not continue this model ({odd!r} is not the same in both); use "
            "the same --model_name_or_path, --lora_r and --freeze flags as in the earlier stage"
        )
    set_peft_model_state_dict(model, saved)


def load(
    path: str | Path,
    base: str | Path | None = None,
    *,
    connector: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Loaded:
    """A model in HF format for inference, in eval mode, its connector attached if it has one.

    Args:
        base: the model that an adapter was trained from; by default the one that it names.
        connector: folder of a connector that was aligned or fitted to this checkpoint, in place of its own.

    Raises:
        VITaskError: absent or truncated files, an adapter without its base or of another, a connector of another
            checkpoint.
    """
    path = Path(path)
    source = Path(path) if not has_adapter(path) else _base_of(path, base)
    config = read_config(str(source))
    record = read_record(path) if connector is None else read_fitted(connector, path)
    if has_adapter(path):
        base_weights.check(path, source)
    model = load_model(str(source), config, dtype=dtype)
    if has_adapter(path):
        _check_adapter(path)
        model = merged(model, path, source)
    place = str(path if (path / "tokenizer_config.json").is_file() else source)
    template = load_template(place, config)
    check_vocabulary(template.processor.tokenizer, model, place)
    if record is not None:
        own = load_connector(connector or path).to(dtype) if connector is not None or has_connector(path) else None
        model.connect(VITaskArguments(**record["arguments"]), own)
    return Loaded(model.to(device).eval(), template, record)


def _base_of(path: Path, base: str | Path | None) -> Path:
    from peft import PeftConfig

    with readable("adapter", path):
        named = PeftConfig.from_pretrained(path).base_model_name_or_path
    found = base or named
    if not found or not Path(found).exists():
        raise VITaskError(
            f"{str(path)!r} is a LoRA checkpoint, and its base {str(found)!r} is not here; name the folder of the "
            "model that it was trained from (--model-base, model_base= of lmms-eval and Specialist.load)"
        )
    return Path(found)


def _check_adapter(path: Path) -> None:
    file = path / ADAPTER_FILE
    if not file.is_file():
        raise VITaskError(f"{str(path)!r} holds no {ADAPTER_FILE}; copy it again")
    with readable("adapter", file), safetensors.safe_open(file, "pt"):
        pass
