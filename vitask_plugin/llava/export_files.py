"""The files of an exported checkpoint: transformers' configuration, processor and weights for what LLaVA calls its own.

Weights go by the names of the published llava-hf models, which every version of transformers, vLLM and SGLang knows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.llava.loading import Loaded
from vitask_plugin.reading import readable
from vitask_plugin.record.connector_file import CONNECTOR_NAME

IMAGE_TOKEN = "<image>"
SHARD = 5 * 10**9  # bytes, unless one weight is larger
_EMBEDDINGS, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
# Prefixes of LLaVA's names, the first that fits counts.
_NAMES = {
    "model.vision_tower.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.vision_tower.": "vision_tower.vision_model.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def fast_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a checkpoint as one that any version reads from its `tokenizer.json` alone, with `<image>`.

    Raises:
        VITaskError: it has no fast form.
    """
    with readable("tokenizer", source):
        found = AutoTokenizer.from_pretrained(source)
    if not found.is_fast:
        raise VITaskError(f"the tokenizer in {str(source)!r} ({type(found).__name__}) has no fast form to be exported")
    special = {name: found.special_tokens_map.get(name) for name in ("bos_token", "eos_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        **special,
        pad_token=found.pad_token or found.unk_token or found.eos_token,  # as upstream pads
        model_max_length=found.model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # a Llama takes no token types
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    # Not normalized: what surrounds it stays as it is.
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def save_config(model: Any, strategy: str, image: int, rows: int, dtype: str, directory: Path) -> None:
    """`config.json`. `image`: id of the image token; `rows`: of the word embeddings."""
    own, tower = model.config, model.get_vision_tower()
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "_name_or_path"}
    text = {name: value for name, value in own.to_dict().items() if name in known}
    vision = {name: value for name, value in tower.config.to_dict().items() if name != "_name_or_path"}
    patches = tower.num_patches + (strategy == "full")
    config = LlavaConfig(
        vision_config={**vision, "dtype": dtype},
        text_config={**text, "model_type": "llama", "vocab_size": rows, "dtype": dtype},
        image_token_index=image,
        image_seq_length=patches,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=own.mm_vision_select_layer,
        tie_word_embeddings=own.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=dtype,
    )
    config.save_pretrained(directory)


def save_generation_config(tokenizer: Any, added: Iterable[int], directory: Path) -> None:
    """What ends an answer, and the `added` tokens, which are never a part of one."""
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(added) or None,
    ).save_pretrained(directory)


def save_processor(loaded: Loaded, strategy: str, tokenizer: Any, template: str, directory: Path) -> None:
    """Tokenizer, chat template, and the image processor of training: upstream pads an image to a square before CLIP's
    processor sees it (`pad`), or leaves that to crop it."""
    settings = loaded.image_processor.to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("image_processor_type", "do_pad")}
    padded = getattr(loaded.model.config, "image_aspect_ratio", None) == "pad"
    images = LlavaImageProcessor(**settings, do_pad=True) if padded else CLIPImageProcessor(**settings)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=loaded.model.get_vision_tower().config.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" takes away again
    )
    processor.save_pretrained(directory)
    # As transformers 4 writes and reads them; 5 reads that too.
    images.save_pretrained(directory)
    path = directory / "processor_config.json"
    own = {name: value for name, value in read_json(path, "processor").items() if name != "image_processor"}
    write_json(path, own)
    path = directory / "tokenizer_config.json"
    write_json(path, {**read_json(path, "tokenizer"), "tokenizer_class": "PreTrainedTokenizerFast"})


def save_weights(model: Any, rows: int, dtype: torch.dtype, directory: Path) -> None:
    """`model.safetensors`, or several of about `SHARD` bytes with their index.

    Args:
        model: a LLaVA with its vision tower. rows: of word embeddings to write, see `_with_rows`.
    """
    shards: list[dict[str, Tensor]] = [{}]
    weights = dict(_weights(model))
    for name, weight in weights.items():
        used = sum(each.numel() for each in shards[-1].values())
        if shards[-1] and (used + weight.numel()) * dtype.itemsize > SHARD:
            shards.append({})
        shards[-1][name] = weight
    index, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        written = {name: _with_rows(name, weight, rows).to(dtype).contiguous() for name, weight in shard.items()}
        save_file(written, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(written, file)
        total += sum(weight.numel() for weight in written.values()) * dtype.itemsize
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if name.startswith(f"{CONNECTOR_NAME}.") or (tied and name.startswith("lm_head.")):
            continue
        old = next(prefix for prefix in _NAMES if name.startswith(prefix))
        yield _NAMES[old] + name.removeprefix(old), weight.detach().cpu()


def _with_rows(name: str, weight: Tensor, rows: int) -> Tensor:
    """Word embeddings and output layer with rows for added tokens: the mean of all others.

    So the logit of an added token is the mean of the others' logits: it is never the largest, and of the probability
    it takes no more than one word's share.
    """
    if name not in (_EMBEDDINGS, _HEAD) or rows == len(weight):
        return weight
    return torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(rows - len(weight), -1)])
